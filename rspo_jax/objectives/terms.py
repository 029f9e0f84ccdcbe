"""Shared by all objectives: the type of their result, input checks, clipping, and the placement of router shift.

Clipping is one-sided: PPO's min(w A, clip(w) A) binds only where the ratio has already moved in the direction that the
advantage pushes it. The upper bound binds for A > 0, the lower one for A < 0, and a clipped ratio is a constant.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from rspo_jax.types import PLACEMENTS, Array


class Terms(NamedTuple):
  """An objective before aggregation, to be maximised. All fields are 0 or False outside the mask.

  Attributes:
    objective: [B, T] float32 (float64 for float64 input). The term of a sequence objective is repeated on every masked
      token of its row, so that "seq_mean_token_mean" returns the mean over sequences.
    clipped_low, clipped_high: [B, T] bool, the ratio (of the token, or of its row) was set to its lower or upper bound.
    grad_clipped: [B, T] bool, the bound removed the token's gradient. PPO's bounds do, CISPO's do not.
  """

  objective: Array
  clipped_low: Array
  clipped_high: Array
  grad_clipped: Array


Objective = Callable[..., Terms]


class Inputs(NamedTuple):
  """Checked inputs. Log-ratio and shift are 0 at inactive tokens: those outside the mask or with zero advantage."""

  log_ratio: Array  # [B, T], with the shift if it goes before the clip
  late_shift: Array  # [B, T], the shift if it goes after the clip, else 0
  advantage: Array  # [B, 1] or [B, T]
  active: Array  # [B, T] bool
  length: Array  # [B, 1], at least 1

  def mean(self, x: Array) -> Array:
    """[B, T], 0 where not active -> [B, 1], the mean over the row's masked tokens."""
    return x.sum(axis=1, keepdims=True) / self.length


def prepare(log_ratio, advantage, mask, log_shift, placement, *, per_token: bool) -> Inputs:
  """Checks the arguments of all objectives (documented in `rspo_jax.objectives.token_level.grpo`).

  Args:
    per_token: whether the objective accepts an advantage for every token.
  Raises:
    ValueError: an unknown placement, or an advantage [B, T] for an objective with one ratio per sequence.
  """
  if placement not in PLACEMENTS:
    raise ValueError(f"placement is {placement!r}; want one of {PLACEMENTS}. The paper's (v2) is 'before_clip'.")
  chex.assert_rank([log_ratio, advantage, mask], [2, {1, 2}, 2])
  chex.assert_equal_shape([log_ratio, mask] + ([] if log_shift is None else [log_shift]))
  chex.assert_type(mask, bool)
  if advantage.ndim == 2 and not per_token:
    raise ValueError(
      f"advantage is {advantage.shape}, one for every token, but this objective has one ratio per sequence; want [B]. "
      "Token-level objectives (gspo_token among them) take both."
    )
  chex.assert_equal_shape_prefix([log_ratio, advantage], advantage.ndim)
  dtype = jnp.promote_types(log_ratio.dtype, jnp.float32)
  advantage = jax.lax.stop_gradient(advantage.astype(dtype))
  advantage = advantage[:, None] if advantage.ndim == 1 else jnp.where(mask, advantage, 0)
  # Inactive tokens are set to 0 before exp as well as after it: 0 * inf in the backward pass would be NaN.
  active = mask & (advantage != 0)
  log_ratio = jnp.where(active, log_ratio.astype(dtype), 0)
  late_shift = jnp.zeros_like(log_ratio)
  if log_shift is not None:
    log_shift = jax.lax.stop_gradient(jnp.where(active, log_shift.astype(dtype), 0))
    if placement == "before_clip":
      log_ratio += log_shift
    else:
      late_shift = log_shift
  length = jnp.maximum(mask.sum(axis=1, keepdims=True), 1).astype(dtype)
  return Inputs(log_ratio, late_shift, advantage, active, length)


def clip(log_ratio, advantage, lower, upper):
  """(log-ratio, set to the bound that the advantage pushed it over; clipped_low; clipped_high)."""
  low = (log_ratio < lower) & (advantage < 0)
  high = (log_ratio > upper) & (advantage > 0)
  return jnp.where(low, lower, jnp.where(high, upper, log_ratio)), low, high


def clipped_terms(x: Inputs, objective: Array, low: Array, high: Array) -> Terms:
  """Terms of an objective whose bounds remove the gradient."""
  low, high = low & x.active, high & x.active
  return Terms(jnp.where(x.active, objective, 0), low, high, low | high)


def with_gradient_of(log_ratio: Array) -> Array:
  """1 everywhere, with the gradient of log_ratio: w * this is REINFORCE weighted by a constant w."""
  return jnp.exp(log_ratio - jax.lax.stop_gradient(log_ratio))


def ratio_bounds(eps_low: float, eps_high: float) -> tuple[float, float]:
  """Bounds 1 - eps_low and 1 + eps_high on a ratio, as bounds on its logarithm."""
  if not (0.0 <= eps_low <= 1.0 and eps_high >= 0.0):
    raise ValueError(
      f"eps_low is {eps_low} and eps_high is {eps_high}; the ratio is bounded to [1 - eps_low, 1 + eps_high]: "
      "want eps_low in [0, 1] (1 never clips below) and eps_high >= 0 (math.inf never clips above)."
    )
  return math.log1p(-eps_low) if eps_low < 1.0 else -math.inf, math.log1p(eps_high)
