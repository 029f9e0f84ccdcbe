"""Lookup of names from a config: table entries, callables by dotted path, and suggestions for misspelt names."""

import difflib
import importlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

_NAME = r"[^\W\d]\w*"
_PATH = re.compile(rf"{_NAME}(?:\.{_NAME})*:{_NAME}")
_MOST_NAMES = 20  # in a message


def near(word: str, known: Iterable[str]) -> str:
  """The cure for a misspelt word: "did you mean ...?" if a known word is similar, else all known words."""
  known = list(known)
  close = difflib.get_close_matches(word, known, n=1)
  return f"did you mean {close[0]}?" if close else f"want one of {', '.join(sorted(known)) or '(none)'}."


def is_path(name: str) -> bool:
  """Whether a name is a dotted path, "package.module:function"."""
  return _PATH.fullmatch(name) is not None


def load_path(path: str) -> Callable[..., Any]:
  """The callable (function or class) at "package.module:function".

  Raises:
    ValueError: not a dotted path, a module that cannot be imported, or no such callable in it; suggests similar names.
  """
  if not is_path(path):
    raise ValueError(f"{path!r}: want package.module:function.")
  module_name, _, name = path.partition(":")
  try:
    module = importlib.import_module(module_name)
  except (Exception, SystemExit) as error:
    raise ValueError(
      f"{path!r}: module {module_name} cannot be imported ({type(error).__name__}: {error}); Python searches the "
      "folder that it was started in, PYTHONPATH and the installed packages."
    ) from error
  target = getattr(module, name, None)
  if callable(target):
    return target
  names = [other for other, value in vars(module).items() if callable(value) and not other.startswith("_")]
  close = difflib.get_close_matches(name, names, n=1)
  more = ", ..." if len(names) > _MOST_NAMES else "."
  hint = f"did you mean {close[0]}?" if close else f"it has {', '.join(names[:_MOST_NAMES]) or 'none'}{more}"
  raise ValueError(f"{path!r}: {module_name} has no callable {name}; {hint}")


def look_up(where: str, name: Any, table: Mapping[str, Any]) -> Any:
  """The entry of a table, or the callable at a dotted path.

  Args:
    where: the key that holds the name, for messages, as "config.objective.name".
    name: as the config has it; only a string is valid.
  Raises:
    ValueError: neither; suggests a similar name.
  """
  if not isinstance(name, str) or (name not in table and not is_path(name)):
    raise ValueError(
      f"{where} is {name!r}; {near(str(name), table)} Your own is named by its path, package.module:function."
    )
  if name in table:
    return table[name]
  try:
    return load_path(name)
  except ValueError as error:
    raise ValueError(f"{where} is {error}") from error
