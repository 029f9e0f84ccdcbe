"""What an experiment is made of. The library's option dataclasses are groups of it as they are.

Groups that one module of `experiments.setup` reads are declared there; here are the others.

A config file builds an `ExperimentConfig` and returns `config_dict` of it; flags override its fields by dotted names.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from experiments.setup.optimizer import OptimizerConfig
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
  """Where the problems come from (docs/data.md).

  Attributes:
    name: of `rspo_jax.data.DATASETS`, or the dotted path of a loader. options: the data set's own.
    data_dir: the folder of the data; '' is the user's cache folder for generated data sets, the working directory for
      files.
    chat: prompts are user messages, rendered by the tokenizer's chat template. system: the system message before them;
      '' for none.
    max_prompt_tokens: examples with a longer prompt, chat template included, are left out; 0 keeps all.
  """

  name: str = "countdown"
  data_dir: str = ""
  options: Mapping[str, Any] = _mapping()
  chat: bool = False
  system: str = ""
  max_prompt_tokens: int = 0


@dataclasses.dataclass(frozen=True)
class Named:
  """An entry of a table, or something of the user's by its dotted path "package.module:name", and its own options."""

  name: str
  options: Mapping[str, Any] = _mapping()


@dataclasses.dataclass(frozen=True)
class WarmStartConfig:
  """Supervised steps on demonstrations before RL.

  Attributes:
    steps: updates; 0 skips the warm start. batch_size: demonstrations per update.
    wrong_fraction: share of demonstrations replaced by a well-formed incorrect one, so that RL has something to repair.
  """

  steps: int = 0
  batch_size: int = 64
  wrong_fraction: float = 0.0
  optimizer: OptimizerConfig = OptimizerConfig()


@dataclasses.dataclass(frozen=True)
class DiagnosticsConfig:
  """every: RL steps between the costly diagnostics (gradient noise, replay attribution); 0 is never. pieces: parts of a
  minibatch for the gradient noise."""

  every: int = 0
  pieces: int = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
  """How a benchmark is completed.

  Attributes:
    problems: of the benchmark, the first ones; 0 for all.
    samples: n completions of each. k: of pass@k and maj@k, each up to n; () is the powers of two and n.
    greedy: one greedy completion as well. batch_problems: problems per sampler call.
    temperature, top_k, top_p, max_new_tokens: of the samples; None is as in `config.sampling`.
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


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig(EvaluationSettings):
  """Held-out problems with a name, the test split of a data set. Its settings override those of `EvaluationConfig`.

  Attributes:
    data: data_dir, chat and system are those of `config.data` where they are not set. reward: scores its completions.
    group: benchmarks are averaged with those of their group.
  """

  data: DataConfig = DataConfig()
  reward: Named = Named("countdown")
  group: str = "average"


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig(EvaluationSettings):
  """How good the policy is on problems it was not trained on (docs/evaluation.md).

  Attributes:
    every: RL steps between evaluations; before and after RL they always happen.
    benchmarks: by name; without any, the test split of `config.data` under `config.reward` is the one.
    level: of the confidence intervals. resamples: of their bootstrap.
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

  def of(self, benchmark: BenchmarkConfig) -> "EvaluationConfig":
    """The settings of a benchmark: its own where they are set."""
    own = {field.name: getattr(benchmark, field.name) for field in dataclasses.fields(EvaluationSettings)}
    return dataclasses.replace(self, **{name: value for name, value in own.items() if value is not None})


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """every: updates (warm start) or steps (RL) between checkpoints. keep: newest ones kept, beside the best."""

  every: int = 50
  keep: int = 2


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
  """A whole run. Groups that may be None have a flag `.on`: `--config.shift.on=false` is the base objective; setting
  any field of a group that is off, such as `--config.mismatch.correction=tis`, switches it on.

  Attributes:
    steps: RL steps.
    policy: "transformer", ours, described by `config.model`; or a function (layout, **options) -> `rspo_jax.Policy`,
      for which `config.model` is not read (docs/library.md).
    reward: of `rspo_jax.rewards.REWARDS` (docs/rewards.md).
    objective: of `rspo_jax.objectives.OBJECTIVES` (docs/algorithms.md); an option that is not set has its default.
    pretrained: where the parameters come from: a Hugging Face folder, one of `experiments.convert`, or another run's
      workdir; '' initialises them at random. With `model.lora.rank` above 0 they are frozen, and adapters are trained.
    tokenizer: a folder with a `tokenizer.json`; 'bytes' has a token for each byte of UTF-8; '' has one for each
      character of the data set (`rspo_jax.data.ALPHABETS`).
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
  loss: UpdateOptions = UpdateOptions()
  rl: RLOptions = RLOptions()
  optimizer: OptimizerConfig = OptimizerConfig()
  warm_start: WarmStartConfig = WarmStartConfig()
  diagnostics: DiagnosticsConfig = DiagnosticsConfig()
  evaluation: EvaluationConfig = EvaluationConfig()
  checkpoint: CheckpointConfig = CheckpointConfig()
  runtime: RuntimeConfig = RuntimeConfig()
