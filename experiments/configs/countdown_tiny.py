"""A tiny mixture-of-experts model learns Countdown with RSPO on a laptop CPU.

    python -m experiments.train --config=experiments/configs/countdown_tiny.py --workdir=runs/countdown_tiny
"""

from experiments.config import (
  CheckpointConfig,
  DataConfig,
  EvaluationConfig,
  ExperimentConfig,
  OptimizerConfig,
  RLConfig,
  SamplingConfig,
  WarmStartConfig,
  config_dict,
)
from models.config import TransformerConfig


def get_config():
  return config_dict(
    ExperimentConfig(
      seed=0,
      model=TransformerConfig(
        vocab_size=20,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=128,
        rope_theta=10_000.0,
      ),
      data=DataConfig(options={"numbers": 3, "high": 20, "target_high": 100, "operators": "+-*", "train": 12000, "test": 1024}),
      sampling=SamplingConfig(max_new_tokens=14),
      warm_start=WarmStartConfig(
        steps=600, batch_size=256, wrong_fraction=0.5, optimizer=OptimizerConfig(learning_rate=2e-3, final_fraction=0.1)
      ),
      rl=RLConfig(
        steps=150, prompts=64, samples_per_prompt=8, minibatches=4,
        optimizer=OptimizerConfig(learning_rate=5e-4, warmup_steps=20),
      ),
      evaluation=EvaluationConfig(batch_problems=64),
      checkpoint=CheckpointConfig(every=200),
    )
  )
