"""The config of an experiment: dataclasses, one for each group of keys.

The library's option dataclasses are groups without any change. Groups that a single module of `experiments.setup`
reads are declared there; the others are declared here. Each dataclass checks the ranges of its own fields;
`experiments.setup.checks` checks what groups must agree on.

A config file builds an `ExperimentConfig` and returns its `config_dict` (`experiments.setup.config_flags`), in which
flags override fields by dotted names.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from experiments.setup.optimizer import OptimizerConfig
from experiments.setup.ranges import check_at_least
from experiments.setup.runtime import RuntimeConfig
from experiments.setup.weight_sync import EngineConfig
from models.config import TransformerConfig
from rspo_jax.data.curriculum import CurriculumOptions
from rspo_jax.objectives.advantages import AdvantageOptions
from rspo_jax.objectives.mismatch import MismatchOptions
from rspo_jax.rl_step import RLOptions
from rspo_jax.rollout.collector import CollectorOptions
from rspo_jax.rollout.token_sampling import SamplingOptions
from rspo_jax.router.shift import ShiftOptions
from rspo_jax.training.loss import UpdateOptions


def _mapping() -> Any:
  return dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """The data set (docs/data.md).

  Attributes:
    name: a key of `rspo_jax.data.DATASETS`, or the dotted path "package.module:function" of a loader.
    data_dir: the folder of the data. '': for generated data sets a folder in the user's cache folder, for "files" the
      working directory, for a loader of the user's own its default.
    options: keyword arguments of the loader.
    chat: render prompts as user messages by the tokenizer's chat template.
    system: the system message before them; '' is none. Only with `chat`.
    max_prompt_tokens: leave out examples whose prompt, with the chat template, has more tokens; 0 keeps all.
  """

  name: str = "countdown"
  data_dir: str = ""
  options: Mapping[str, Any] = _mapping()
  chat: bool = False
  system: str = ""
  max_prompt_tokens: int = 0

  def __post_init__(self):
    check_at_least(self, max_prompt_tokens=0)


@dataclasses.dataclass(frozen=True)
class Named:
  """A name and its options.

  Attributes:
    name: an entry of the table that the key reads, or a dotted path "package.module:name" of the user's own.
    options: keyword arguments of the function or class behind the name.
  """

  name: str
  options: Mapping[str, Any] = _mapping()


@dataclasses.dataclass(frozen=True)
class WarmStartConfig:
  """Supervised steps on demonstrations before RL.

  Attributes:
    steps: updates; 0 skips the warm start.
    batch_size: demonstrations per update, >= 1.
    wrong_fraction: probability, in [0, 1], that a demonstration is replaced by the example's incorrect one. Well-formed
      incorrect answers leave success for RL to improve.
    optimizer: of the warm start. RL starts with a new optimizer state.
  """

  steps: int = 0
  batch_size: int = 64
  wrong_fraction: float = 0.0
  optimizer: OptimizerConfig = OptimizerConfig()

  def __post_init__(self):
    check_at_least(self, steps=0, batch_size=1)
    if not 0.0 <= self.wrong_fraction <= 1.0:
      raise ValueError(f"wrong_fraction is {self.wrong_fraction}; want a probability in [0, 1].")


@dataclasses.dataclass(frozen=True)
class DiagnosticsConfig:
  """The costly diagnostics: gradient noise and replay attribution (`rspo_jax.training.attribution`).

  Attributes:
    every: RL steps between them; 0 is never.
    pieces: equal parts of a minibatch whose gradients the noise is estimated from, >= 2.
  """

  every: int = 0
  pieces: int = 4

  def __post_init__(self):
    check_at_least(self, every=0, pieces=2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
  """How a benchmark is completed. None in a benchmark means the setting of `config.evaluation`.

  Attributes:
    problems: number of problems, the first ones of the benchmark; 0 is all.
    samples: n, completions of each problem, >= 1.
    k: of pass@k and maj@k, each in [1, n]; () is the powers of two up to n, and n.
    greedy: also sample one greedy completion of each problem.
    batch_problems: problems per call of the sampler, a multiple of the mesh's batch shards.
    temperature, top_k, top_p, max_new_tokens: of the n samples, as in `SamplingOptions`. None in `config.evaluation`
      means the setting of `config.sampling`.
  """

  problems: int | None = None
  samples: int | None = None
  k: tuple[int, ...] | None = None
  greedy: bool | None = None
  batch_problems: int | None = None
  temperature: float | None = None
  top_k: int | None = None
  top_p: float | None = None
  max_new_tokens: int | None = None

  def __post_init__(self):
    bounds = {"problems": 0, "samples": 1, "batch_problems": 1}
    check_at_least(self, **{name: least for name, least in bounds.items() if getattr(self, name) is not None})


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig(EvaluationSettings):
  """A benchmark: the test split of a data set. Its settings override those of `EvaluationConfig`.

  Attributes:
    data: the data set. Its data_dir, chat and system are those of `config.data` if they are not set.
    reward: scores the completions.
    group: name of the group that the benchmark is averaged in.
  """

  data: DataConfig = DataConfig()
  reward: Named = Named("countdown")
  group: str = "average"


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig(EvaluationSettings):
  """Evaluation on problems that the policy is not trained on (docs/evaluation.md).

  Attributes:
    every: RL steps between evaluations; 0 is none in between. The policy is always evaluated before and after RL.
    benchmarks: name -> benchmark; {} evaluates the test split of `config.data` with `config.reward`.
    level: of the confidence intervals, in (0, 1). resamples: of their bootstrap, >= 1.
  """

  problems: int = 0
  samples: int = 8
  k: tuple[int, ...] = ()
  greedy: bool = True
  batch_problems: int = 128
  every: int = 0
  benchmarks: Mapping[str, BenchmarkConfig] = _mapping()
  level: float = 0.95
  resamples: int = 10_000

  def __post_init__(self):
    super().__post_init__()
    check_at_least(self, every=0)
    if not 0.0 < self.level < 1.0 or self.resamples < 1:
      raise ValueError(
        f"level is {self.level} and resamples {self.resamples}; want a level in (0, 1), such as 0.95, and 1 or more "
        "resamples."
      )

  def of(self, benchmark: BenchmarkConfig) -> "EvaluationConfig":
    """These settings, overridden by those that the benchmark sets."""
    own = {field.name: getattr(benchmark, field.name) for field in dataclasses.fields(EvaluationSettings)}
    return dataclasses.replace(self, **{name: value for name, value in own.items() if value is not None})


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """When checkpoints are saved. One is also saved after every evaluation and on SIGTERM.

  Attributes:
    every: updates of the warm start, or RL steps, between checkpoints, >= 1.
    keep: number of newest checkpoints to keep, >= 1. The best one by held-out success is kept too.
  """

  every: int = 50
  keep: int = 2

  def __post_init__(self):
    check_at_least(self, every=1, keep=1)


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
  """A whole run.

  Groups that may be None have a key "on": `--config.shift.on=false` is the base objective. Setting any field of a group
  that is None, such as `--config.mismatch.correction=tis`, switches the group on.

  Attributes:
    seed: of all random numbers but those of generated data sets (`data.options.seed`), in [0, 2**32).
    model: the transformer of `config.policy.name` "transformer"; None for any other policy. `experiments.evaluate`
      takes unset fields from the checkpoint.
    steps: RL steps; 0 only warm starts and evaluates.
    policy: "transformer", this repository's, described by `config.model`; or the dotted path of a function
      (layout, **options) -> `rspo_jax.Policy` (docs/library.md).
    pretrained: source of the initial parameters: a Hugging Face folder, a folder of `experiments.convert`, or the
      workdir of another run. '' initialises them at random. With `model.lora.rank` > 0 they are frozen, and adapters
      are trained.
    tokenizer: a folder with a `tokenizer.json`; "bytes", one token for each byte of UTF-8; or '', one token for each
      character of the data set (`rspo_jax.data.ALPHABETS`).
    reward: an entry of `rspo_jax.rewards.REWARDS` (docs/rewards.md).
    engine: a remote inference engine; None samples in this process.
    curriculum: chooses problems by their success rate; None takes all.
    objective: an entry of `rspo_jax.objectives.OBJECTIVES` (docs/algorithms.md); options that are not set have their
      defaults.
    shift: router shift; None is off.
    mismatch: correction for a sampler that differs from the trainer; None is off.
    optimizer: of RL.
  """

  seed: int
  model: TransformerConfig | None
  steps: int = 100
  policy: Named = Named("transformer")
  pretrained: str = ""
  tokenizer: str = ""
  data: DataConfig = DataConfig()
  reward: Named = Named("countdown")
  sampling: SamplingOptions = SamplingOptions(max_new_tokens=16, samples_per_prompt=8)
  engine: EngineConfig | None = None
  collector: CollectorOptions = CollectorOptions()
  curriculum: CurriculumOptions | None = None
  objective: Named = Named("gmpo")
  advantage: AdvantageOptions = AdvantageOptions()
  shift: ShiftOptions | None = ShiftOptions()
  mismatch: MismatchOptions | None = None
  loss: UpdateOptions = UpdateOptions()  # not named `update`, because ConfigDict has a method of that name
  rl: RLOptions = RLOptions()
  optimizer: OptimizerConfig = OptimizerConfig()
  warm_start: WarmStartConfig = WarmStartConfig()
  diagnostics: DiagnosticsConfig = DiagnosticsConfig()
  evaluation: EvaluationConfig = EvaluationConfig()
  checkpoint: CheckpointConfig = CheckpointConfig()
  runtime: RuntimeConfig = RuntimeConfig()

  def __post_init__(self):
    check_at_least(self, steps=0)
    if not 0 <= self.seed < 2**32:
      raise ValueError(f"seed is {self.seed}; want a whole number in [0, 2**32).")
