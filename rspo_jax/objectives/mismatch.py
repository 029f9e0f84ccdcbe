"""Weights against a sampler that is not the trainer: another engine, another precision, an older policy.

The sampler drew from mu, the trainer's forward says pi_old; m = pi_old / mu. Off by default: our sampler and trainer
share a forward, and m is 1 to rounding.
"""

import dataclasses

import jax
import jax.numpy as jnp

from rspo_jax.types import Array

CORRECTIONS = ("tis", "mis", "icepop")
LEVELS = ("token", "sequence", "sequence_mean")


@dataclasses.dataclass(frozen=True)
class MismatchOptions:
  """Which correction, and its thresholds, all in ratio space.

  Attributes:
    correction: "tis", truncated importance sampling, weight min(m, upper); "mis", masked: weight m where m <= upper,
      else 0; "icepop", a band: weight m where lower <= m <= upper, else 0.
    level: "token", m of every token; "sequence", the product over the row; "sequence_mean", its geometric mean.
    upper: largest m, > 0. Usual: 2 for tis and mis, 5 for icepop.
    lower: smallest m, in [0, upper]; only icepop reads it (usual: 0.5).
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
  """The weight of every token's term. A weight of 0 takes the token out of the sum but not out of the normaliser.

  Args:
    old_log_prob, sampler_log_prob: [B, T] nats, of the same tokens at the same temperature under the trainer's and the
      sampler's forward of the policy that sampled. mask: [B, T] bool.
  Returns:
    [B, T] float32, >= 0, no gradient; 0 outside the mask.
  Source: TIS: Yao et al., "Your efficient RL framework secretly brings you off-policy RL
    training", 2025; MIS: Liu et al., "When speed kills stability", 2025; IcePop: arXiv 2510.18855.
  """
  log_ratio = jnp.where(mask, old_log_prob.astype(jnp.float32) - sampler_log_prob.astype(jnp.float32), 0)
  if options.level != "token":
    whole = log_ratio.sum(axis=1, keepdims=True)
    if options.level == "sequence_mean":
      whole = whole / jnp.maximum(mask.sum(axis=1, keepdims=True), 1)
    log_ratio = jnp.broadcast_to(whole, mask.shape)
  ratio = jnp.exp(log_ratio)
  if options.correction == "tis":
    weight = jnp.minimum(ratio, options.upper)
  else:
    least = options.lower if options.correction == "icepop" else 0.0
    weight = jnp.where((ratio >= least) & (ratio <= options.upper), ratio, 0)
  return jax.lax.stop_gradient(jnp.where(mask, weight, 0))
