"""Router-shift policy optimization and its relatives for mixture-of-experts language models, in JAX.

What is exported here are the pure functions; the host side is imported by module (`rspo_jax.data`, `rspo_jax.rewards`,
`rspo_jax.checkpoint`, `rspo_jax.metrics`, `rspo_jax.evaluation`).
"""

from rspo_jax.advantages import group_advantages, zero_variance_fraction
from rspo_jax.mesh import init_state, make_layout, param_shardings, put_batch, state_shardings
from rspo_jax.minibatches import join_rows, split_rows
from rspo_jax.objectives import OBJECTIVES, Terms, aggregate, gmpo, grpo, gspo, policy_loss
from rspo_jax.reductions import approx_kl, effective_sample_size, masked_mean, masked_quantiles
from rspo_jax.routing import (
  record_routing,
  router_drift,
  router_log_shift,
  stack_trace,
  to_positions,
  to_slots,
  trace_for_probe,
  watch_routing,
)
from rspo_jax.sampling import SamplingOptions, sample
from rspo_jax.scoring import Scores, score, token_log_prob
from rspo_jax.train_step import (
  UpdateOptions,
  jit_step,
  make_supervised_step,
  make_train_step,
  pmap_step,
  skip_nonfinite,
)
from rspo_jax.types import Layout, Policy, Rollout, RoutingTrace, TrainBatch, TrainState, Weighted, router_logits_probe

__all__ = [
  "OBJECTIVES",
  "Layout",
  "Policy",
  "Rollout",
  "RoutingTrace",
  "SamplingOptions",
  "Scores",
  "Terms",
  "TrainBatch",
  "TrainState",
  "UpdateOptions",
  "Weighted",
  "aggregate",
  "approx_kl",
  "effective_sample_size",
  "gmpo",
  "group_advantages",
  "grpo",
  "gspo",
  "init_state",
  "jit_step",
  "join_rows",
  "make_layout",
  "make_supervised_step",
  "make_train_step",
  "masked_mean",
  "masked_quantiles",
  "param_shardings",
  "pmap_step",
  "policy_loss",
  "put_batch",
  "record_routing",
  "router_drift",
  "router_log_shift",
  "router_logits_probe",
  "sample",
  "score",
  "skip_nonfinite",
  "split_rows",
  "stack_trace",
  "state_shardings",
  "to_positions",
  "to_slots",
  "token_log_prob",
  "trace_for_probe",
  "watch_routing",
  "zero_variance_fraction",
]
