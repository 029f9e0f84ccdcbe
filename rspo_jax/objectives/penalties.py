"""Penalties: the KL divergence from a reference policy, and the length of completions."""

import jax.numpy as jnp

from rspo_jax.types import Array

KL_ESTIMATORS = ("k1", "k2", "k3")


def kl(log_prob: Array, reference_log_prob: Array, estimator: str = "k3") -> Array:
  """Estimates KL(policy || reference) per token, at tokens sampled from the policy.

  With r = log_prob - reference_log_prob: k1 = r (unbiased, may be negative); k2 = r^2 / 2 (biased, small variance);
  k3 = exp(-r) - 1 + r (unbiased, >= 0).

  Used as a loss, their gradients differ (arXiv 2506.09477): in expectation, that of k1 is zero, that of k2 is the
  gradient of KL(policy || reference), and that of k3 is the gradient of KL(reference || policy). Use k1 in the reward,
  and k2 or k3 in the loss.

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
  """DAPO's soft penalty for completions near the length limit.

  0 up to max_length - buffer tokens, then falling linearly to -penalty at max_length, and constant beyond it (in verl's
  code it continues to fall).

  Args:
    length: [B], tokens. max_length, buffer: tokens, 0 < buffer <= max_length. penalty: in the reward's unit, >= 0.
  Returns:
    [B] float32, in [-penalty, 0], to be added to the reward.
  Raises:
    ValueError: a buffer outside (0, max_length], or a negative penalty.
  Source: DAPO, arXiv 2503.14476, eq. 13.
  """
  if not 0 < buffer <= max_length or penalty < 0:
    raise ValueError(
      f"buffer is {buffer}, max_length {max_length} and penalty {penalty}; want 0 < buffer <= max_length, both in "
      "tokens, and a penalty >= 0."
    )
  over = (jnp.asarray(length, jnp.float32) - (max_length - buffer)) / buffer
  return -penalty * jnp.clip(over, 0.0, 1.0)
