"""F1: policy-gradient objectives in log space, one signature, and their exact aggregation over a minibatch.

    objective(log_ratio [B, T], advantage [B], mask [B, T], *, log_shift, placement, **clip) -> Terms

With q the token's log importance ratio and clip one-sided (below):

    grpo   J[i, t] = A[i] * exp( clip(q[i, t]) )
    gspo   J[i]    = A[i] * exp( clip(mean_t q[i, t]) )
    gmpo   J[i]    = A[i] * exp( mean_t clip(q[i, t]) )

Router shift enters each of them as `log_shift` (`rspo_jax.routing.router_log_shift`). RSPO is `gmpo` with it.

What clipping means here: PPO's min(w A, clip(w) A) only binds where the ratio has already moved the way the
advantage pushes it. So the upper bound binds for A > 0, the lower one for A < 0, and a bound ratio is a
constant: `clipped_high` and `clipped_low` are true exactly where the clip removes the gradient.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp

from rspo_jax.types import Array, Weighted

Placement = Literal["before_clip", "after_clip"]
PLACEMENTS = ("before_clip", "after_clip")
AGGREGATIONS = ("token_mean", "sequence_mean_token_mean")


class Terms(NamedTuple):
  """An objective before aggregation; to be maximised. Everything is 0 or False outside the mask.

  Attributes:
    objective: [B, T] float32 (float64 for float64 input). A sequence objective stands on every masked token
      of its row, so that "sequence_mean_token_mean" returns the mean over sequences.
    clipped_low, clipped_high: [B, T] bool, the lower or upper bound removed this token's gradient; for gspo,
      its row's.
  """

  objective: Array
  clipped_low: Array
  clipped_high: Array


class _Inputs(NamedTuple):
  """Checked inputs; log-ratio and shift are 0 where nothing may come through: padding and zero advantage."""

  log_ratio: Array  # [B, T], with the shift if it goes before the clip
  late_shift: Array  # [B, T], the shift if it goes after the clip, else 0
  advantage: Array  # [B, 1]
  live: Array  # [B, T] bool
  length: Array  # [B, 1], at least 1


def _prepare(log_ratio, advantage, mask, log_shift, placement) -> _Inputs:
  if placement not in PLACEMENTS:
    raise ValueError(f"placement is {placement!r}; want one of {PLACEMENTS}. The paper's (v2) is 'before_clip'.")
  chex.assert_rank([log_ratio, advantage, mask], [2, 1, 2])
  chex.assert_equal_shape([log_ratio, mask] + ([] if log_shift is None else [log_shift]))
  chex.assert_equal_shape_prefix([log_ratio, advantage], 1)
  chex.assert_type(mask, bool)
  dtype = jnp.promote_types(log_ratio.dtype, jnp.float32)
  advantage = jax.lax.stop_gradient(advantage.astype(dtype))[:, None]
  # Dead tokens are replaced before exp as well as after it: 0 * inf in the backward pass would be NaN.
  live = mask & (advantage != 0)
  log_ratio = jnp.where(live, log_ratio.astype(dtype), 0)
  late_shift = jnp.zeros_like(log_ratio)
  if log_shift is not None:
    log_shift = jax.lax.stop_gradient(jnp.where(live, log_shift.astype(dtype), 0))
    if placement == "before_clip":
      log_ratio += log_shift
    else:
      late_shift = log_shift
  length = jnp.maximum(mask.sum(axis=1, keepdims=True), 1).astype(dtype)
  return _Inputs(log_ratio, late_shift, advantage, live, length)


def _clip(log_ratio, advantage, lower, upper):
  """(log_ratio held at the bound its advantage pushes it over, clipped_low, clipped_high)."""
  low = (log_ratio < lower) & (advantage < 0)
  high = (log_ratio > upper) & (advantage > 0)
  return jnp.where(low, lower, jnp.where(high, upper, log_ratio)), low, high


def _ratio_bounds(eps_low: float, eps_high: float) -> tuple[float, float]:
  """Bounds 1 - eps_low and 1 + eps_high on a ratio, as bounds on its logarithm."""
  if not (0.0 <= eps_low <= 1.0 and eps_high >= 0.0):
    raise ValueError(
      f"eps_low is {eps_low} and eps_high is {eps_high}; the ratio is kept in [1 - eps_low, 1 + eps_high]: "
      "want eps_low in [0, 1] (1 never clips below) and eps_high >= 0 (math.inf never clips above)."
    )
  return math.log1p(-eps_low) if eps_low < 1.0 else -math.inf, math.log1p(eps_high)


def grpo(
  log_ratio: Array,
  advantage: Array,
  mask: Array,
  *,
  log_shift: Array | None = None,
  placement: Placement = "before_clip",
  eps_low: float = 0.2,
  eps_high: float = 0.2,
) -> Terms:
  """PPO's clipped surrogate per token: min(w A, clip(w, 1 - eps_low, 1 + eps_high) A).

  A ratio that grows while A < 0 is not bounded, as in PPO; it overflows float32 beyond 88 nats.

  Args:
    log_ratio: [B, T] log pi_new - log pi_old of the tokens, nats; any value, also NaN, outside the mask.
    advantage: [B], one for every token of the row; taken as a constant.
    mask: [B, T] bool, the tokens the policy chose.
    log_shift: [B, T] log trust in each token, nats, <= 0; taken as a constant. None is the same as 0.
    placement: "before_clip": w is pi_new / pi_old * trust (RSPO v2). "after_clip": the clipped term times
      trust (v1).
    eps_low, eps_high: distances of the bounds from 1, in ratio space.
  Returns:
    Terms per token.
  Raises:
    ValueError: unknown placement, or bounds that are no interval around 1.
  Source: DeepSeekMath, arXiv 2402.03300, eq. 3 (its KL term is not part of this function); PPO, arXiv
    1707.06347, eq. 7.
  """
  x = _prepare(log_ratio, advantage, mask, log_shift, placement)
  clipped, low, high = _clip(x.log_ratio, x.advantage, *_ratio_bounds(eps_low, eps_high))
  objective = jnp.exp(clipped + x.late_shift) * x.advantage
  return Terms(jnp.where(x.live, objective, 0), low, high)


def gspo(
  log_ratio: Array,
  advantage: Array,
  mask: Array,
  *,
  log_shift: Array | None = None,
  placement: Placement = "before_clip",
  eps_low: float = 3e-4,
  eps_high: float = 4e-4,
) -> Terms:
  """One length-normalised ratio per sequence, w = exp(mean_t q_t), clipped as in PPO.

  Router shift before a clip this narrow is a trap: at ratio 1, a mean trust below 1 - eps_low = 0.9997 puts
  every negative sequence under the lower bound (no gradient at all) and takes positive ones away from the
  upper bound. "after_clip" leaves the window alone and multiplies the clipped term by the geometric mean of
  the row's trust.

  Args and errors: as `grpo`.
  Returns:
    Terms with the row's term and flags on each of its masked tokens.
  Source: GSPO, arXiv 2507.18071, eqs. 5 and 7.
  """
  x = _prepare(log_ratio, advantage, mask, log_shift, placement)
  mean_log_ratio = x.log_ratio.sum(axis=1, keepdims=True) / x.length
  late_shift = x.late_shift.sum(axis=1, keepdims=True) / x.length
  clipped, low, high = _clip(mean_log_ratio, x.advantage, *_ratio_bounds(eps_low, eps_high))
  objective = jnp.exp(clipped + late_shift) * x.advantage
  return Terms(jnp.where(x.live, objective, 0), low & x.live, high & x.live)


def gmpo(
  log_ratio: Array,
  advantage: Array,
  mask: Array,
  *,
  log_shift: Array | None = None,
  placement: Placement = "before_clip",
  eps_low: float = 0.4,
  eps_high: float = 0.4,
) -> Terms:
  """Geometric mean of token ratios, each clipped to [exp(-eps_low), exp(eps_high)]. With `log_shift`: RSPO.

  The papers write s = sign(A), c_t = min(s q_t, clip(s q_t)), J = A exp(s mean_t c_t) and bound s q_t; here
  q_t itself is bounded, by -eps_low for A < 0 and by eps_high for A > 0, as verl does. At equal bounds, the
  default, the two are one. The papers' lower bound on s q_t never binds under their min: what they write
  (eps_lo, eps_hi) is eps_low = eps_high = log(eps_hi) here.

  "after_clip" is v1 as printed, J = A exp(s mean_t (c_t + log trust_t)): the trust stands under s, so it
  damps positive sequences and AMPLIFIES negative ones.

  Args and errors: as `grpo`, except
    eps_low, eps_high: >= 0, in nats: bounds on the log-ratio.
  Returns:
    Terms with the row's term on each of its masked tokens; the flags are the tokens' own.
  Source: GMPO, arXiv 2507.20673; RSPO, arXiv 2510.23027v2 (before the clip) and v1 (after it).
  """
  if not (eps_low >= 0.0 and eps_high >= 0.0):
    raise ValueError(
      f"eps_low is {eps_low} and eps_high is {eps_high}; the log-ratio is kept in [-eps_low, eps_high]: want "
      "both >= 0 (0.4 for a ratio in [exp(-0.4), exp(0.4)])."
    )
  x = _prepare(log_ratio, advantage, mask, log_shift, placement)
  clipped, low, high = _clip(x.log_ratio, x.advantage, -eps_low, eps_high)
  exponent = clipped + jnp.sign(x.advantage) * x.late_shift
  objective = jnp.exp(exponent.sum(axis=1, keepdims=True) / x.length) * x.advantage
  return Terms(jnp.where(x.live, objective, 0), low, high)


Objective = Callable[..., Terms]
OBJECTIVES: dict[str, Objective] = {"grpo": grpo, "gspo": gspo, "gmpo": gmpo}


def aggregation_weight(mask: Array, mode: str) -> Array:
  """What a mask counts for: its tokens ("token_mean") or its rows with a token ("sequence_mean_token_mean").

  Depends on the mask alone, so the weight of a whole minibatch is known before any gradient is taken.

  Args:
    mask: [B, T] bool.
  Returns:
    [] float32, >= 0.
  Raises:
    ValueError: unknown mode.
  """
  chex.assert_rank(mask, 2)
  chex.assert_type(mask, bool)
  if mode == "token_mean":
    return mask.sum().astype(jnp.float32)
  if mode == "sequence_mean_token_mean":
    return mask.any(axis=1).sum().astype(jnp.float32)
  raise ValueError(f"aggregation is {mode!r}; want one of {AGGREGATIONS}.")


def aggregate(terms: Terms, mask: Array, mode: str) -> Weighted:
  """Sums terms so that, over any split of a batch, (sum of totals) / (sum of weights) is the whole's mean.

  "token_mean" weighs every token alike (a sequence objective then weighs by length),
  "sequence_mean_token_mean" every row that has a token.

  Args:
    terms: from an objective, [B, T]. mask: [B, T] bool, the one the objective was given.
  Returns:
    Weighted of scalars; its weight is `aggregation_weight(mask, mode)`.
  Raises:
    ValueError: unknown mode.
  """
  chex.assert_equal_shape([terms.objective, mask])
  weight = aggregation_weight(mask, mode)
  if mode == "token_mean":
    return Weighted(terms.objective.sum(), weight)
  length = jnp.maximum(mask.sum(axis=1), 1).astype(terms.objective.dtype)
  return Weighted((terms.objective.sum(axis=1) / length).sum(), weight)


def policy_loss(
  log_prob: Array,
  old_log_prob: Array,
  advantage: Array,
  mask: Array,
  *,
  objective: Objective = gmpo,
  aggregation: str = "sequence_mean_token_mean",
  log_shift: Array | None = None,
  **options,
) -> Array:
  """The loss of one whole minibatch on plain arrays: minus the mean objective. With a log_shift, RSPO.

  Args:
    log_prob, old_log_prob: [B, T] nats, of the tokens under the trained and the sampling policy; gradient
      flows into the first only.
    advantage: [B]. mask: [B, T] bool.
    objective: one of `OBJECTIVES`' functions. options: its own (placement, eps_low, eps_high).
    aggregation: one of `AGGREGATIONS`.
    log_shift: [B, T] from `router_log_shift`, or None.
  Returns:
    [] float32; 0 for an empty mask.
  """
  log_ratio = log_prob - jax.lax.stop_gradient(old_log_prob)
  terms = objective(log_ratio, advantage, mask, log_shift=log_shift, **options)
  return -aggregate(terms, mask, aggregation).mean
