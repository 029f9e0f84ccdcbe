"""Functions that run a policy on given tokens: scoring, the loss, the train step, its diagnostics; and train states.

All functions are pure and can be jitted over a mesh. Sampling and everything else that produces tokens or rewards
belongs in `rspo_jax.rollout` and `rspo_jax.rewards`.
"""

from rspo_jax.training.attribution import (
  GROUP_NAMES,
  GROUPS,
  make_gradient_noise,
  make_replay_attribution,
  module_group,
)
from rspo_jax.training.diagnostics import (
  RouterSums,
  TokenStatistics,
  approx_kl,
  load_metrics,
  over_updates,
  router_metrics,
  token_metrics,
)
from rspo_jax.training.loss import REPLAYS, LossAux, Normalisers, UpdateOptions, make_loss, normalisers
from rspo_jax.training.minibatches import join_rows, split_rows
from rspo_jax.training.parameters import ROUTER, freeze, matches, path_name, scale_updates, stop_gradients
from rspo_jax.training.scoring import Scores, score, token_log_prob
from rspo_jax.training.state import abstract_state, create_state, init_state, restart_optimizer, state_shardings
from rspo_jax.training.train_step import (
  Step,
  jit_step,
  make_supervised_step,
  make_train_step,
  pmap_step,
  skip_nonfinite,
)

__all__ = [
  "GROUPS",
  "GROUP_NAMES",
  "REPLAYS",
  "ROUTER",
  "LossAux",
  "Normalisers",
  "RouterSums",
  "Scores",
  "Step",
  "TokenStatistics",
  "UpdateOptions",
  "abstract_state",
  "approx_kl",
  "create_state",
  "freeze",
  "init_state",
  "jit_step",
  "join_rows",
  "load_metrics",
  "make_gradient_noise",
  "make_loss",
  "make_replay_attribution",
  "make_supervised_step",
  "make_train_step",
  "matches",
  "module_group",
  "normalisers",
  "over_updates",
  "path_name",
  "pmap_step",
  "restart_optimizer",
  "router_metrics",
  "scale_updates",
  "score",
  "skip_nonfinite",
  "split_rows",
  "state_shardings",
  "stop_gradients",
  "token_log_prob",
  "token_metrics",
]
