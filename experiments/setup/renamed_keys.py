"""Config keys of earlier versions, for messages that name the current key."""

# Earlier key -> current key, both without "config.". A group stands for all its keys.
RENAMED = {
  "rl.steps": "steps",
  "rl.optimizer": "optimizer",
  "rl.frozen": "optimizer.frozen",
  "rl.samples_per_prompt": "sampling.samples_per_prompt",
  "rl.microbatches": "loss.microbatches",
  "rl.logits_chunk": "loss.logits_chunk",
  **{
    f"rl.{name}": f"collector.{name}"
    for name in (
      "prompts",
      "dynamic_sampling_rounds",
      "oversampling",
      "carry_over",
      "overlong_buffer",
      "overlong_penalty",
    )
  },
  **{
    f"objective.{name}": f"objective.options.{name}"
    for name in ("eps_low", "eps_high", "dual_clip", "tau_pos", "tau_neg", "bounds", "ratio", "length_epsilon")
  },
  **{
    f"objective.{name}": f"loss.{name}"
    for name in ("aggregation", "norm_length", "kl_coefficient", "kl_estimator", "entropy_coefficient")
  },
  "objective.baseline": "advantage.baseline",
  "objective.scale": "advantage.scale",
  "objective.ddof": "advantage.ddof",
  "objective.std_epsilon": "advantage.epsilon",
  "objective.kl_in": "loss.kl_coefficient (of the loss) or config.rl.reward_kl_coefficient (of the reward)",
  "router.shift": "shift.on",
  "router.shift_floor": "shift.floor",
  "router.shift_floor_start": "shift.floor_start",
  "router.shift_floor_updates": "shift.floor_updates",
  **{f"router.{name}": f"shift.{name}" for name in ("placement", "deviation", "layers", "level")},
  "router.replay": "loss.replay",
  "router.replay_gates": "loss.replay_gates",
  "router.freeze": "optimizer.freeze_router",
  "router.learning_rate_multiplier": "optimizer.router_multiplier",
  "router.load_balance": "loss.load_balance_coefficient",
  "router.z_loss": "loss.router_z_coefficient",
  "router.bias_rate": "loss.router_bias_rate",
  "sampling.engine": "engine.urls",
  **{f"sampling.engine_{name}": f"engine.{name}" for name in ("kind", "folder", "model", "timeout")},
}


def renamed_key(old: str) -> str:
  """The current key for a key of earlier versions, both without "config."; '' if it was not renamed."""
  if old in RENAMED:
    return RENAMED[old]
  group, _, name = old.rpartition(".")
  return f"{renamed_key(group)}.{name}" if group and renamed_key(group) else ""
