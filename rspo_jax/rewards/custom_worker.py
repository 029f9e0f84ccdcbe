"""A reward of the user's, in a worker. It imports nothing of ours, since that would import JAX."""

import collections
import functools
import importlib
import json
import sys
from collections.abc import Callable
from typing import Any


def load(argument: str) -> Callable[[tuple[str, tuple]], tuple[bool, Any]]:
  """The function that scores (text, fields of the example), made of JSON: module, function, options, path, fields.

  It returns whether the reward returned a RewardResult, and its fields, or else what it did return.
  """
  wanted = json.loads(argument)
  sys.path[:] = wanted["path"]
  example = collections.namedtuple("Example", wanted["fields"])
  made = getattr(importlib.import_module(wanted["module"]), wanted["function"])
  reward = made(**wanted["options"]) if isinstance(made, type) else functools.partial(made, **wanted["options"])

  def run(item: tuple[str, tuple]) -> tuple[bool, Any]:
    text, fields = item
    value = reward(text, example(*fields))
    whole = type(value).__name__ == "RewardResult"
    return whole, tuple(value) if whole else value

  return run
