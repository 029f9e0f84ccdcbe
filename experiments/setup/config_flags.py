"""`experiments.config` to and from the ConfigDict that flags override, with everything checked on the way in."""

import dataclasses
import difflib
import re
import typing
from collections.abc import Mapping
from typing import Any

import ml_collections

from experiments.config import EvaluationConfig, ExperimentConfig
from models.config import TransformerConfig
from rspo_jax.data.datasets import DATASETS
from rspo_jax.objectives import advantages, mismatch
from rspo_jax.objectives.table import OBJECTIVES
from rspo_jax.rewards.table import check_reward, reward_names


def config_dict(config: ExperimentConfig) -> ml_collections.ConfigDict:
  """The dataclasses as a ConfigDict, so that flags can override every field by its dotted name."""

  def fill(node: Any) -> dict[str, Any]:
    filled = {}
    for field in dataclasses.fields(node):
      value, kind = getattr(node, field.name), _optional(typing.get_type_hints(type(node))[field.name])
      if dataclasses.is_dataclass(value):
        value = fill(value)
      elif isinstance(value, Mapping):
        value = {key: fill(item) if dataclasses.is_dataclass(item) else item for key, item in value.items()}
      elif value is None:
        # a flag can still give it a value of that type
        value = ml_collections.config_dict.placeholder(typing.get_origin(kind) or kind)
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
    (config.objective.name, OBJECTIVES, "config.objective.name"),
  ):
    _check_known(what, name, known)
  check_reward(config.reward.name, config.reward.options, "config.reward")
  if config.rl.overlong_buffer and "length" in reward_names(config.reward.name, config.reward.options):
    raise ValueError(
      f"config.rl.overlong_buffer is {config.rl.overlong_buffer} and config.reward holds the length reward: long "
      "completions would be punished twice. Set overlong_buffer to 0, or leave the length reward out."
    )
  for what, value, least in (
    ("config.rl.samples_per_prompt", config.rl.samples_per_prompt, 2),
    ("config.rl.minibatches", config.rl.minibatches, 1),
    ("config.rl.epochs", config.rl.epochs, 1),
    ("config.checkpoint.every", config.checkpoint.every, 1),
    ("config.rl.dynamic_sampling_rounds", config.rl.dynamic_sampling_rounds, 1),
    ("config.rl.overlong_buffer", config.rl.overlong_buffer, 0),
    ("config.sampling.cache_sizes", config.sampling.cache_sizes, 1),
    ("config.rl.oversampling", config.rl.oversampling, 0),
    ("config.rl.carry_over", config.rl.carry_over, 0),
    ("config.router.shift_floor_updates", config.router.shift_floor_updates, 0),
    ("config.diagnostics.every", config.diagnostics.every, 0),
    ("config.diagnostics.pieces", config.diagnostics.pieces, 2),
    ("config.rl.steps", config.rl.steps, 0),
    ("config.warm_start.steps", config.warm_start.steps, 0),
    ("config.data.max_prompt_tokens", config.data.max_prompt_tokens, 0),
  ):
    if value < least:
      raise ValueError(f"{what} is {value}; want {least} or more.")
  for what, value, known in (
    ("config.objective.kl_in", config.objective.kl_in, ("loss", "reward")),
    ("config.objective.baseline", config.objective.baseline, (None, *advantages.BASELINES)),
    ("config.objective.scale", config.objective.scale, (None, *advantages.SCALES)),
    ("config.router.replay", config.router.replay, ("none", "scoring", "sampler")),
    ("config.mismatch.correction", config.mismatch.correction, ("none", *mismatch.CORRECTIONS)),
  ):
    if value not in known:
      raise ValueError(f"{what} is {value!r}; want one of {', '.join(filter(None, known))}.")
  _check_rollouts(config)
  _check_evaluation(config.evaluation)
  _check_engine(config)
  return config


def _check_rollouts(config: ExperimentConfig) -> None:
  if (config.rl.oversampling or config.rl.carry_over) and not config.sampling.rows:
    raise ValueError(
      "config.rl.oversampling and carry_over need continuous batching; set config.sampling.rows, for example to half "
      f"of the {config.rl.prompts * config.rl.samples_per_prompt} completions of a step."
    )
  if config.sampling.rows and config.sampling.cache_sizes > 1:
    raise ValueError(
      f"config.sampling.rows is {config.sampling.rows} and cache_sizes {config.sampling.cache_sizes}: continuous "
      "batching keeps a cache of one size. Set cache_sizes to 1, or rows to 0."
    )
  if config.rl.oversampling >= config.rl.prompts:
    raise ValueError(
      f"config.rl.oversampling is {config.rl.oversampling}; want less than config.rl.prompts ({config.rl.prompts}), so "
      "that what is carried over can be trained on in the next step."
    )
  if config.rl.prompts % (config.rl.minibatches * config.rl.microbatches):
    raise ValueError(
      f"config.rl.prompts is {config.rl.prompts}, which does not divide into {config.rl.minibatches} minibatches of "
      f"{config.rl.microbatches} microbatches; make it a multiple of config.rl.minibatches * config.rl.microbatches."
    )
  if not 0.0 <= config.curriculum.low <= config.curriculum.high <= 1.0:
    raise ValueError(
      f"config.curriculum.low is {config.curriculum.low} and high {config.curriculum.high}; want success rates with "
      "0 <= low <= high <= 1."
    )


