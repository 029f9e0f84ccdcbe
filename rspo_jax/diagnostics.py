"""F1: what an update tells about itself: importance ratios, clipping, router shift, expert load."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rspo_jax import reductions
from rspo_jax.types import Array, Weighted


class ShiftStatistics(NamedTuple):
  """Per token, [B, T], slot-aligned, means over layers: drift (nats), overlap (share), log_shift = log gamma (nats)."""

  drift: Array
  overlap: Array
  log_shift: Array


class TokenStatistics(NamedTuple):
  """Per token, [B, T], slot-aligned: log_prob, entropy, log_ratio in nats; the clip flags; shift, None if unwatched."""

  log_prob: Array
  entropy: Array
  log_ratio: Array
  clipped_low: Array
  clipped_high: Array
  shift: ShiftStatistics | None


class RouterSums(NamedTuple):
  """Sums over action tokens, which add up over parts of a batch.

  load: [L, E] int32, choices of each expert. layer_drift: [L] float32, nats; None if the router is not watched.
  """

  load: Array
  layer_drift: Array | None


def token_metrics(tokens: TokenStatistics, mask: Array) -> dict[str, Array]:
  """Metrics of all action tokens of a minibatch; quantiles are exact, so give it the whole minibatch.

  Args:
    tokens: of the minibatch. mask: [B, T] bool, its action tokens.
  Returns:
    Scalars under the names of `rspo_jax.metrics.METRICS`. Ratios are pi_new / pi_old, without gamma.
  """

  def mean(x):
    return reductions.masked_mean(x, mask).mean

  p1, p50, p99, largest = jnp.exp(reductions.masked_quantiles(tokens.log_ratio, mask, (0.01, 0.5, 0.99, 1.0)))
  metrics = {
    "policy/entropy": mean(tokens.entropy),
    "policy/log_prob": mean(tokens.log_prob),
    "ratio/p1": p1,
    "ratio/p50": p50,
    "ratio/p99": p99,
    "ratio/max": largest,
    "ratio/ess": reductions.effective_sample_size(tokens.log_ratio, mask),
    "clip/low": mean(tokens.clipped_low),
    "clip/high": mean(tokens.clipped_high),
    "kl/approx": reductions.approx_kl(tokens.log_ratio, mask).mean,
  }
  if tokens.shift is not None:
    gamma = jnp.exp(tokens.shift.log_shift)
    metrics |= {
      "shift/gamma_mean": mean(gamma),
      "shift/gamma_p10": reductions.masked_quantiles(gamma, mask, (0.1,))[0],
      "shift/floor_fraction": mean(tokens.shift.drift > -tokens.shift.log_shift),
      "shift/drift": mean(tokens.shift.drift),
      "router/overlap": mean(tokens.shift.overlap),
    }
  return metrics


def router_metrics(router: RouterSums, mask: Array) -> dict[str, Array]:
  """Load metrics and, if the router was watched, the mean drift of each layer ([L], nats)."""
  metrics = load_metrics(router.load)
  if router.layer_drift is not None:
    metrics["shift/layer_drift"] = Weighted(router.layer_drift, mask.sum().astype(jnp.float32)).mean
  return metrics


def load_metrics(load: Array) -> dict[str, Array]:
  """How unevenly the experts are used: load [L, E] -> scalars, means over layers."""
  load = load.astype(jnp.float32)
  mean = load.mean(axis=-1)
  return {
    "router/load_max_over_mean": (load.max(axis=-1) / jnp.where(mean > 0, mean, 1)).mean(),
    "router/dead_fraction": (load == 0).mean(),
  }


def over_updates(updates: Sequence[dict[str, Array]]) -> dict[str, Array]:
  """One row of metrics for the updates of a step: means, but the largest "ratio/max" and the last count of skips."""
  combine = {"ratio/max": lambda x: x.max(axis=0), "updates/skipped": lambda x: x[-1]}
  stacked = jax.tree.map(lambda *values: jnp.stack(values), *updates)
  return {name: combine.get(name, lambda x: x.mean(axis=0))(values) for name, values in stacked.items()}
