"""Finding what a config names: an entry of a table, or a callable by its dotted path; and saying what was near."""

import difflib
import importlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

_PATH = re.compile(r"[\w.]+:\w+")


def near(word: str, known: Iterable[str]) -> str:
  """The cure for a mistyped word: "did you mean ...?" if one is close, else all that are known."""
  known = list(known)
  close = difflib.get_close_matches(word, known, n=1)
  return f"did you mean {close[0]}?" if close else f"want one of {', '.join(sorted(known))}."


def is_path(name: str) -> bool:
  """Whether a name is a dotted path, "package.module:function"."""
  return _PATH.fullmatch(name) is not None


def load_path(path: str) -> Callable[..., Any]:
  """The callable at "package.module:function" (or a class).

  Raises:
    ValueError: no such module, one that does not load, or no such callable in it; names those that are near.
  """
  module, _, name = path.partition(":")
  try:
    loaded = importlib.import_module(module)
  except Exception as error:
    raise ValueError(
      f"{path!r}: module {module} cannot be imported ({type(error).__name__}: {error}); it is looked for in the folder "
      "that Python was started in, in PYTHONPATH and among the installed packages."
    ) from error
  found = getattr(loaded, name, None)
  if not callable(found):
    names = [other for other in vars(loaded) if callable(getattr(loaded, other)) and not other.startswith("_")]
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]}?" if close else f"it has {', '.join(names) or 'none'}."
    raise ValueError(f"{path!r}: {module} has no callable {name}; {hint}")
  return found


def look_up(where: str, name: str, table: Mapping[str, Any]) -> Any:
  """The entry of a table, or the callable at a dotted path.

  Args:
    where: the key that holds the name, for messages, as "config.objective.name".
  Raises:
    ValueError: neither; says what is near.
  """
  if name in table:
    return table[name]
  if not is_path(name):
    raise ValueError(
      f"{where} is {name!r}; {near(name, table)} Your own is named by its path, package.module:function."
    )
  try:
    return load_path(name)
  except ValueError as error:
    raise ValueError(f"{where} is {error}") from error
