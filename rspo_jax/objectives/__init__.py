"""Objectives on plain arrays, their aggregation, advantages, penalties and mismatch weights.

Every objective is a pure function of one signature (log-ratio, advantage, mask, log_shift, placement and its own
options) that returns `Terms`. Functions that run a model belong in `rspo_jax.training`, those that read router outputs
in `rspo_jax.router`; router shift is an input here, `log_shift`.
"""

from rspo_jax.objectives.advantages import (
  BASELINES,
  SCALES,
  AdvantageOptions,
  compute_advantages,
  group_advantages,
  token_advantages,
  whiten,
  zero_variance,
  zero_variance_fraction,
)
from rspo_jax.objectives.aggregation import AGGREGATIONS, DEFAULT_AGGREGATION, aggregate, aggregation_weight
from rspo_jax.objectives.mismatch import CORRECTIONS, LEVELS, MismatchOptions, mismatch_weight
from rspo_jax.objectives.penalties import KL_ESTIMATORS, kl, overlong_penalty
from rspo_jax.objectives.sequence_level import gmpo, gspo, rloo
from rspo_jax.objectives.table import OBJECTIVES, Recipe, check_recipe, make_objective, objective_options, policy_loss
from rspo_jax.objectives.terms import Objective, Terms
from rspo_jax.objectives.token_level import cispo, grpo, gspo_token, policy_gradient, sapo

__all__ = [
  "AGGREGATIONS",
  "BASELINES",
  "CORRECTIONS",
  "DEFAULT_AGGREGATION",
  "KL_ESTIMATORS",
  "LEVELS",
  "OBJECTIVES",
  "SCALES",
  "AdvantageOptions",
  "MismatchOptions",
  "Objective",
  "Recipe",
  "Terms",
  "aggregate",
  "aggregation_weight",
  "check_recipe",
  "cispo",
  "compute_advantages",
  "gmpo",
  "group_advantages",
  "grpo",
  "gspo",
  "gspo_token",
  "kl",
  "make_objective",
  "mismatch_weight",
  "objective_options",
  "overlong_penalty",
  "policy_gradient",
  "policy_loss",
  "rloo",
  "sapo",
  "token_advantages",
  "whiten",
  "zero_variance",
  "zero_variance_fraction",
]