def _check_engine(config: ExperimentConfig) -> None:
  sampling = config.sampling
  if not sampling.engine:
    return
  if sampling.engine_kind not in ("sglang", "vllm"):
    raise ValueError(f"config.sampling.engine_kind is {sampling.engine_kind!r}; want one of sglang, vllm.")
  if not sampling.engine_folder:
    raise ValueError(
      f"config.sampling.engine is {sampling.engine!r}, but engine_folder is ''; name a folder that the engine sees "
      "too: the weights it draws with are written there before every step."
    )
  if sampling.rows:
    raise ValueError(
      f"config.sampling.engine is {sampling.engine!r} and rows is {sampling.rows}: rows are our own sampler's. Set one."
    )
  plain = (sampling.temperature, sampling.top_k, sampling.top_p) == (1.0, 0, 1.0)
  if config.mismatch.correction != "none" and not plain:
    raise ValueError(
      f"config.mismatch.correction is {config.mismatch.correction!r}, which compares log-probabilities at temperature "
      "1; of an outside engine they are known only with config.sampling.temperature=1, top_k=0 and top_p=1."
    )


def _check_evaluation(evaluation: EvaluationConfig) -> None:
  if not 0.0 < evaluation.level < 1.0 or evaluation.resamples < 1:
    raise ValueError(
      f"config.evaluation.level is {evaluation.level} and resamples {evaluation.resamples}; want a level in (0, 1), "
      "such as 0.95, and 1 or more."
    )
  settings = {"config.evaluation": evaluation}
  for name, benchmark in evaluation.benchmarks.items():
    where = f"config.evaluation.benchmarks.{name}"
    if not re.fullmatch(r"[\w-]+", name):
      raise ValueError(f"{where}: a benchmark's name is part of file names; want letters, digits, _ and -.")
    _check_known(f"{where}.data.name", benchmark.data.name, DATASETS)
    check_reward(benchmark.reward.name, benchmark.reward.options, f"{where}.reward")
    settings[where] = evaluation.of(benchmark)
  for where, found in settings.items():
    for key, least in (("samples", 1), ("batch_problems", 1), ("problems", 0)):
      if getattr(found, key) < least:
        raise ValueError(f"{where}.{key} is {getattr(found, key)}; want {least} or more.")
    if found.k and not 1 <= min(found.k) <= max(found.k) <= found.samples:
      raise ValueError(
        f"{where}.k is {found.k} with {found.samples} samples a problem; want 1 to {found.samples}: draw more samples, "
        "or ask for smaller k."
      )


def _check_known(what: str, name: str, known: Mapping[str, Any]) -> None:
  if name not in known:
    raise ValueError(f"{what} is {name!r}; want one of {', '.join(sorted(known))}.")


def read_model_config(given: Mapping[str, Any]) -> TransformerConfig:
  """A model's configuration from JSON; ValueError names an unknown key or a wrong type."""
  return _build(TransformerConfig, given, "model")


def check_divides(config: ExperimentConfig, shards: int, *, training: bool = True) -> None:
  """Every batch of the run must split evenly over the mesh; told before anything compiles.

  Args:
    shards: pieces the mesh cuts a batch into, `Layout.batch_shards`.
    training: whether the batches of training count.
  Raises:
    ValueError: names the first key that does not divide.
  """
  rl = config.rl
  rows = rl.prompts * rl.samples_per_prompt // (rl.minibatches * rl.microbatches)
  noise_rows = rl.prompts * rl.samples_per_prompt // rl.minibatches if config.diagnostics.every else 0
  of_training = (
    ("config.rl.prompts (prompts are prefilled over the mesh)", rl.prompts),
    ("config.rl.prompts * samples_per_prompt / (minibatches * microbatches)", rows),
    ("the rows of a minibatch in each of config.diagnostics.pieces", noise_rows // config.diagnostics.pieces),
    ("config.warm_start.batch_size", config.warm_start.batch_size if config.warm_start.steps else 0),
  )
  for what, count in (
    *(of_training if training else ()),
    ("config.evaluation.batch_problems", config.evaluation.batch_problems),
    *(
      (f"config.evaluation.benchmarks.{name}.batch_problems", config.evaluation.of(benchmark).batch_problems)
      for name, benchmark in config.evaluation.benchmarks.items()
    ),
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
    of_items = typing.get_args(kind)[1]
    return {
      key: _convert(of_items, item, f"{where}.{key}") if dataclasses.is_dataclass(of_items) else item
      for key, item in value.items()
    }
  if not isinstance(origin, type) or not isinstance(value, origin) or (origin is int and isinstance(value, bool)):
    name = getattr(kind, "__name__", str(kind))
    raise ValueError(f"{where} is {value!r} ({type(value).__name__}); want {name}.")
  return value
