r"""The mathematics benchmarks of the RSPO paper, and HumanEval as a group of its own, on any checkpoint.

What it shows: avg@n, pass@k and maj@k with confidence intervals, per benchmark and averaged as the paper does. What it
costs: 7,388 completions of up to 3,072 tokens and 1,517 greedy ones.

python -m experiments.evaluate --config=experiments/configs/evaluate_math.py --checkpoint=FOLDER --workdir=evaluations/a

`--config.data.data_dir` is the folder of the files (aime24.jsonl, amc23.jsonl, math500.jsonl, minerva_math.jsonl,
olympiadbench.jsonl, humaneval.jsonl.gz), `--config.data.chat=true` writes prompts in the checkpoint's chat template.
After a colon stands which benchmarks are wanted: evaluate_math.py:aime24,amc23; all five of mathematics by default.
"""

from ml_collections import config_dict as ml_config_dict

from experiments.config import (
  BenchmarkConfig,
  DataConfig,
  EvaluationConfig,
  ExperimentConfig,
  Named,
)
from experiments.setup.config_flags import config_dict
from rspo_jax.rollout import SamplingOptions

ASK = "{%s}\nPlease reason step by step, and put your final answer within \\boxed{{}}."


def mathematics(file, prompt="problem", gold="answer", samples=4, **options):
  files = {"test": file, "prompt": ASK % prompt, "gold": gold, **options}
  return BenchmarkConfig(DataConfig("files", options=files), Named("math"), group="mathematics", samples=samples)


BENCHMARKS = {
  "aime24": mathematics("aime24.jsonl", samples=32),
  "amc23": mathematics("amc23.jsonl", samples=16),
  "math500": mathematics("math500.jsonl"),
  "minerva": mathematics("minerva_math.jsonl", gold="solution", gold_from="boxed"),
  "olympiadbench": mathematics("olympiadbench.jsonl", prompt="question", gold="final_answer"),
  "humaneval": BenchmarkConfig(
    DataConfig("files", options={"test": "humaneval.jsonl.gz", "prompt": "prompt", "gold": ""}),
    Named("code"),
    group="code",
    samples=16,
  ),
}
DEFAULT = ",".join(name for name, benchmark in BENCHMARKS.items() if benchmark.group == "mathematics")


def get_config(names: str = DEFAULT):
  wanted = names.split(",")
  if unknown := [name for name in wanted if name not in BENCHMARKS]:
    raise ValueError(f"there is no benchmark {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}.")
  config = ExperimentConfig(
    seed=0,
    model=None,  # the checkpoint's
    steps=0,
    data=DataConfig("files", data_dir="../shared/data"),
    sampling=SamplingOptions(max_new_tokens=3072, rows=256),
    evaluation=EvaluationConfig(benchmarks={name: BENCHMARKS[name] for name in wanted}, batch_problems=64),
  )
  given = config_dict(config)
  del given.model
  # How it runs is not the checkpoint's to say.
  given.model = {name: ml_config_dict.placeholder(str) for name in ("dtype", "cache_dtype", "expert_backend")}
  return given
