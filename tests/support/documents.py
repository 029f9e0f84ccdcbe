"""What tests read out of documents."""

import dataclasses
import typing
from collections.abc import Mapping

from experiments.config import ExperimentConfig

FLAG = r"--config\.([\w.]+)=([^\s`]+)"


def resolve(path):
  """The type of a dotted field of `ExperimentConfig`, without "config."; AttributeError if there is none."""
  kind = ExperimentConfig
  for name in path.split("."):
    if typing.get_origin(kind) is Mapping:
      return typing.Any
    if not dataclasses.is_dataclass(kind) or name not in {field.name for field in dataclasses.fields(kind)}:
      raise AttributeError(f"config.{path}: {getattr(kind, '__name__', kind)} has no {name}")
    kind = typing.get_type_hints(kind)[name]
  return kind
