"""What is subtracted: the distance from a reference policy, and completions that are too long."""

import jax.numpy as jnp

from rspo_jax.types import Array

KL_ESTIMATORS = ("k1", "k2", "k3")


def kl(log_prob: Array, reference_log_prob: Array, estimator: str = "k3") -> Array:
  """Estimates KL(policy || reference) per token, at tokens the policy drew.

  With r = log_prob - reference_log_prob: k1 = r (unbiased, may be negative); k2 = r^2 / 2 (biased, small variance);
  k3 = exp(-r) - 1 + r (unbiased, >= 0).

  As a loss their gradients are different things (arXiv 2506.09477): k1's is zero on average, k2's is that of
  KL(policy || reference), k3's is that of KL(reference || policy). So k1 belongs into the reward, k2 or k3 into the
  loss.

  Args:
    log_prob, reference_log_prob: [B, T] nats; gradient flows into both.
  Returns:
    [B, T], at least float32, nats.
  Raises:
    ValueError: an unknown estimator.
  Source: Schulman, "Approximating KL Divergence", 2020.
  """
  if estimator not in KL_ESTIMATORS:
    raise ValueError(f"estimator is {estimator!r}; want one of {KL_ESTIMATORS}.")
  r = log_prob - reference_log_prob
  r = r.astype(jnp.promote_types(r.dtype, jnp.float32))
  if estimator == "k1":
    return r
  return r**2 / 2 if estimator == "k2" else jnp.maximum(jnp.expm1(-r) + r, 0)


def overlong_penalty(length: Array, *, max_length: int, buffer: int, penalty: float = 1.0) -> Array:
  """DAPO's soft punishment of completions that come near the length limit, counted in tokens.

  0 up to max_length - buffer tokens, then falling linearly to -penalty at max_length, and never lower (verl's code has
  no such floor).

  Args:
    length: [B], tokens. max_length, buffer: tokens, 0 < buffer <= max_length. penalty: in the reward's unit, >= 0.
  Returns:
    [B] float32, in [-penalty, 0], to be added to the reward.
  Raises:
    ValueError: a buffer that is not within max_length, or a negative penalty.
  Source: DAPO, arXiv 2503.14476, eq. 13.
  """
  if not 0 < buffer <= max_length or penalty < 0:
    raise ValueError(
      f"buffer is {buffer}, max_length {max_length} and penalty {penalty}; want 0 < buffer <= max_length, both in "
      "tokens, and a penalty >= 0."
    )
  over = (jnp.asarray(length, jnp.float32) - (max_length - buffer)) / buffer
  return -penalty * jnp.clip(over, 0.0, 1.0)
