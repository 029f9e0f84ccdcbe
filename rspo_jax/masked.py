"""Exact reductions over the entries that a mask selects. Entries outside the mask may hold any value, also NaN.

Values are reduced in float32, or in float64 for float64 input. Subnormal numbers may count as 0.
"""

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

  Quantiles of parts do not add up: pass the whole minibatch. Sorts x.

  Args:
    x: any shape. mask: bool, same shape. qs: in [0, 1].
  Returns:
    [len(qs)] float32; NaN for an empty mask or if a selected entry is NaN. No gradient.
  Raises:
    ValueError: a q outside [0, 1].
  """
  if not all(0.0 <= q <= 1.0 for q in qs):
    raise ValueError(f"qs is {tuple(qs)}; want fractions in [0, 1] (0.99, not 99).")
  x = jax.lax.stop_gradient(_selected(x, mask, jnp.inf))
  ordered = jnp.sort(x.reshape(-1))
  count = mask.sum()
  last = jnp.maximum(count - 1, 0)
  position = jnp.asarray(qs, ordered.dtype) * last.astype(ordered.dtype)
  below = jnp.minimum(jnp.floor(position).astype(jnp.int32), last)  # a float32 of `last` may be larger than `last`
  low, high = ordered[below], ordered[jnp.minimum(below + 1, last)]
  fraction = position - below
  # Without interpolation the entry is taken unchanged: inf * 0 would be NaN. The weighted sum of both ends does not
  # overflow, unlike their difference.
  value = jnp.where((low == high) | (fraction == 0), low, low * (1 - fraction) + high * fraction)
  return jnp.where((count == 0) | jnp.any(jnp.isnan(x)), jnp.nan, value)


def effective_sample_size(log_weight: Array, mask: Array) -> Array:
  """Effective share of the selected samples under importance weights: (sum w)^2 / (n sum w^2).

  Args:
    log_weight: any shape, nats, < inf; a common offset cancels. mask: bool, same shape.
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
    x, y: same shape, any real type, any finite magnitude. mask: bool, same shape.
  Returns:
    [] float32 in [-1, 1]; 0 where one of them does not vary; NaN if a selected entry is NaN or infinite. No gradient.
  """
  x, y = _standardised(x, mask), _standardised(y, mask)
  return jnp.clip(jnp.sum(x * y), -1, 1)


def _standardised(x: Array, mask: Array) -> Array:
  """x less its mean, divided by its norm, where mask; 0 elsewhere, and everywhere if x does not vary."""
  x = jax.lax.stop_gradient(_selected(x, mask, 0))
  # Scaling by a power of two is exact; differences of entries and their inverses then neither over- nor underflow.
  x = x * jnp.where(jnp.abs(x).max() < 1, 2.0**64, 2.0**-64)
  # Relative to the smallest entry first: rounding is then relative to the range of x, not to its magnitude.
  x = jnp.where(mask, x - jnp.min(x, where=mask, initial=jnp.inf), 0)
  largest = x.max()
  varies = largest != 0
  x = x / jnp.where(varies, largest, 1)  # in [0, 1]
  x = jnp.where(mask, x - x.sum() / jnp.maximum(mask.sum(), 1), 0)
  return x / jnp.where(varies, jnp.sqrt(jnp.sum(x * x)), 1)
