"""Weights that correct for a sampler that differs from the trainer: another engine or precision, an older policy.

mu is the sampler's probability of a token, pi_old that of the trainer's forward, and m = pi_old / mu. Off by default:
sampler and trainer of this library use the same weights, so m is 1 up to rounding.
"""

import dataclasses

import jax
import jax.numpy as jnp

from rspo_jax.types import Array

CORRECTIONS = ("tis", "mis", "icepop")
LEVELS = ("token", "sequence", "sequence_mean")


@dataclasses.dataclass(frozen=True)
class MismatchOptions:
  """A correction of each token's term by the ratio m = pi_old / mu of trainer and sampler.

  Attributes:
    correction: "tis", truncated importance sampling: weight min(m, upper); "mis", masked importance sampling: m where
      m <= upper, else 0; "icepop": m where lower <= m <= upper, else 0.
    level: "token", m of every token; "sequence", the product of m over the row; "sequence_mean", its geometric mean.
    upper: largest m, a ratio > 0. Usual: 2 for "tis" and "mis", 5 for "icepop".
    lower: smallest m, a ratio in [0, upper]; only "icepop" reads it. Usual: 0.5.
  """

  correction: str = "tis"
  level: str = "token"
  upper: float = 2.0
  lower: float = 0.5

  def __post_init__(self):
    if self.correction not in CORRECTIONS or self.level not in LEVELS:
      raise ValueError(
        f"correction is {self.correction!r} and level {self.level!r}; want one of {CORRECTIONS} and one of {LEVELS}."
      )
    if not 0 <= self.lower <= self.upper or self.upper <= 0:
      raise ValueError(
        f"lower is {self.lower} and upper {self.upper}; want ratios with 0 <= lower <= upper, upper > 0."
      )


def mismatch_weight(old_log_prob: Array, sampler_log_prob: Array, mask: Array, options: MismatchOptions) -> Array:
  """The weight of every token's term. A weight of 0 removes the token from the sum but not from the normaliser.

  Args:
    old_log_prob, sampler_log_prob: [B, T] nats, of the sampled tokens at temperature 1, from the trainer's and the
      sampler's forward. mask: [B, T] bool.
  Returns:
    [B, T] float32, >= 0, no gradient; 0 outside the mask.
  Source: TIS: Yao et al., "Your efficient RL framework secretly brings you off-policy RL training", 2025; MIS: Liu et
    al., "When speed kills stability", 2025; IcePop: arXiv 2510.18855.
  """
  log_ratio = jnp.where(mask, old_log_prob.astype(jnp.float32) - sampler_log_prob.astype(jnp.float32), 0)
  if options.level != "token":
    of_row = log_ratio.sum(axis=1, keepdims=True)
    if options.level == "sequence_mean":
      of_row = of_row / jnp.maximum(mask.sum(axis=1, keepdims=True), 1)
    log_ratio = jnp.broadcast_to(of_row, mask.shape)
  ratio = jnp.exp(log_ratio)
  if options.correction == "tis":
    weight = jnp.minimum(ratio, options.upper)
  else:
    lower = options.lower if options.correction == "icepop" else 0.0
    weight = jnp.where((ratio >= lower) & (ratio <= options.upper), ratio, 0)
  return jax.lax.stop_gradient(jnp.where(mask, weight, 0))
