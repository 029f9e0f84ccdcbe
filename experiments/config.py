"""F4: what an experiment is made of. A config file's ConfigDict becomes these frozen dataclasses at the boundary."""

import dataclasses
import difflib
import typing
from collections.abc import Mapping
from typing import Any

import ml_collections

from models.config import TransformerConfig
from rspo_jax import advantages, mismatch, objectives
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
  """See `rspo_jax.sampling.SamplingOptions`; the stop tokens are the tokenizer's.

  Attributes:
    rows: decoded at once by continuous batching (`rspo_jax.continuous`), which pays where lengths differ much; 0
      decodes all completions of a call together.
  """

  max_new_tokens: int = 16
  rows: int = 0
  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
  """What is maximised. A field that is not given takes the default of the named objective (`docs/algorithms.md`).

  Attributes:
    name: of `rspo_jax.objectives.OBJECTIVES`.
    eps_low, eps_high: clip bounds in the objective's own unit (gmpo: nats, else ratio).
    dual_clip: largest ratio for negative advantages (the GRPO family). tau_pos, tau_neg: sharpness of sapo's gate.
    bounds: cispo's ("around_one", "absolute") or gmpo's ("ratio", "signed") reading of eps. ratio: rloo's, "sequence",
      "token" or "none". length_epsilon: gmpo's, added to a row's number of tokens.
    aggregation: of `rspo_jax.aggregation.AGGREGATIONS`. norm_length: tokens, for "seq_mean_token_sum_norm"; by default
      the longest completion.
    baseline, scale: of the advantages (`rspo_jax.advantages`). std_epsilon: added to a group's deviation. ddof: its.
    kl_coefficient: of the KL to the policy that RL began with, per nat; 0 is off. kl_estimator: k1, k2 or k3.
      kl_in: "loss"; or "reward", taken off the reward of a completion, or with scale "batch_std" off the return of
      every token (REINFORCE++).
    entropy_coefficient: of an entropy bonus, per nat.
  """

  name: str = "gmpo"
  eps_low: float | None = None
  eps_high: float | None = None
  dual_clip: float | None = None
  tau_pos: float | None = None
  tau_neg: float | None = None
  bounds: str | None = None
  ratio: str | None = None
  length_epsilon: float | None = None
  aggregation: str | None = None
  norm_length: int | None = None
  baseline: str | None = None
  scale: str | None = None
  ddof: int = 1
  std_epsilon: float = 1e-6
  kl_coefficient: float = 0.0
  kl_estimator: str = "k3"
  kl_in: str = "loss"
  entropy_coefficient: float = 0.0


@dataclasses.dataclass(frozen=True)
class RouterConfig:
  """What is done about the router. Everything but router shift is off by default.

  Attributes:
    shift: RSPO's gamma on or off. shift_floor: gamma_min, in (0, 1]. shift_floor_start, shift_floor_updates: begin at
      another floor and move there linearly over so many updates of RL; 0 updates is a constant floor.
    placement, deviation, layers, level: see `rspo_jax.router_shift.ShiftOptions`.
    replay: "none"; "scoring" (R2), the update repeats the experts of the forward that gave the old log-probs; "sampler"
      (R3), scoring and update repeat the experts of the sampler. replay_gates: the gates of scoring too.
    freeze: the routers are not trained. learning_rate_multiplier: theirs over everybody else's.
    load_balance, z_loss: coefficients of the auxiliary losses. bias_rate: step of the bias on the experts' choice.
  """

  shift: bool = True
  shift_floor: float = 0.8
  shift_floor_start: float = 1.0
  shift_floor_updates: int = 0
  placement: str = "before_clip"
  deviation: str = "abs"
  layers: str = "mean"
  level: str = "token"
  replay: str = "none"
  replay_gates: bool = False
  freeze: bool = False
  learning_rate_multiplier: float = 1.0
  load_balance: float = 0.0
  z_loss: float = 0.0
  bias_rate: float = 0.0


@dataclasses.dataclass(frozen=True)
class MismatchConfig:
  """Correction for a sampler that is not the trainer, off by default: see `rspo_jax.mismatch.MismatchOptions`."""

  correction: str = "none"
  level: str = "token"
  upper: float = 2.0
  lower: float = 0.5


@dataclasses.dataclass(frozen=True)
class DiagnosticsConfig:
  """every: RL steps between the costly diagnostics (gradient noise, replay probe); 0 is never. pieces: a minibatch is
  cut into for the gradient noise."""

  every: int = 0
  pieces: int = 4


@dataclasses.dataclass(frozen=True)
class RLConfig:
  """One RL step: sample, reward, score, then epochs * minibatches updates.

  Attributes:
    steps: RL steps. prompts: P per step. samples_per_prompt: G.
    minibatches: parts a rollout is cut into, one update each. epochs: passes over them.
    microbatches: parts a minibatch is cut into to save memory. logits_chunk: positions whose logits are held at once.
    dynamic_sampling_rounds: batches of prompts sampled at most until enough groups have rewards that differ (DAPO); 1
      is no dynamic sampling. overlong_buffer: tokens before the length limit over which a completion's reward falls by
      up to overlong_penalty; 0 is off.
    frozen: patterns of parameter paths that are not trained.
  """

  steps: int = 100
  prompts: int = 32
  samples_per_prompt: int = 8
  minibatches: int = 4
  epochs: int = 1
  microbatches: int = 1
  logits_chunk: int = 128
  dynamic_sampling_rounds: int = 1
  overlong_buffer: int = 0
  overlong_penalty: float = 1.0
  frozen: tuple[str, ...] = ()
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
  """A whole run.

  Attributes:
    pretrained: where the parameters come from: a Hugging Face folder, one of `experiments.convert`, or another run's
      workdir; '' draws them at random. With `model.lora.rank` above 0 they stay as they are, and adapters are trained.
    tokenizer: a folder with a `tokenizer.json`; '' is the character tokenizer of Countdown.
  """

  seed: int
  model: TransformerConfig
  pretrained: str = ""
  tokenizer: str = ""
  data: DataConfig = DataConfig()
  reward: RewardConfig = RewardConfig()
  sampling: SamplingConfig = SamplingConfig()
  objective: ObjectiveConfig = ObjectiveConfig()
  router: RouterConfig = RouterConfig()
  mismatch: MismatchConfig = MismatchConfig()
  warm_start: WarmStartConfig = WarmStartConfig()
  rl: RLConfig = RLConfig()
  diagnostics: DiagnosticsConfig = DiagnosticsConfig()
  evaluation: EvaluationConfig = EvaluationConfig()
  checkpoint: CheckpointConfig = CheckpointConfig()
  runtime: RuntimeConfig = RuntimeConfig()


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
