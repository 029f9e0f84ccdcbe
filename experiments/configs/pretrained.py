"""RSPO on a public checkpoint: model, weights and tokenizer come from its folder.

What it shows: the loop of the paper (GMPO with router shift, four updates per rollout) on any of the families of
docs/models.md, here on Countdown. What it costs is the model's: `python -m experiments.convert inspect FOLDER` says.
`--config.model.lora.rank=16` trains adapters instead of all parameters.

python -m experiments.train --config=experiments/configs/pretrained.py:FOLDER --workdir=runs/pretrained
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
from experiments.setup.model_files import kind_of, read_model
from rspo_jax.rl_step import RLOptions
from rspo_jax.rollout import SamplingOptions
from rspo_jax.rollout.collector import CollectorOptions


def get_config(folder: str = ""):
  if not folder:
    raise ValueError("name the checkpoint's folder: --config=experiments/configs/pretrained.py:FOLDER")
  return config_dict(
    ExperimentConfig(
      seed=0,
      model=read_model(folder, remat=True),
      pretrained=folder,
      tokenizer=folder if kind_of(folder) == "hf" else "",
      data=DataConfig(
        options={"numbers": 3, "high": 20, "target_high": 60, "operators": "+-", "train": 4096, "test": 256, "seed": 0}
      ),
      reward=Named("countdown", options={"format_reward": 0.1}),
      sampling=SamplingOptions(max_new_tokens=32, samples_per_prompt=8),
      steps=200,
      collector=CollectorOptions(prompts=32),
      rl=RLOptions(minibatches=4),
      optimizer=OptimizerConfig(learning_rate=1e-6, warmup_steps=20),
      evaluation=EvaluationConfig(batch_problems=64),
      checkpoint=CheckpointConfig(every=50),
    )
  )
