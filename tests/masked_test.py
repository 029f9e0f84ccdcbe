"""Masked reductions equal numpy's on the selected subset, at any magnitude and with any values outside the mask."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rspo_jax.masked import effective_sample_size, masked_correlation, masked_mean, masked_quantiles
from rspo_jax.training.diagnostics import approx_kl

QS = (0.0, 0.01, 0.1, 0.25, 0.5, 0.9, 0.99, 1.0)
eager_and_jitted = pytest.mark.parametrize("way", [lambda f: f, jax.jit], ids=["eager", "jit"])
# Any magnitude, but no subnormal numbers: devices may flush them to 0, numpy does not.
floats = functools.partial(st.floats, width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False)


def rows(*columns):
  """Eight rows of values and whether they are selected."""
  return st.lists(st.tuples(*columns, st.booleans()), min_size=8, max_size=8)


quantiles = jax.jit(functools.partial(masked_quantiles, qs=QS))
correlation = jax.jit(masked_correlation)


def spoil_outside(x, mask):
  """x with NaN and infinities where the mask is False."""
  return np.where(mask, x, np.resize([np.nan, np.inf, -np.inf], x.shape)).astype(np.float32)


@given(rows(floats(-100, 100)))
@settings(max_examples=50, deadline=None)
def test_reductions_equal_numpy_on_the_selected_subset(rows):
  x, mask = (np.asarray(column).reshape(2, 4) for column in zip(*rows, strict=True))
  subset, x = x[mask].astype(np.float64), spoil_outside(x, mask)
  mean = masked_mean(x, mask)
  np.testing.assert_allclose(mean.total, subset.sum(), rtol=0, atol=1e-6 * np.abs(subset).sum())
  assert mean.weight == subset.size
  size = effective_sample_size(x, mask)
  if subset.size == 0:
    assert mean.mean == 0
    assert size == 0
    return
  weight = np.exp(subset - subset.max())
  np.testing.assert_allclose(size, weight.sum() ** 2 / (subset.size * (weight**2).sum()), rtol=1e-4)
  assert 1 / subset.size * (1 - 1e-5) <= size <= 1 + 1e-5


@given(rows(floats()))
@example([(3e38, True), (-3e38, True)] * 4)
@settings(max_examples=50, deadline=None)
def test_quantiles_equal_numpy_at_any_magnitude(rows):
  x, mask = (np.asarray(column) for column in zip(*rows, strict=True))
  subset, got = x[mask], quantiles(spoil_outside(x, mask), mask)
  if subset.size == 0:
    assert np.isnan(got).all()
    return
  np.testing.assert_allclose(got, np.quantile(subset, QS), rtol=0, atol=2e-6 * np.abs(subset).max() + 3e-38)


@eager_and_jitted
def test_quantiles_equal_numpy_on_many_values(way):
  rng = np.random.default_rng(0)
  x, mask = rng.normal(size=(50, 100)).astype(np.float32), rng.random((50, 100)) < 0.3
  got = way(functools.partial(masked_quantiles, qs=QS))(x, mask)
  np.testing.assert_allclose(got, np.quantile(x[mask], QS), rtol=1e-4, atol=1e-6)


def test_quantiles_of_selected_infinities_are_exact_and_of_nan_are_nan():
  mask = np.ones(5, bool)
  np.testing.assert_array_equal(
    masked_quantiles(np.asarray([-np.inf, 0, 1, np.inf, np.inf], np.float32), mask, (0, 0.25, 0.5, 0.875, 1)),
    [-np.inf, 0, 1, np.inf, np.inf],
  )
  assert np.isnan(masked_quantiles(np.asarray([0, 1, np.nan, 2, 3], np.float32), mask, (0.5,))).all()


def test_percentages_instead_of_fractions_are_refused():
  with pytest.raises(ValueError, match=r"qs is \(99,\); want fractions in \[0, 1\]"):
    masked_quantiles(np.zeros(3, np.float32), np.ones(3, bool), (99,))


@eager_and_jitted
def test_masked_mean_adds_up_over_a_split_and_has_no_gradient_outside(way):
  rng = np.random.default_rng(1)
  mask = rng.random((6, 5)) < 0.5
  x = spoil_outside(rng.normal(size=(6, 5)), mask)
  run = way(masked_mean)
  whole, parts = run(x, mask), run(x[:2], mask[:2]) + run(x[2:], mask[2:])
  assert whole.weight == parts.weight
  np.testing.assert_allclose(whole.mean, parts.mean, rtol=1e-6, atol=1e-7)
  gradient = way(jax.grad(lambda x: masked_mean(x, mask).mean))(x)
  np.testing.assert_array_equal(gradient != 0, mask)


def test_reduced_precision_is_summed_in_float32():
  x = jnp.full(4096, 1.0009765625, jnp.float16)
  mean = masked_mean(x, jnp.ones(4096, bool))
  assert mean.total.dtype == jnp.float32
  np.testing.assert_allclose(mean.mean, 1.0009765625, rtol=1e-6)


@eager_and_jitted
def test_effective_sample_size_does_not_depend_on_an_offset(way):
  mask = np.asarray([True, True, True, False])
  log_weight = np.asarray([0.0, 0.0, -30.0, 50.0], np.float32)
  for offset in (-500.0, 0.0, 500.0):
    np.testing.assert_allclose(way(effective_sample_size)(log_weight + np.float32(offset), mask), 2 / 3, rtol=1e-5)


def columns(*xs, unselected=0):
  """Examples for the test below: the values of x and of y, all selected but `unselected` more."""
  return [(*pair, True) for pair in zip(*xs, strict=True)] + [(1.0, 2.0, False)] * unselected


@given(rows(floats(), floats()))
@example(columns([0.0] * 8, range(8)))
@example(columns([1e4 + 2**-10, 1e4, 1e4, 1e4 + 2**-9, 1e4], [3, 1, 1, 4, 0], unselected=3))
@example(columns([2e-38, 3e-38, 3e-38, 5e-38], [3e38, -3e38, 1e38, 0], unselected=4))
@settings(max_examples=100, deadline=None)
def test_correlation_equals_numpy_at_any_magnitude(rows):
  x, y, mask = (np.asarray(column) for column in zip(*rows, strict=True))
  got = correlation(spoil_outside(x, mask), spoil_outside(y, mask), mask)
  x, y = (value[mask].astype(np.float32).astype(np.float64) for value in (x, y))
  varies = x.size > 0 and np.ptp(x) > 0 and np.ptp(y) > 0
  np.testing.assert_allclose(got, np.corrcoef(x, y)[0, 1] if varies else 0.0, rtol=0, atol=1e-5)
  assert -1 <= got <= 1


@eager_and_jitted
@pytest.mark.parametrize("spoiled", [np.nan, np.inf, -np.inf])
def test_a_correlation_of_values_that_are_not_finite_is_nan(way, spoiled):
  x, mask = np.asarray([1, 2, spoiled], np.float32), np.ones(3, bool)
  assert np.isnan(way(masked_correlation)(x, np.arange(3.0), mask))
  assert np.isnan(way(masked_correlation)(np.arange(3.0), x, mask))


@eager_and_jitted
def test_correlation_by_hand(way):
  run = way(masked_correlation)
  mask = np.asarray([True, True, True, False])
  x = np.asarray([1, 2, 4, np.nan], np.float32)
  for scale in (2.0, -0.1):
    np.testing.assert_allclose(run(x, (x * scale + 3).astype(np.float32), mask), np.sign(scale), rtol=1e-6)
  constant = np.asarray([2, 2, 2, np.inf], np.float32)
  assert run(x, constant, mask) == run(constant, x, mask) == run(x, x, mask & False) == 0
  gradient = way(jax.grad(masked_correlation, argnums=(0, 1)))(x, x, mask)
  assert not any(g.any() for g in gradient)


def test_approx_kl_estimates_the_divergence_of_the_new_from_the_old_policy():
  """Exact for tokens in the old policy's proportions: KL(old || new), not KL(new || old)."""
  old, new = np.asarray([0.7, 0.2, 0.1]), np.asarray([0.3, 0.3, 0.4])
  tokens = np.repeat(np.arange(3), [7, 2, 1])
  log_ratio = np.append(np.log(new / old)[tokens], np.nan).astype(np.float32)
  mask = np.append(np.ones(10, bool), False)
  kl = approx_kl(log_ratio, mask)
  assert kl.weight == 10
  forward, backward = (old * np.log(old / new)).sum(), (new * np.log(new / old)).sum()
  np.testing.assert_allclose(kl.mean, forward, rtol=1e-5)
  assert abs(forward - backward) > 0.01
