"""Policy-gradient objectives with one ratio per sequence and the signature of `rspo_jax.objectives.token_level`.

    gspo   J = A * exp(clip(mean_t q[t]))
    gmpo   J = A * exp(mean_t clip(q[t]))       with router shift: RSPO
    rloo   J = A * exp(clip(sum_t q[t]))        or with one ratio per token, or without a ratio

The term is repeated on every token of its row, so "seq_mean_token_mean" is the mean over sequences.
"""

from typing import Literal

import jax.numpy as jnp

from rspo_jax.objectives.terms import Terms, clip, clipped_terms, prepare, ratio_bounds
from rspo_jax.objectives.token_level import grpo, policy_gradient
from rspo_jax.types import Array, Placement

_MAX_LOG_RATIO = 30.0  # nats; exp of the unbounded sum over a long sequence would overflow


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

  Router shift before so narrow a clip suppresses gradients: at ratio 1, a mean trust below 1 - eps_low = 0.9997 moves
  every negative sequence below the lower bound (no gradient) and positive ones away from the upper bound. "after_clip"
  and "weight" do not move the ratio; they multiply the clipped term by the geometric mean of the row's trust.

  Args and errors: as `rspo_jax.objectives.token_level.grpo`, with advantage [B].
  Returns:
    Terms, with the row's term and flags on each of its masked tokens.
  Source: GSPO, arXiv 2507.18071, eq. 5 to 7.
  """
  x = prepare(log_ratio, advantage, mask, log_shift, placement, per_token=False)
  clipped, low, high = clip(x.mean(x.log_ratio), x.advantage, *ratio_bounds(eps_low, eps_high))
  return clipped_terms(x, jnp.exp(clipped + x.mean(x.late_shift)) * x.advantage, low, high)


def gmpo(
  log_ratio: Array,
  advantage: Array,
  mask: Array,
  *,
  log_shift: Array | None = None,
  placement: Placement = "before_clip",
  eps_low: float = 0.4,
  eps_high: float = 0.4,
  bounds: Literal["ratio", "signed"] = "ratio",
  length_epsilon: float = 0.0,
) -> Terms:
  """Geometric mean of token ratios, each clipped to [exp(-eps_low), exp(eps_high)]. With `log_shift`: RSPO.

  Two conventions for the bounds, identical for eps_low = eps_high (the default):
    "ratio" (verl): q_t itself is bounded, by -eps_low for A < 0 and by eps_high for A > 0.
    "signed" (the papers): with s = sign(A), c_t = min(s q_t, clip(s q_t, -eps_low, eps_high)). The lower bound never
      binds in that min, so q_t is bounded by -eps_high for A < 0 and by eps_high for A > 0.

  Placements of router shift:
    "before_clip": q_t + log trust_t is clipped (v2).
    "after_clip": v1 as printed, J = A exp(s mean_t (c_t + log trust_t)): log trust is multiplied by s, so it damps
      positive sequences and AMPLIFIES negative ones.
    "weight": J = A exp(mean_t (clip(q_t) + log trust_t)) damps both.

  Args and errors: as `rspo_jax.objectives.token_level.grpo`, with advantage [B], except
    eps_low, eps_high: >= 0, in nats: bounds on the log-ratio.
    length_epsilon: added to the number of tokens that the mean divides by (the authors' code and verl: 1e-8).
  Returns:
    Terms, with the row's term on each of its masked tokens, and flags per token.
  Source: GMPO, arXiv 2507.20673; RSPO, arXiv 2510.23027v2 (before the clip) and v1 (after it).
  """
  if not (eps_low >= 0.0 and eps_high >= 0.0):
    raise ValueError(
      f"eps_low is {eps_low} and eps_high is {eps_high}; the log-ratio is bounded to [-eps_low, eps_high]: want "
      "both >= 0 (0.4 for a ratio in [exp(-0.4), exp(0.4)])."
    )
  if bounds not in ("ratio", "signed"):
    raise ValueError(f"bounds is {bounds!r}; want 'ratio' (bounds on q) or 'signed' (bounds on sign(A) q).")
  x = prepare(log_ratio, advantage, mask, log_shift, placement, per_token=False)
  clipped, low, high = clip(x.log_ratio, x.advantage, -(eps_low if bounds == "ratio" else eps_high), eps_high)
  sign = jnp.sign(x.advantage) if placement == "after_clip" else 1
  exponent = (clipped + sign * x.late_shift).sum(axis=1, keepdims=True) / (x.length + length_epsilon)
  return clipped_terms(x, jnp.exp(exponent) * x.advantage, low, high)


def rloo(
  log_ratio: Array,
  advantage: Array,
  mask: Array,
  *,
  log_shift: Array | None = None,
  placement: Placement = "before_clip",
  ratio: Literal["sequence", "token", "none"] = "sequence",
  eps_low: float = 0.2,
  eps_high: float = 0.2,
) -> Terms:
  """The objective of leave-one-out advantages, with one of three conventions for the ratio.

    "sequence" (TRL): the probability ratio of the whole sequence, exp(sum_t q_t), clipped as in PPO; not normalised
      by length. The sum is bounded by 30 nats.
    "token" (verl, OpenRLHF): PPO per token, that is `grpo`.
    "none" (the paper): REINFORCE, that is `policy_gradient`.

  Args and errors: as `rspo_jax.objectives.token_level.grpo`. With "sequence" the advantage is [B], and trust after the
    clip is the product over the row.
  Returns:
    Terms; for "sequence" with the row's term and flags on each of its masked tokens.
  Source: Ahmadian et al., arXiv 2402.14740.
  """
  shared = {"log_shift": log_shift, "placement": placement}
  if ratio == "none":
    return policy_gradient(log_ratio, advantage, mask, **shared)
  if ratio == "token":
    return grpo(log_ratio, advantage, mask, eps_low=eps_low, eps_high=eps_high, **shared)
  if ratio != "sequence":
    raise ValueError(f"ratio is {ratio!r}; want 'sequence', 'token' or 'none'.")
  x = prepare(log_ratio, advantage, mask, log_shift, placement, per_token=False)
  summed = x.log_ratio.sum(axis=1, keepdims=True)
  clipped, low, high = clip(summed, x.advantage, *ratio_bounds(eps_low, eps_high))
  late_shift = x.late_shift.sum(axis=1, keepdims=True)
  objective = jnp.exp(jnp.minimum(clipped, _MAX_LOG_RATIO) + late_shift) * x.advantage
  return clipped_terms(x, objective, low, high | (clipped > _MAX_LOG_RATIO))
