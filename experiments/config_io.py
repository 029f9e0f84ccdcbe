"""F4: `experiments.config` to and from the ConfigDict that flags override, with everything checked on the way in."""

import dataclasses
import difflib
import typing
from collections.abc import Mapping
from typing import Any

import ml_collections

from experiments.config import ExperimentConfig
from models.config import TransformerConfig
from rspo_jax import advantages, mismatch, objectives
from rspo_jax.data import DATASETS
from rspo_jax.rewards import REWARDS


def config_dict(config: ExperimentConfig) -> ml_collections.ConfigDict:
  """The dataclasses as a ConfigDict, so that flags can override every field by its dotted name."""

  def fill(node: Any) -> dict[str, Any]:
    filled = {}
    for field in dataclasses.fields(node):
      value, kind = getattr(node, field.name), _optional(typing.get_type_hints(type(node))[field.name])
      if dataclasses.is_dataclass(value):
        value = fill(value)
      elif value is None:
        value = ml_collections.config_dict.placeholder(kind)  # a flag can still give it a value of that type
      filled[field.name] = value
    return filled

  return ml_collections.ConfigDict(fill(config))


def _optional(kind: Any) -> Any:
  """`float` of `float | None`; any other type as it is."""
  inner = [part for part in typing.get_args(kind) if part is not type(None)]
  return inner[0] if type(None) in typing.get_args(kind) else kind


def read_config(given: ml_collections.ConfigDict) -> ExperimentConfig:
  """The ConfigDict as checked dataclasses.

  Raises:
    ValueError: an unknown key, a wrong type or an impossible value; names the key and the cure.
  """
  config = _build(ExperimentConfig, given.to_dict(), "config")
  for name, known, what in (
    (config.data.name, DATASETS, "config.data.name"),
    (config.reward.name, REWARDS, "config.reward.name"),
    (config.objective.name, objectives.OBJECTIVES, "config.objective.name"),
  ):
    if name not in known:
      raise ValueError(f"{what} is {name!r}; want one of {', '.join(sorted(known))}.")
  for what, value, least in (
    ("config.rl.samples_per_prompt", config.rl.samples_per_prompt, 2),
    ("config.rl.minibatches", config.rl.minibatches, 1),
    ("config.rl.epochs", config.rl.epochs, 1),
    ("config.evaluation.samples", config.evaluation.samples, 1),
    ("config.evaluation.batch_problems", config.evaluation.batch_problems, 1),
    ("config.checkpoint.every", config.checkpoint.every, 1),
    ("config.rl.dynamic_sampling_rounds", config.rl.dynamic_sampling_rounds, 1),
    ("config.rl.overlong_buffer", config.rl.overlong_buffer, 0),
    ("config.router.shift_floor_updates", config.router.shift_floor_updates, 0),
    ("config.diagnostics.every", config.diagnostics.every, 0),
    ("config.diagnostics.pieces", config.diagnostics.pieces, 2),
    ("config.rl.steps", config.rl.steps, 0),
    ("config.warm_start.steps", config.warm_start.steps, 0),
  ):
    if value < least:
      raise ValueError(f"{what} is {value}; want {least} or more.")
  if config.rl.prompts % (config.rl.minibatches * config.rl.microbatches):
    raise ValueError(
      f"config.rl.prompts is {config.rl.prompts}, which does not divide into {config.rl.minibatches} minibatches of "
      f"{config.rl.microbatches} microbatches; make it a multiple of config.rl.minibatches * config.rl.microbatches."
    )
  for what, value, known in (
    ("config.objective.kl_in", config.objective.kl_in, ("loss", "reward")),
    ("config.objective.baseline", config.objective.baseline, (None, *advantages.BASELINES)),
    ("config.objective.scale", config.objective.scale, (None, *advantages.SCALES)),
    ("config.router.replay", config.router.replay, ("none", "scoring", "sampler")),
    ("config.mismatch.correction", config.mismatch.correction, ("none", *mismatch.CORRECTIONS)),
  ):
    if value not in known:
      raise ValueError(f"{what} is {value!r}; want one of {', '.join(filter(None, known))}.")
  return config


def read_model_config(given: Mapping[str, Any]) -> TransformerConfig:
  """A model's configuration from JSON; ValueError names an unknown key or a wrong type."""
  return _build(TransformerConfig, given, "model")


def check_divides(config: ExperimentConfig, shards: int) -> None:
  """Every batch of the run must split evenly over the mesh; told before anything compiles.

  Args:
    shards: pieces the mesh cuts a batch into, `Layout.batch_shards`.
  Raises:
    ValueError: names the first key that does not divide.
  """
  rl = config.rl
  rows = rl.prompts * rl.samples_per_prompt // (rl.minibatches * rl.microbatches)
  noise_rows = rl.prompts * rl.samples_per_prompt // rl.minibatches if config.diagnostics.every else 0
  for what, count in (
    ("config.rl.prompts (prompts are prefilled over the mesh)", rl.prompts),
    ("config.rl.prompts * samples_per_prompt / (minibatches * microbatches)", rows),
    ("the rows of a minibatch in each of config.diagnostics.pieces", noise_rows // config.diagnostics.pieces),
    ("config.warm_start.batch_size", config.warm_start.batch_size if config.warm_start.steps else 0),
    ("config.evaluation.batch_problems", config.evaluation.batch_problems),
  ):
    if count % shards:
      raise ValueError(
        f"{what} is {count}, which does not divide over the {shards} batch shards of the mesh "
        f"{dict(config.runtime.mesh)}; change it to a multiple of {shards}, or the mesh."
      )


def _build(kind: type, values: Any, where: str) -> Any:
  if not isinstance(values, Mapping):
    raise ValueError(f"{where} is {values!r}; want a group of settings.")
  fields = {field.name: field for field in dataclasses.fields(kind)}
  for key in values:
    if key not in fields:
      near = difflib.get_close_matches(key, fields, n=1)
      hint = f"did you mean {where}.{near[0]}?" if near else f"{where} has {', '.join(fields)}."
      raise ValueError(f"{where}.{key} is unknown; {hint}")
  missing = [
    name
    for name, field in fields.items()
    if name not in values and field.default is field.default_factory is dataclasses.MISSING
  ]
  if missing:
    raise ValueError(f"{where} lacks {', '.join(missing)}.")
  hints = typing.get_type_hints(kind)
  return kind(**{key: _convert(hints[key], value, f"{where}.{key}") for key, value in values.items()})


def _convert(kind: Any, value: Any, where: str) -> Any:
  if dataclasses.is_dataclass(kind):
    return _build(kind, value, where)
  if _optional(kind) is not kind:
    if value is None:
      return None
    kind = _optional(kind)
  origin = typing.get_origin(kind) or kind
  if kind is float and type(value) is int:
    return float(value)
  if origin is tuple and isinstance(value, (list, tuple)):
    return tuple(_convert(typing.get_args(kind)[0], item, where) for item in value)
  if origin is Mapping and isinstance(value, Mapping):
    return dict(value)
  if not isinstance(origin, type) or not isinstance(value, origin) or (origin is int and isinstance(value, bool)):
    name = getattr(kind, "__name__", str(kind))
    raise ValueError(f"{where} is {value!r} ({type(value).__name__}); want {name}.")
  return value
