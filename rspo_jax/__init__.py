"""Router-shift policy optimization and its relatives for mixture-of-experts language models, in JAX.

What is exported here are the pure functions; the host side is imported by module (`rspo_jax.data`, `rspo_jax.rewards`,
`rspo_jax.checkpoint`, `rspo_jax.metrics`, `rspo_jax.evaluation`).
"""

from rspo_jax.advantages import group_advantages, token_advantages, whiten, zero_variance, zero_variance_fraction
from rspo_jax.aggregation import AGGREGATIONS, aggregate, aggregation_weight
from rspo_jax.balance import load_balance_loss, router_bias_step, router_z_loss
from rspo_jax.mesh import init_state, make_layout, param_shardings, put_batch, state_shardings
from rspo_jax.minibatches import join_rows, split_rows
from rspo_jax.mismatch import MismatchOptions, mismatch_weight
from rspo_jax.objectives import OBJECTIVES, Recipe, policy_loss
from rspo_jax.parameters import freeze, scale_updates
from rspo_jax.penalties import kl, overlong_penalty
from rspo_jax.probing import make_gradient_noise, make_replay_probe
from rspo_jax.reductions import (
  approx_kl,
  effective_sample_size,
  masked_correlation,
  masked_mean,
  masked_quantiles,
)
from rspo_jax.router_shift import (
  ShiftOptions,
  combine_deviation,
  expert_overlap,
  linear_floor,
  router_drift,
  router_kl,
  router_log_shift,
)
from rspo_jax.routing import (
  record_routing,
  replay_of,
  stack_trace,
  to_positions,
  to_slots,
  trace_for_probe,
  watch_routing,
)
from rspo_jax.sampling import SamplingOptions, sample
from rspo_jax.scoring import Scores, score, token_log_prob
from rspo_jax.sequence_objectives import gmpo, gspo, rloo
from rspo_jax.terms import Terms
from rspo_jax.token_objectives import cispo, grpo, gspo_token, policy_gradient, sapo
from rspo_jax.train_step import (
  UpdateOptions,
  jit_step,
  make_supervised_step,
  make_train_step,
  pmap_step,
  skip_nonfinite,
)
from rspo_jax.types import (
  Layout,
  Policy,
  Replay,
  Rollout,
  RouterOutput,
  RoutingTrace,
  TrainBatch,
  TrainState,
  Weighted,
  router_logits_probe,
)

__all__ = [
  "AGGREGATIONS",
  "OBJECTIVES",
  "Layout",
  "MismatchOptions",
  "Policy",
  "Recipe",
  "Replay",
  "Rollout",
  "RouterOutput",
  "RoutingTrace",
  "SamplingOptions",
  "Scores",
  "ShiftOptions",
  "Terms",
  "TrainBatch",
  "TrainState",
  "UpdateOptions",
  "Weighted",
  "aggregate",
  "aggregation_weight",
  "approx_kl",
  "cispo",
  "combine_deviation",
  "effective_sample_size",
  "expert_overlap",
  "freeze",
  "gmpo",
  "group_advantages",
  "grpo",
  "gspo",
  "gspo_token",
  "init_state",
  "jit_step",
  "join_rows",
  "kl",
  "linear_floor",
  "load_balance_loss",
  "make_gradient_noise",
  "make_layout",
  "make_replay_probe",
  "make_supervised_step",
  "make_train_step",
  "masked_correlation",
  "masked_mean",
  "masked_quantiles",
  "mismatch_weight",
  "overlong_penalty",
  "param_shardings",
  "pmap_step",
  "policy_gradient",
  "policy_loss",
  "put_batch",
  "record_routing",
  "replay_of",
  "rloo",
  "router_bias_step",
  "router_drift",
  "router_kl",
  "router_log_shift",
  "router_logits_probe",
  "router_z_loss",
  "sample",
  "sapo",
  "scale_updates",
  "score",
  "skip_nonfinite",
  "split_rows",
  "stack_trace",
  "state_shardings",
  "to_positions",
  "to_slots",
  "token_advantages",
  "token_log_prob",
  "trace_for_probe",
  "watch_routing",
  "whiten",
  "zero_variance",
  "zero_variance_fraction",
]
