"""Router-shift policy optimization and its relatives for mixture-of-experts language models, in JAX.

These are the names to begin with; everything else is imported by subject: `rspo_jax.objectives`, `router`, `training`,
`rollout`, `rewards`, `data`, `tokenization`, `evaluation`, `run`, `tasks`. `rspo_jax.rl_step` is one RL step, top to
bottom.
"""

from rspo_jax.mesh import make_layout
from rspo_jax.objectives import (
  OBJECTIVES,
  MismatchOptions,
  cispo,
  gmpo,
  group_advantages,
  grpo,
  gspo,
  make_objective,
  policy_loss,
)
from rspo_jax.rollout import SamplingOptions, policy_from_forward, sample
from rspo_jax.router import ShiftOptions, router_drift, router_log_shift
from rspo_jax.training import UpdateOptions, init_state, jit_step, make_train_step, score
from rspo_jax.types import Layout, Policy, Rollout, RoutingTrace, TrainBatch, TrainState

__all__ = [
  "OBJECTIVES",
  "Layout",
  "MismatchOptions",
  "Policy",
  "Rollout",
  "RoutingTrace",
  "SamplingOptions",
  "ShiftOptions",
  "TrainBatch",
  "TrainState",
  "UpdateOptions",
  "cispo",
  "gmpo",
  "group_advantages",
  "grpo",
  "gspo",
  "init_state",
  "jit_step",
  "make_layout",
  "make_objective",
  "make_train_step",
  "policy_from_forward",
  "policy_loss",
  "router_drift",
  "router_log_shift",
  "sample",
  "score",
]
