"""A tiny mixture-of-experts model learns Countdown with RSPO on a laptop CPU, in minutes.

What it shows: a short warm start on right demonstrations teaches the form of an answer and a little arithmetic; RSPO
then more than doubles the success on problems it never saw. What it costs: under five minutes on two CPU cores.

python -m experiments.train --config=experiments/configs/countdown_tiny.py --workdir=runs/countdown_tiny
"""

from experiments.config import (
  CheckpointConfig,
  DataConfig,
  EvaluationConfig,
  ExperimentConfig,
  Named,
  OptimizerConfig,
  WarmStartConfig,
)
from experiments.setup.config_flags import config_dict
from models.config import tiny_moe
from rspo_jax.rl_step import RLOptions
from rspo_jax.rollout import SamplingOptions
from rspo_jax.rollout.collector import CollectorOptions


def get_config():
  return config_dict(
    ExperimentConfig(
      seed=0,
      model=tiny_moe(20),
      data=DataConfig(
        options={"numbers": 3, "high": 20, "target_high": 60, "operators": "+-", "train": 4096, "test": 1024, "seed": 0}
      ),
      reward=Named("countdown", options={"format_reward": 0.1}),
      sampling=SamplingOptions(max_new_tokens=14, samples_per_prompt=8),
      warm_start=WarmStartConfig(
        steps=130,
        batch_size=128,
        optimizer=OptimizerConfig(learning_rate=4e-3, final_fraction=0.1),
      ),
      steps=400,
      collector=CollectorOptions(prompts=64),
      rl=RLOptions(minibatches=4),
      optimizer=OptimizerConfig(learning_rate=5e-4, warmup_steps=30, final_fraction=0.1),
      evaluation=EvaluationConfig(batch_problems=64),
      checkpoint=CheckpointConfig(every=100),
    )
  )
