"""Reads small files; errors name the file and the cure."""

import json
from pathlib import Path
from typing import Any


def read_json(path: str | Path, *, absent_ok: bool = False, cure: str = "Download it again.") -> dict[str, Any]:
  """The object in a JSON file.

  Args:
    absent_ok: return {} if the file is absent.
    cure: advice for an absent or unreadable file, for the message.
  Raises:
    ValueError: the file is absent, is not JSON in UTF-8, or holds anything but an object; names the file.
  """
  path = Path(path)
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError:
    if absent_ok:
      return {}
    raise ValueError(f"{path} is absent. {cure}") from None
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{path} cannot be read: it is not JSON ({error}). {cure}") from error
  if not isinstance(value, dict):
    raise ValueError(f"{path} cannot be read: it holds a {type(value).__name__}, not an object. {cure}")
  return value
