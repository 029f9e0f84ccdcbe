"""F4: what an experiment is made of. A config file's ConfigDict becomes these frozen dataclasses at the boundary."""

import dataclasses
import difflib
import typing
from collections.abc import Mapping
from typing import Any

import ml_collections

from models.config import TransformerConfig
from rspo_jax import objectives
from rspo_jax.data import DATASETS
from rspo_jax.rewards import REWARDS


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """name: of `DATASETS`. data_dir: where it is kept; '' is the user's cache folder. options: the data set's own."""

  name: str = "countdown"
  data_dir: str = ""
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class RewardConfig:
  """name: of `REWARDS`. options: the reward's own."""

  name: str = "countdown"
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """AdamW under a schedule: linear warm-up, then a cosine to `final_fraction` of the learning rate.

  Attributes:
    learning_rate: at its height. warmup_steps: updates until there. final_fraction: of it left at the last update.
    max_grad_norm: longer gradients are scaled down to this global norm.
  """

  learning_rate: float = 1e-3
  warmup_steps: int = 20
  final_fraction: float = 1.0
  b1: float = 0.9
  b2: float = 0.99
  weight_decay: float = 0.0
  max_grad_norm: float = 1.0


@dataclasses.dataclass(frozen=True)
class WarmStartConfig:
  """Supervised steps on demonstrations before RL.

  Attributes:
    steps: updates; 0 skips the warm start. batch_size: demonstrations an update.
    wrong_fraction: share of demonstrations replaced by a well-formed wrong one, so that RL has something to repair.
  """

  steps: int = 0
  batch_size: int = 64
  wrong_fraction: float = 0.0
  optimizer: OptimizerConfig = OptimizerConfig()


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
  """See `rspo_jax.sampling.SamplingOptions`; the stop token is the tokenizer's."""

  max_new_tokens: int = 16
  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
  """See `rspo_jax.objectives`.

  Attributes:
    name: grpo, gspo or gmpo. eps_low, eps_high: clip bounds in the objective's own unit (gmpo: nats, else ratio).
    aggregation: how tokens and rows are averaged.
    router_shift: RSPO's gamma on or off. shift_floor: gamma_min, in (0, 1]. placement: before_clip or after_clip.
    normalize_std: divide advantages by their group's standard deviation.
  """

  name: str = "gmpo"
  eps_low: float = 0.4
  eps_high: float = 0.4
  aggregation: str = "sequence_mean_token_mean"
  router_shift: bool = True
  shift_floor: float = 0.8
  placement: str = "before_clip"
  normalize_std: bool = True


@dataclasses.dataclass(frozen=True)
class RLConfig:
  """One RL step: sample, reward, score, then epochs * minibatches updates.

  Attributes:
    steps: RL steps. prompts: P per step. samples_per_prompt: G.
    minibatches: parts a rollout is cut into, one update each. epochs: passes over them.
    microbatches: parts a minibatch is cut into to save memory. logits_chunk: positions whose logits are held at once.
  """

  steps: int = 100
  prompts: int = 32
  samples_per_prompt: int = 8
  minibatches: int = 4
  epochs: int = 1
  microbatches: int = 1
  logits_chunk: int = 128
  optimizer: OptimizerConfig = OptimizerConfig()


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
  """every: RL steps between evaluations on held-out problems; before and after RL they always happen.
  problems: how many of them, 0 for all. samples: k of avg@k at temperature 1. batch_problems: per sampler call."""

  every: int = 0
  problems: int = 0
  samples: int = 8
  batch_problems: int = 128


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """every: updates (warm start) or steps (RL) between checkpoints. keep: newest ones kept, beside the best."""

  every: int = 50
  keep: int = 2


@dataclasses.dataclass(frozen=True)
class RuntimeConfig:
  """Where it runs.

  Attributes:
    mesh: sizes of 'data', 'fsdp', 'expert', 'tensor'; one may be -1 for the devices that are left.
    cpu_devices: virtual devices on a CPU; 0 is one per core.
    distributed: call `jax.distributed.initialize()` (a TPU pod or a cluster); fails loudly if it cannot.
    compilation_cache: folder of compiled programs; 'default' is in the user's cache folder, '' is off.
  """

  mesh: Mapping[str, int] = dataclasses.field(default_factory=lambda: {"data": -1})
  cpu_devices: int = 0
  distributed: bool = False
  compilation_cache: str = "default"


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
  """A whole run."""

  seed: int
  model: TransformerConfig
  data: DataConfig = DataConfig()
  reward: RewardConfig = RewardConfig()
  sampling: SamplingConfig = SamplingConfig()
  objective: ObjectiveConfig = ObjectiveConfig()
  warm_start: WarmStartConfig = WarmStartConfig()
  rl: RLConfig = RLConfig()
  evaluation: EvaluationConfig = EvaluationConfig()
  checkpoint: CheckpointConfig = CheckpointConfig()
  runtime: RuntimeConfig = RuntimeConfig()


def config_dict(config: ExperimentConfig) -> ml_collections.ConfigDict:
  """The dataclasses as a ConfigDict, so that flags can override every field by its dotted name."""
  return ml_collections.ConfigDict(dataclasses.asdict(config))


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
  return config


def check_divides(config: ExperimentConfig, shards: int) -> None:
  """Every batch of the run must split evenly over the mesh; told before anything compiles.

  Args:
    shards: pieces the mesh cuts a batch into, `Layout.batch_shards`.
  Raises:
    ValueError: names the first key that does not divide.
  """
  rl = config.rl
  rows = rl.prompts * rl.samples_per_prompt // (rl.minibatches * rl.microbatches)
  for what, count in (
    ("config.rl.prompts (prompts are prefilled over the mesh)", rl.prompts),
    ("config.rl.prompts * samples_per_prompt / (minibatches * microbatches)", rows),
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
