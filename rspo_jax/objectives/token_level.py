"""Policy-gradient objectives with one term per token, in log space and with one signature.

    objective(log_ratio [B, T], advantage [B] or [B, T], mask [B, T], *, log_shift, placement, **options) -> Terms

With q the token's log importance ratio, w = exp(q), sg the stop-gradient and clip one-sided
(`rspo_jax.objectives.terms`):

    policy_gradient  J[t] = A * exp(q[t] - sg q[t])                      no ratio: on-policy REINFORCE
    grpo             J[t] = A * exp(clip(q[t]))                          also Dr.GRPO, DAPO, REINFORCE++
    cispo            J[t] = A * sg(bounded w[t]) * exp(q[t] - sg q[t])   bounds never remove a gradient
    sapo             J[t] = A * 4 / tau * sigmoid(tau * (w[t] - 1))      a soft gate instead of a clip
    gspo_token       J[t] = A[t] * exp(clip(sg(mean q) + q[t] - sg q[t]))

Papers write REINFORCE as A * log pi; the form here has the same gradient and, as all other objectives except sapo, the
value A at ratio 1.
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp

from rspo_jax.objectives.terms import Terms, clip, clipped_terms, prepare, ratio_bounds, with_gradient_of
from rspo_jax.types import Array, Placement


def policy_gradient(
  log_ratio: Array,
  advantage: Array,
  mask: Array,
  *,
  log_shift: Array | None = None,
  placement: Placement = "before_clip",
) -> Terms:
  """REINFORCE: the gradient of A log pi, without regard to the sampling policy.

  There is no clip, so all placements of router shift are equivalent: trust scales the token's term.

  Args and returns: as `grpo`, without bounds; nothing is ever clipped.
  Source: Williams, 1992.
  """
  late = "weight" if placement == "before_clip" else placement  # the shift has no ratio to enter
  x = prepare(log_ratio, advantage, mask, log_shift, late, per_token=True)
  never = jnp.zeros_like(x.active)
  return clipped_terms(x, jnp.exp(x.late_shift) * with_gradient_of(x.log_ratio) * x.advantage, never, never)


def grpo(
  log_ratio: Array,
  advantage: Array,
  mask: Array,
  *,
  log_shift: Array | None = None,
  placement: Placement = "before_clip",
  eps_low: float = 0.2,
  eps_high: float = 0.2,
  dual_clip: float | None = None,
) -> Terms:
  """PPO's clipped surrogate per token: min(w A, clip(w, 1 - eps_low, 1 + eps_high) A).

  As in PPO, a large ratio is not bounded for A < 0 unless `dual_clip` is set; it overflows float32 beyond 88 nats.

  Args:
    log_ratio: [B, T] log pi_new - log pi_old of the tokens, nats; any value, also NaN, outside the mask.
    advantage: [B], the same for every token of the row, or [B, T]; a constant for the gradient.
    mask: [B, T] bool, the tokens the policy sampled.
    log_shift: [B, T] log trust in each token, nats, <= 0; a constant for the gradient. None is the same as 0.
    placement: "before_clip": w is pi_new / pi_old * trust (RSPO v2). "after_clip" and "weight": the clipped term
      times trust (the two differ only in gmpo).
    eps_low, eps_high: distances of the bounds from 1, in ratio space.
    dual_clip: largest ratio for A < 0, > 1 (verl: 3, its DAPO recipe: 10); None for no such bound.
  Returns:
    Terms per token.
  Raises:
    ValueError: unknown placement, bounds that are no interval around 1, or a dual_clip not above 1.
  Source: DeepSeekMath, arXiv 2402.03300, eq. 3 (its KL term is `rspo_jax.objectives.penalties.kl`); PPO, arXiv
    1707.06347, eq. 7; dual clip: arXiv 1912.09729; different bounds: DAPO, arXiv 2503.14476, eq. 8.
  """
  x = prepare(log_ratio, advantage, mask, log_shift, placement, per_token=True)
  clipped, low, high = clip(x.log_ratio, x.advantage, *ratio_bounds(eps_low, eps_high))
  if dual_clip is not None:
    if not dual_clip > 1.0:
      raise ValueError(f"dual_clip is {dual_clip}; want a ratio above 1 (3.0 is usual), or None for no bound.")
    upper = math.log(dual_clip)
    over = (x.log_ratio > upper) & (x.advantage < 0)
    clipped, high = jnp.where(over, upper, clipped), high | over
  return clipped_terms(x, jnp.exp(clipped + x.late_shift) * x.advantage, low, high)


def cispo(
  log_ratio: Array,
  advantage: Array,
  mask: Array,
  *,
  log_shift: Array | None = None,
  placement: Placement = "before_clip",
  eps_low: float | None = None,
  eps_high: float | None = None,
  bounds: Literal["around_one", "absolute"] = "around_one",
) -> Terms:
  """REINFORCE with a bounded importance weight that is a constant, so that no token loses its gradient.

  Two conventions for the bounds:
    "around_one" (the paper, verl): the weight is bounded to [1 - eps_low, 1 + eps_high]; defaults 1.0 and 4.0.
    "absolute" (TRL, ScaleRL): it is bounded to [eps_low, eps_high]; defaults 0.0 and 5.0, which is the same interval.

  Args and errors: as `grpo`, except that both bounds apply for both signs of A. Router shift before the clip multiplies
    the weight before it is bounded, the other placements after.
  Returns:
    Terms per token; `clipped_low` and `clipped_high` mark bounded weights, `grad_clipped` is False.
  Source: MiniMax-M1, arXiv 2506.13585.
  """
  if bounds == "around_one":
    lower, upper = ratio_bounds(1.0 if eps_low is None else eps_low, 4.0 if eps_high is None else eps_high)
  elif bounds == "absolute":
    low, high = 0.0 if eps_low is None else eps_low, 5.0 if eps_high is None else eps_high
    if not 0.0 <= low <= 1.0 <= high:
      raise ValueError(
        f"eps_low is {low} and eps_high is {high}; with bounds='absolute' the weight is bounded to [eps_low, "
        "eps_high]: want an interval that contains 1. For distances from 1 use bounds='around_one'."
      )
    lower, upper = math.log(low) if low > 0 else -math.inf, math.log(high)
  else:
    raise ValueError(f"bounds is {bounds!r}; want 'around_one' (1 - eps_low, 1 + eps_high) or 'absolute'.")
  x = prepare(log_ratio, advantage, mask, log_shift, placement, per_token=True)
  weight = jax.lax.stop_gradient(jnp.exp(jnp.clip(x.log_ratio, lower, upper) + x.late_shift))
  terms = clipped_terms(
    x, weight * with_gradient_of(x.log_ratio) * x.advantage, x.log_ratio < lower, x.log_ratio > upper
  )
  return terms._replace(grad_clipped=jnp.zeros_like(x.active))


def sapo(
  log_ratio: Array,
  advantage: Array,
  mask: Array,
  *,
  log_shift: Array | None = None,
  placement: Placement = "before_clip",
  tau_pos: float = 1.0,
  tau_neg: float = 1.05,
) -> Terms:
  """A soft gate around ratio 1 instead of a clip: J = A * 4 / tau * sigmoid(tau * (w - 1)).

  At ratio 1 the gradient is that of REINFORCE and the value 2 A / tau; the gradient decays smoothly on both sides.

  Args: as `grpo`, except
    tau_pos, tau_neg: sharpness of the gate for A > 0 and for A <= 0, > 0, per unit of ratio.
  Returns:
    Terms per token; nothing is ever clipped.
  Raises:
    ValueError: unknown placement, or a tau that is not positive.
  Source: SAPO, arXiv 2511.20347.
  """
  if not (tau_pos > 0.0 and tau_neg > 0.0):
    raise ValueError(f"tau_pos is {tau_pos} and tau_neg is {tau_neg}; want both > 0 (1.0 and 1.05 in the paper).")
  x = prepare(log_ratio, advantage, mask, log_shift, placement, per_token=True)
  tau = jnp.where(x.advantage > 0, tau_pos, tau_neg).astype(x.log_ratio.dtype)
  # Far above ratio 1 the gate is flat; the bound keeps exp finite, because 0 * inf would be NaN in the gradient.
  gate = jax.nn.sigmoid(tau * jnp.expm1(jnp.minimum(x.log_ratio, 60.0))) * 4 / tau
  never = jnp.zeros_like(x.active)
  return clipped_terms(x, gate * jnp.exp(x.late_shift) * x.advantage, never, never)


def gspo_token(
  log_ratio: Array,
  advantage: Array,
  mask: Array,
  *,
  log_shift: Array | None = None,
  placement: Placement = "before_clip",
  eps_low: float = 3e-4,
  eps_high: float = 4e-4,
) -> Terms:
  """GSPO's sequence ratio on every token, so that every token can have its own advantage.

  With one advantage per row it has GSPO's value and gradient under "seq_mean_token_mean". Router shift before the clip
  enters the sequence ratio (`rspo_jax.objectives.sequence_level.gspo` describes why that suppresses gradients); with
  the other placements a token's trust multiplies its own term.

  Args and errors: as `grpo`. Returns: Terms per token.
  Source: GSPO, arXiv 2507.18071, section on GSPO-token.
  """
  x = prepare(log_ratio, advantage, mask, log_shift, placement, per_token=True)
  # The ratio is that of all tokens of the sequence, including those with zero advantage.
  complete = prepare(log_ratio, jnp.ones(mask.shape, x.advantage.dtype), mask, log_shift, placement, per_token=True)
  ratio = jax.lax.stop_gradient(complete.mean(complete.log_ratio)) + x.log_ratio - jax.lax.stop_gradient(x.log_ratio)
  clipped, low, high = clip(ratio, x.advantage, *ratio_bounds(eps_low, eps_high))
  return clipped_terms(x, jnp.exp(clipped + x.late_shift) * x.advantage, low, high)
