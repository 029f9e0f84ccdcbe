"""What an experiment is made of. A config file's ConfigDict becomes these frozen dataclasses at the boundary."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from models.config import TransformerConfig


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Where the problems come from (docs/data.md).

  Attributes:
    name: of `DATASETS`. data_dir: where it is kept; '' is the user's cache folder for data sets that are made here, the
      working directory for files. options: the data set's own.
    chat: prompts are what a user says, written as the tokenizer's chat template wants it. system: what stands before
      that as the system's message; '' for none.
    max_prompt_tokens: examples with a longer prompt, chat template included, are left out; 0 keeps all.
  """

  name: str = "countdown"
  data_dir: str = ""
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  chat: bool = False
  system: str = ""
  max_prompt_tokens: int = 0


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
  """See `rspo_jax.rollout.sampling.SamplingOptions`; the stop tokens are the tokenizer's.

  Attributes:
    rows: decoded at once by continuous batching (`rspo_jax.rollout.continuous`), which pays where lengths differ much;
      0 decodes all completions of a call together.
    cache_sizes: of the cache when all are decoded together; more of them speed up long completions and compile longer.
    engine: root of an outside engine's server, several with commas; '' draws here (docs/remote_engine.md).
    engine_kind: "sglang" or "vllm", how it is told of new weights. engine_folder: where these are written for it, as a
      Hugging Face folder that it sees under the same path. engine_model: the model's name in requests; '' for none.
    engine_timeout: seconds that a completion may take.
  """

  max_new_tokens: int = 16
  rows: int = 0
  cache_sizes: int = 1
  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  engine: str = ""
  engine_kind: str = "sglang"
  engine_folder: str = ""
  engine_model: str = ""
  engine_timeout: float = 600.0


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
  """What is maximised. A field that is not given takes the default of the named objective (`docs/algorithms.md`).

  Attributes:
    name: of `rspo_jax.objectives.OBJECTIVES`.
    eps_low, eps_high: clip bounds in the objective's own unit (gmpo: nats, else ratio).
    dual_clip: largest ratio for negative advantages (the GRPO family). tau_pos, tau_neg: sharpness of sapo's gate.
    bounds: cispo's ("around_one", "absolute") or gmpo's ("ratio", "signed") reading of eps. ratio: rloo's, "sequence",
      "token" or "none". length_epsilon: gmpo's, added to a row's number of tokens.
    aggregation: of `rspo_jax.objectives.aggregation.AGGREGATIONS`. norm_length: tokens, for "seq_mean_token_sum_norm";
      by default the longest completion.
    baseline, scale: of the advantages (`rspo_jax.objectives.advantages`). std_epsilon: added to a group's deviation.
      ddof: its.
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
    placement, deviation, layers, level: see `rspo_jax.router.shift.ShiftOptions`.
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
  """Correction for a sampler that is not the trainer, off by default: see
  `rspo_jax.objectives.mismatch.MismatchOptions`.
  """

  correction: str = "none"
  level: str = "token"
  upper: float = 2.0
  lower: float = 0.5


@dataclasses.dataclass(frozen=True)
class CurriculumConfig:
  """RL samples problems whose success rate lies in [low, high], and those that were not sampled yet. 0 and 1 is off.

  Attributes:
    memory, retry_epochs, max_skipped: see `rspo_jax.data.curriculum.Curriculum`.
  """

  low: float = 0.0
  high: float = 1.0
  memory: float = 0.5
  retry_epochs: int = 4
  max_skipped: int = 64

  @property
  def on(self) -> bool:
    return (self.low, self.high) != (0.0, 1.0)


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
      is no dynamic sampling.
    oversampling: prompts that are sampled beside the P; the step ends when P groups are through (continuous batching).
    carry_over: RL steps that what is left then may be older than the update; it goes on in the next step. 0 throws it
      away.
    mask_truncated: completions without a stop token count for the baseline but are not trained on (DAPO).
    overlong_buffer: tokens before the length limit over which a completion's reward falls by
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
  oversampling: int = 0
  carry_over: int = 0
  mask_truncated: bool = False
  overlong_buffer: int = 0
  overlong_penalty: float = 1.0
  frozen: tuple[str, ...] = ()
  optimizer: OptimizerConfig = OptimizerConfig()


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig:
  """Held-out problems with a name, the test split of a data set.

  Attributes:
    data: data_dir, chat and system are those of `config.data` where they are not set. reward: judges its completions.
    group: benchmarks are averaged with those of their group.
    all others: as in `EvaluationConfig`, for this benchmark alone.
  """

  data: DataConfig = DataConfig()
  reward: RewardConfig = RewardConfig()
  group: str = "average"
  problems: int | None = None
  samples: int | None = None
  k: tuple[int, ...] | None = None
  greedy: bool | None = None
  batch_problems: int | None = None
  temperature: float | None = None
  top_k: int | None = None
  top_p: float | None = None
  max_new_tokens: int | None = None


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
  """How good the policy is on problems it was not trained on. docs/evaluation.md.

  Attributes:
    every: RL steps between evaluations; before and after RL they always happen.
    benchmarks: by name; without any, the test split of `config.data` under `config.reward` is the one.
    problems: of each benchmark, the first so many; 0 for all.
    samples: n completions of each. k: of pass@k and maj@k, each up to n; () is the powers of two and n.
    greedy: one greedy completion as well. batch_problems: problems per sampler call.
    temperature, top_k, top_p, max_new_tokens: of the samples; what is not given is as in `config.sampling`.
    level: of the confidence intervals. resamples: of their bootstrap.
  """

  every: int = 0
  benchmarks: Mapping[str, BenchmarkConfig] = dataclasses.field(default_factory=dict)
  problems: int = 0
  samples: int = 8
  k: tuple[int, ...] = ()
  greedy: bool = True
  batch_problems: int = 128
  temperature: float | None = None
  top_k: int | None = None
  top_p: float | None = None
  max_new_tokens: int | None = None
  level: float = 0.95
  resamples: int = 10_000

  def of(self, benchmark: BenchmarkConfig) -> "EvaluationConfig":
    """The settings of a benchmark: its own where it has some."""
    own = {field.name: getattr(benchmark, field.name, None) for field in dataclasses.fields(self)}
    return dataclasses.replace(self, **{name: value for name, value in own.items() if value is not None})


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
    tokenizer: a folder with a `tokenizer.json`; 'bytes' has a token for each byte of UTF-8; '' has one for
      each character of the data set (`rspo_jax.data.datasets.ALPHABETS`).
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
  curriculum: CurriculumConfig = CurriculumConfig()
  diagnostics: DiagnosticsConfig = DiagnosticsConfig()
  evaluation: EvaluationConfig = EvaluationConfig()
  checkpoint: CheckpointConfig = CheckpointConfig()
  runtime: RuntimeConfig = RuntimeConfig()
