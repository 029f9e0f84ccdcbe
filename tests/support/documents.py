"""Flags of the config in documents, and whether they exist."""

import dataclasses
import typing
from collections.abc import Mapping

from experiments.config import ExperimentConfig

FLAG = r"--config\.([\w.]+)=([^\s`]+)"


def plain_type(kind):
  """`float` for `float | None`; any other type unchanged."""
  members = [member for member in typing.get_args(kind) if member is not type(None)]
  return members[0] if type(None) in typing.get_args(kind) else kind


# The types of groups that may be None, which have a key "on".
OPTIONAL_GROUPS = [
  plain_type(kind) for kind in typing.get_type_hints(ExperimentConfig).values() if plain_type(kind) is not kind
]


def resolve(path):
  """The type of the key at a dotted path without "config.", such as "shift.floor"; `Any` inside a mapping of options.

  Raises:
    AttributeError: there is no such key.
  """
  kind = ExperimentConfig
  for name in path.split("."):
    if typing.get_origin(kind) is Mapping:
      kind = typing.get_args(kind)[1]
      if dataclasses.is_dataclass(kind):
        continue  # `name` is a key of the mapping
      return typing.Any
    if name == "on" and kind in OPTIONAL_GROUPS:
      return bool
    if not dataclasses.is_dataclass(kind) or name not in {field.name for field in dataclasses.fields(kind)}:
      raise AttributeError(f"config.{path}: {getattr(kind, '__name__', kind)} has no {name}")
    kind = plain_type(typing.get_type_hints(kind)[name])
  return kind
