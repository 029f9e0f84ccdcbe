"""The objectives by name, each with what its paper or its usual code puts around it; and the loss on plain arrays.

`docs/algorithms.md` has the table of formulas, sources and defaults.
"""

import functools
from typing import NamedTuple

import jax

from rspo_jax.objectives.aggregation import aggregate
from rspo_jax.objectives.sequence_level import gmpo, gspo, rloo
from rspo_jax.objectives.terms import Objective
from rspo_jax.objectives.token_level import cispo, grpo, gspo_token, policy_gradient, sapo
from rspo_jax.types import Array


class Recipe(NamedTuple):
  """An objective and its surroundings.

  Attributes:
    objective: a function of `rspo_jax.objectives.token_level` or `rspo_jax.objectives.sequence_level`.
    aggregation: one of `rspo_jax.objectives.aggregation.AGGREGATIONS`.
    baseline, scale: of the advantages, see `rspo_jax.objectives.advantages.group_advantages`.
  """

  objective: Objective
  aggregation: str = "seq_mean_token_mean"
  baseline: str = "group_mean"
  scale: str = "group_std"


OBJECTIVES: dict[str, Recipe] = {
  "policy_gradient": Recipe(policy_gradient, "token_mean", "group_mean", "none"),
  "reinforce_pp": Recipe(grpo, "token_mean", "none", "batch_std"),
  "reinforce_pp_baseline": Recipe(grpo, "token_mean", "group_mean", "batch_std"),
  "rloo": Recipe(rloo, "seq_mean_token_mean", "leave_one_out", "none"),
  "grpo": Recipe(grpo),
  "dr_grpo": Recipe(grpo, "seq_mean_token_sum_norm", "group_mean", "none"),
  "dapo": Recipe(functools.partial(grpo, eps_high=0.28), "token_mean"),
  "gspo": Recipe(gspo),
  "gspo_token": Recipe(gspo_token),
  "gmpo": Recipe(gmpo),
  "cispo": Recipe(cispo, "token_mean"),
  "sapo": Recipe(sapo),
}


def policy_loss(
  log_prob: Array,
  old_log_prob: Array,
  advantage: Array,
  mask: Array,
  *,
  objective: Objective = gmpo,
  aggregation: str = "seq_mean_token_mean",
  norm_length: int | None = None,
  log_shift: Array | None = None,
  **options,
) -> Array:
  """The loss of one whole minibatch on plain arrays: minus the mean objective. With a log_shift, RSPO.

  Args:
    log_prob, old_log_prob: [B, T] nats, of the tokens under the trained and the sampling policy; gradient
      flows into the first only.
    advantage: [B] (or [B, T] for objectives of tokens). mask: [B, T] bool.
    objective: a function of `rspo_jax.objectives.token_level` or `rspo_jax.objectives.sequence_level`. options: its own
      (placement, eps_low, eps_high, ...).
    aggregation, norm_length: see `rspo_jax.objectives.aggregation.aggregate`.
    log_shift: [B, T] from `router_log_shift`, or None.
  Returns:
    [] float32; 0 for an empty mask.
  """
  log_ratio = log_prob - jax.lax.stop_gradient(old_log_prob)
  terms = objective(log_ratio, advantage, mask, log_shift=log_shift, **options)
  return -aggregate(terms.objective, mask, aggregation, norm_length=norm_length).mean
