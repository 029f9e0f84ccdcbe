"""The check of lower bounds that config groups share."""

from typing import Any


def check_at_least(group: Any, **bounds: float) -> None:
  """Checks fields of a dataclass against inclusive lower bounds.

  Raises:
    ValueError: a field is below its bound; the message starts with the field's name.
  """
  for name, least in bounds.items():
    if not getattr(group, name) >= least:
      raise ValueError(f"{name} is {getattr(group, name)}; want {least} or more.")
