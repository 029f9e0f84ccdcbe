"""What all objectives share: their result, their checked inputs, clipping, and where router shift enters.

What clipping means here: PPO's min(w A, clip(w) A) only binds where the ratio has already moved the way the
advantage pushes it. So the upper bound binds for A > 0, the lower one for A < 0, and a bound ratio is a constant.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from rspo_jax.types import PLACEMENTS, Array


class Terms(NamedTuple):
  """An objective before aggregation; to be maximised. Everything is 0 or False outside the mask.

  Attributes:
    objective: [B, T] float32 (float64 for float64 input). A sequence objective stands on every masked token
      of its row, so that "seq_mean_token_mean" returns the mean over sequences.
    clipped_low, clipped_high: [B, T] bool, the term was held at its lower or upper bound; for a sequence ratio, its
      row's.
    stopped: [B, T] bool, the bound took this token's gradient away. CISPO's bounds do not, PPO's do.
  """

  objective: Array
  clipped_low: Array
  clipped_high: Array
  grad_clipped: Array


Objective = Callable[..., Terms]


class Inputs(NamedTuple):
  """Checked inputs; log-ratio and shift are 0 where nothing may come through: padding and zero advantage."""

  log_ratio: Array  # [B, T], with the shift if it goes before the clip
  late_shift: Array  # [B, T], the shift if it goes after the clip, else 0
  advantage: Array  # [B, 1] or [B, T]
  live: Array  # [B, T] bool
  length: Array  # [B, 1], at least 1

  def mean(self, x: Array) -> Array:
    """[B, T], 0 where not live -> [B, 1], the mean over the row's tokens."""
    return x.sum(axis=1, keepdims=True) / self.length


def prepare(log_ratio, advantage, mask, log_shift, placement, *, per_token: bool) -> Inputs:
  """Checks the arguments every objective takes (`rspo_jax.objectives.token_level.grpo` documents them).

  Args:
    per_token: whether the objective can take an advantage for every token.
  Raises:
    ValueError: an unknown placement, or an advantage [B, T] where the ratio is the whole sequence's.
  """
  if placement not in PLACEMENTS:
    raise ValueError(f"placement is {placement!r}; want one of {PLACEMENTS}. The paper's (v2) is 'before_clip'.")
  chex.assert_rank([log_ratio, advantage, mask], [2, {1, 2}, 2])
  chex.assert_equal_shape([log_ratio, mask] + ([] if log_shift is None else [log_shift]))
  chex.assert_type(mask, bool)
  if advantage.ndim == 2 and not per_token:
    raise ValueError(
      f"advantage is {advantage.shape}, one for every token, but this objective's ratio is the whole sequence's; want "
      "[B]. Objectives of tokens (gspo_token among them) take both."
    )
  chex.assert_equal_shape_prefix([log_ratio, advantage], advantage.ndim)
  dtype = jnp.promote_types(log_ratio.dtype, jnp.float32)
  advantage = jax.lax.stop_gradient(advantage.astype(dtype))
  advantage = advantage[:, None] if advantage.ndim == 1 else jnp.where(mask, advantage, 0)
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
  return Inputs(log_ratio, late_shift, advantage, live, length)


def clip(log_ratio, advantage, lower, upper):
  """(log-ratio held at the bound its advantage pushes it over, clipped_low, clipped_high)."""
  low = (log_ratio < lower) & (advantage < 0)
  high = (log_ratio > upper) & (advantage > 0)
  return jnp.where(low, lower, jnp.where(high, upper, log_ratio)), low, high


def clipped_terms(x: Inputs, objective: Array, low: Array, high: Array) -> Terms:
  """Terms of an objective whose bounds take the gradient away."""
  low, high = low & x.live, high & x.live
  return Terms(jnp.where(x.live, objective, 0), low, high, low | high)


def with_gradient_of(log_ratio: Array) -> Array:
  """1 everywhere, with the gradient of log_ratio: w * this is REINFORCE weighted by a constant w."""
  return jnp.exp(log_ratio - jax.lax.stop_gradient(log_ratio))


def ratio_bounds(eps_low: float, eps_high: float) -> tuple[float, float]:
  """Bounds 1 - eps_low and 1 + eps_high on a ratio, as bounds on its logarithm."""
  if not (0.0 <= eps_low <= 1.0 and eps_high >= 0.0):
    raise ValueError(
      f"eps_low is {eps_low} and eps_high is {eps_high}; the ratio is kept in [1 - eps_low, 1 + eps_high]: "
      "want eps_low in [0, 1] (1 never clips below) and eps_high >= 0 (math.inf never clips above)."
    )
  return math.log1p(-eps_low) if eps_low < 1.0 else -math.inf, math.log1p(eps_high)
