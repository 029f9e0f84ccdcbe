"""A user's reward in a worker process. This module imports nothing of ours, since that would import JAX."""

import collections
import functools
import importlib
import json
import sys
from collections.abc import Callable, Mapping
from typing import Any


def bind(target: Callable[..., Any], options: Mapping[str, Any]) -> Callable[..., Any]:
  """An instance of a class, or a function with its options bound."""
  return target(**options) if isinstance(target, type) else functools.partial(target, **options)


def load(argument: str) -> Callable[[tuple[str, tuple]], tuple[bool, Any]]:
  """The function that scores (text, fields of the example).

  Args:
    argument: JSON of an object with module, function, options, path (for `sys.path`) and fields (of the example).
  Returns:
    A function that returns (True, fields of the RewardResult), or (False, value) if the reward returned anything else.
  """
  spec = json.loads(argument)
  sys.path[:] = spec["path"]
  example = collections.namedtuple("Example", spec["fields"])
  reward = bind(getattr(importlib.import_module(spec["module"]), spec["function"]), spec["options"])

  def run(item: tuple[str, tuple]) -> tuple[bool, Any]:
    text, fields = item
    value = reward(text, example(*fields))
    is_result = type(value).__name__ == "RewardResult"
    return is_result, tuple(value) if is_result else value

  return run
