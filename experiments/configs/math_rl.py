r"""RSPO on grade-school mathematics from local files: GSM8K, scored with math-verify.

What it shows: prompts and gold answers by the names of fields, with the math reward (docs/data.md has the settings for
other files). With a FOLDER, a public checkpoint with a chat template is trained; it costs what the model costs. Without
one, a tiny model over bytes goes through the same loop in a minute on a CPU. It learns no mathematics; it shows whether
the files fit.

DATA is the folder with gsm8k_train.jsonl and gsm8k.jsonl.

python -m experiments.train --config=experiments/configs/math_rl.py:FOLDER --workdir=runs/math \
  --config.data.data_dir=DATA
"""

from experiments.config import (
  CheckpointConfig,
  DataConfig,
  EvaluationConfig,
  ExperimentConfig,
  Named,
  OptimizerConfig,
)
from experiments.setup.config_flags import config_dict
from experiments.setup.model_files import read_model
from models.config import tiny_moe
from rspo_jax.rl_step import RLOptions
from rspo_jax.rollout import SamplingOptions
from rspo_jax.rollout.collector import CollectorOptions

FILES = {
  "train": "gsm8k_train.jsonl",
  "test": "gsm8k.jsonl",
  "prompt": "{question}\nReason step by step, and put your answer in \\boxed{{}}.",
  "gold": "answer",
  "gold_from": "####",
  "limit": 0,
}


def get_config(folder: str = ""):
  return config_dict(checkpoint(folder) if folder else tiny())


def checkpoint(folder: str) -> ExperimentConfig:
  return ExperimentConfig(
    seed=0,
    model=read_model(folder, remat=True),
    pretrained=folder,
    tokenizer=folder,
    data=DataConfig(name="files", options=FILES, chat=True, max_prompt_tokens=256),
    reward=Named(name="math"),
    sampling=SamplingOptions(max_new_tokens=1024, samples_per_prompt=8),
    steps=200,
    collector=CollectorOptions(prompts=64, overlong_buffer=128),
    rl=RLOptions(minibatches=4),
    optimizer=OptimizerConfig(learning_rate=1e-6, warmup_steps=20),
    evaluation=EvaluationConfig(every=20, problems=512, samples=1, batch_problems=64),
    checkpoint=CheckpointConfig(every=20),
  )


def tiny() -> ExperimentConfig:
  return ExperimentConfig(
    seed=0,
    model=tiny_moe(
      257,
      hidden_size=32,
      num_hidden_layers=2,
      num_attention_heads=2,
      num_key_value_heads=1,
      num_experts=4,
      moe_intermediate_size=32,
    ),
    tokenizer="bytes",
    data=DataConfig(name="files", options=FILES, max_prompt_tokens=256),
    reward=Named(name="math"),
    sampling=SamplingOptions(max_new_tokens=16, samples_per_prompt=4),
    steps=2,
    collector=CollectorOptions(prompts=8),
    rl=RLOptions(minibatches=2),
    optimizer=OptimizerConfig(warmup_steps=1),
    evaluation=EvaluationConfig(problems=8, samples=2, batch_problems=8),
    checkpoint=CheckpointConfig(every=50),
  )
