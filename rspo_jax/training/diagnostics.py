"""Metrics of an update: importance ratios, clipping, router shift, expert load."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rspo_jax.masked import effective_sample_size, masked_correlation, masked_mean, masked_quantiles
from rspo_jax.objectives.penalties import kl
from rspo_jax.types import Array, Weighted


class TokenStatistics(NamedTuple):
  """Per token, [B, T], slot-aligned.

  Attributes:
    log_prob, entropy, log_ratio: nats; log_ratio is log pi_new - log pi_old, without router shift.
    clipped_low, clipped_high, grad_clipped: see `rspo_jax.objectives.terms.Terms`.
    deviation: of the router, over layers; None without router shift.
    log_shift: log gamma, nats, <= 0; None without router shift.
    kl: to the reference policy, nats; None without a KL term.
    mismatch_weight: see `rspo_jax.objectives.mismatch`; None without a correction.
  """

  log_prob: Array
  entropy: Array
  log_ratio: Array
  clipped_low: Array
  clipped_high: Array
  grad_clipped: Array
  deviation: Array | None = None
  log_shift: Array | None = None
  kl: Array | None = None
  mismatch_weight: Array | None = None


class RouterSums(NamedTuple):
  """Sums over action tokens; those of several parts of a batch add up.

  Attributes:
    load: [L, E] int32, choices of each expert. entropy: [L] float32, nats.
    deviation, overlap: [L] float32, see `rspo_jax.router.trace.RoutingDrift`; None without router shift.
  """

  load: Array
  entropy: Array
  deviation: Array | None = None
  overlap: Array | None = None


def token_metrics(tokens: TokenStatistics, mask: Array) -> dict[str, Array]:
  """Metrics of all action tokens of a minibatch. Quantiles of parts do not add up: pass the whole minibatch.

  Args:
    tokens: of the minibatch. mask: [B, T] bool, its action tokens.
  Returns:
    Scalars by the names of `rspo_jax.run.metrics.METRICS`. Ratios are pi_new / pi_old, without gamma.
  """

  def mean(x):
    return masked_mean(x, mask).mean

  p1, p50, p99, largest = jnp.exp(masked_quantiles(tokens.log_ratio, mask, (0.01, 0.5, 0.99, 1.0)))
  metrics = {
    "policy/entropy": mean(tokens.entropy),
    "policy/log_prob": mean(tokens.log_prob),
    "ratio/p1": p1,
    "ratio/p50": p50,
    "ratio/p99": p99,
    "ratio/max": largest,
    "ratio/tail": mean(jnp.abs(tokens.log_ratio) > jnp.log(2.0)),
    "ratio/chi_square": mean(jnp.expm1(tokens.log_ratio) ** 2),
    "ratio/ess": effective_sample_size(tokens.log_ratio, mask),
    "clip/low": mean(tokens.clipped_low),
    "clip/high": mean(tokens.clipped_high),
    "clip/effective": mean(tokens.grad_clipped),
    "kl/approx": approx_kl(tokens.log_ratio, mask).mean,
  }
  if tokens.log_shift is not None:
    gamma = jnp.exp(tokens.log_shift)
    p10, p50 = masked_quantiles(gamma, mask, (0.1, 0.5))
    metrics |= {
      "shift/gamma_mean": mean(gamma),
      "shift/gamma_p10": p10,
      "shift/gamma_p50": p50,
      "shift/floor_fraction": mean(tokens.deviation > -tokens.log_shift),
      "shift/drift": mean(tokens.deviation),
      "shift/ratio_correlation": masked_correlation(tokens.deviation, jnp.abs(tokens.log_ratio), mask),
    }
  if tokens.kl is not None:
    metrics["kl/reference"] = mean(tokens.kl)
  if tokens.mismatch_weight is not None:
    metrics |= {
      "mismatch/weight_mean": mean(tokens.mismatch_weight),
      "mismatch/dropped": mean(tokens.mismatch_weight == 0),
    }
  return metrics


def router_metrics(router: RouterSums, mask: Array) -> dict[str, Array]:
  """Metrics of the routers: load and entropy and, with router shift, drift and overlap.

  Args:
    router: sums over the minibatch. mask: [B, T] bool, its action tokens.
  Returns:
    Scalars by the names of `rspo_jax.run.metrics.METRICS`; "*/layer_*" are [L].
  """
  tokens = mask.sum().astype(jnp.float32)
  metrics = load_metrics(router.load) | {"router/layer_entropy": Weighted(router.entropy, tokens).mean}
  metrics["router/entropy"] = metrics["router/layer_entropy"].mean()
  if router.deviation is not None:
    overlap = Weighted(router.overlap, tokens).mean
    metrics |= {
      "shift/layer_drift": Weighted(router.deviation, tokens).mean,
      "router/layer_overlap": overlap,
      "router/overlap": overlap.mean(),
    }
  return metrics


def load_metrics(load: Array) -> dict[str, Array]:
  """How uneven the load of the experts is: load [L, E] -> scalars, means over layers."""
  load = load.astype(jnp.float32)
  mean = load.mean(axis=-1)
  return {
    "router/load_max_over_mean": (load.max(axis=-1) / jnp.where(mean > 0, mean, 1)).mean(),
    "router/dead_fraction": (load == 0).mean(),
  }


def over_updates(updates: Sequence[dict[str, Array]]) -> dict[str, Array]:
  """Metrics of an RL step from those of its updates: means, but the largest "ratio/max" and last "updates/skipped"."""
  combine = {"ratio/max": lambda x: x.max(axis=0), "updates/skipped": lambda x: x[-1]}
  stacked = jax.tree.map(lambda *values: jnp.stack(values), *updates)
  return {name: combine.get(name, lambda x: x.mean(axis=0))(values) for name, values in stacked.items()}


def approx_kl(log_ratio: Array, mask: Array) -> Weighted:
  """Mean k3 estimate of KL(pi_old || pi_new), nats.

  Args:
    log_ratio: [B, T] log pi_new - log pi_old, nats, of tokens sampled from pi_old. mask: [B, T] bool.
  """
  return masked_mean(kl(-jnp.where(mask, log_ratio, 0), jnp.zeros(()), "k3"), mask)
