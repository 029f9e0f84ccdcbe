"""The demo's config, changed for tests."""

from experiments.configs import countdown_tiny
from tests.support import tiny

SETTINGS = {
  **{f"model.{name}": getattr(tiny.CONFIG, name) for name in ("hidden_size", "num_attention_heads", "head_dim")},
  "model.num_hidden_layers": 2,
  "model.num_experts": 4,
  "model.moe_intermediate_size": 16,
  "model.scan_layers": True,  # compiles in less time
  "data.options.train": 200,
  "data.options.test": 20,
  "warm_start.steps": 4,
  "warm_start.batch_size": 8,
  "steps": 4,
  "collector.prompts": 8,
  "sampling.samples_per_prompt": 2,
  "rl.minibatches": 2,
  "evaluation.samples": 2,
  "evaluation.batch_problems": 8,
  "evaluation.every": 2,
  "checkpoint.every": 1,
  "runtime.cpu_devices": 2,
  # Everything that can be on at once: a continued run has to bring back a reference policy, an optimizer that differs
  # by phase, further rounds of sampling, completions under way, and a curriculum.
  "sampling.rows": 8,
  "collector.oversampling": 4,
  "collector.carry_over": 2,
  "curriculum.high": 0.9,
  "loss.kl_coefficient": 0.01,
  "optimizer.freeze_router": True,
  "loss.replay": "scoring",
  "loss.replay_gates": True,
  "loss.load_balance_coefficient": 0.01,
  "loss.router_z_coefficient": 0.001,
  "mismatch.correction": "tis",
  "collector.dynamic_sampling_rounds": 2,
  "collector.overlong_buffer": 4,
  "diagnostics.every": 2,
  "diagnostics.pieces": 2,
}


def changed(**dotted):
  """The tiny config with some keys set; '__' stands for the dot."""
  given = countdown_tiny.get_config()
  with given.unlocked(), given.ignore_type():
    for key, value in dotted.items():
      *groups, last = key.split("__")
      node = given
      for group in groups:
        node = node[group]
      node[last] = value
  return given
