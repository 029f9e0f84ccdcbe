"""Exact reductions over the entries a mask selects. What is masked out may be anything, also NaN."""

from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp

from rspo_jax.types import Array, Weighted


def _selected(x: Array, mask: Array, fill: float) -> Array:
  """x in at least float32, `fill` where the mask is False."""
  chex.assert_equal_shape([x, mask])
  chex.assert_type(mask, bool)
  return jnp.where(mask, x.astype(jnp.promote_types(x.dtype, jnp.float32)), fill)


def masked_mean(x: Array, mask: Array) -> Weighted:
  """The mean of x where mask, as a pair that adds up over parts of a batch.

  Args:
    x: any shape and real type. mask: bool, same shape.
  Returns:
    Weighted of scalars (sum, count); `.mean` is 0 for an empty mask.
  """
  return Weighted(_selected(x, mask, 0).sum(), mask.sum().astype(jnp.float32))


def masked_quantiles(x: Array, mask: Array, qs: Sequence[float]) -> Array:
  """Exact quantiles of x where mask, interpolated linearly: numpy.quantile(x[mask], qs).

  Quantiles do not add up: give it the whole minibatch. Sorts, so its cost is that of sorting x.

  Args:
    x: any shape. mask: bool, same shape. qs: in [0, 1].
  Returns:
    [len(qs)] float32; NaN for an empty mask, and wherever a selected entry is NaN. No gradient.
  Raises:
    ValueError: a q outside [0, 1].
  """
  if not all(0.0 <= q <= 1.0 for q in qs):
    raise ValueError(f"qs is {tuple(qs)}; want fractions in [0, 1] (0.99, not 99).")
  x = jax.lax.stop_gradient(_selected(x, mask, jnp.inf))
  ordered = jnp.sort(x.reshape(-1))
  count = mask.sum()
  position = jnp.asarray(qs, ordered.dtype) * jnp.maximum(count - 1, 0).astype(ordered.dtype)
  below = jnp.floor(position).astype(jnp.int32)
  above = jnp.minimum(below + 1, jnp.maximum(count - 1, 0))
  low, high = ordered[below], ordered[above]
  fraction = position - below
  # Nothing to interpolate: taken as it is, for inf - inf and inf * 0 would be NaN.
  value = jnp.where((low == high) | (fraction == 0), low, low + (high - low) * fraction)
  spoiled = (count == 0) | jnp.any(jnp.isnan(x))
  return jnp.where(spoiled, jnp.nan, value)


def effective_sample_size(log_weight: Array, mask: Array) -> Array:
  """The share of the selected samples that importance weighting leaves in effect: (sum w)^2 / (n sum w^2).

  Args:
    log_weight: any shape, nats; a common offset does not matter. mask: bool, same shape.
  Returns:
    [] float32 in [1/n, 1], 1 for equal weights; 0 for an empty mask. No gradient.
  """
  log_weight = jax.lax.stop_gradient(_selected(log_weight, mask, -jnp.inf))
  largest = log_weight.max()
  weight = jnp.exp(log_weight - jnp.where(jnp.isneginf(largest), 0, largest))
  squares = (weight**2).sum() * mask.sum()
  return jnp.where(squares == 0, 0, weight.sum() ** 2 / jnp.where(squares == 0, 1, squares))


def masked_correlation(x: Array, y: Array, mask: Array) -> Array:
  """Pearson's correlation of x and y where mask.

  Args:
    x, y: same shape, any real type. mask: bool, same shape.
  Returns:
    [] float32 in [-1, 1]; 0 where one of them does not vary. No gradient.
  """
  x, y = (jax.lax.stop_gradient(_selected(value, mask, 0)) for value in (x, y))
  count = jnp.maximum(mask.sum(), 1)
  x, y = (jnp.where(mask, value - value.sum() / count, 0) for value in (x, y))
  spread = jnp.sqrt(jnp.sum(x * x) * jnp.sum(y * y))
  return jnp.where(spread > 0, jnp.sum(x * y) / jnp.where(spread > 0, spread, 1), 0)
