"""What tests read out of documents."""

import dataclasses
import typing
from collections.abc import Mapping

from experiments.config import ExperimentConfig

FLAG = r"--config\.([\w.]+)=([^\s`]+)"


def plain_type(kind):
  """`float` of `float | None`."""
  members = [member for member in typing.get_args(kind) if member is not type(None)]
  return members[0] if type(None) in typing.get_args(kind) else kind


# Groups that may be None have a key "on".
SWITCHED = [
  plain_type(kind) for kind in typing.get_type_hints(ExperimentConfig).values() if plain_type(kind) is not kind
]


def resolve(path):
  """The type of a dotted field of `ExperimentConfig`, without "config."; AttributeError if there is none."""
  kind = ExperimentConfig
  for name in path.split("."):
    if typing.get_origin(kind) is Mapping:
      return typing.Any
    if name == "on" and kind in SWITCHED:
      return bool
    if not dataclasses.is_dataclass(kind) or name not in {field.name for field in dataclasses.fields(kind)}:
      raise AttributeError(f"config.{path}: {getattr(kind, '__name__', kind)} has no {name}")
    kind = plain_type(typing.get_type_hints(kind)[name])
  return kind
