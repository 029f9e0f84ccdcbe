"""The four aggregations by hand and against numpy, and their weights."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rspo_jax.objectives.aggregation import AGGREGATIONS, aggregate, aggregation_weight

VALUES = np.asarray([[1, 2, 6], [0, 5, 0], [0, 0, 0]], np.float32)
MASK = np.asarray([[True, True, True], [False, True, False], [False, False, False]])
each_mode = pytest.mark.parametrize("mode", AGGREGATIONS)


@pytest.mark.parametrize("way", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize(
  ("mode", "total", "weight"),
  [
    ("token_mean", 14.0, 4),
    ("seq_mean_token_mean", 3.0 + 5.0, 2),
    ("seq_mean_token_sum", 14.0, 2),
    ("seq_mean_token_sum_norm", 14.0 / 8, 2),
  ],
)
def test_aggregation_by_hand(way, mode, total, weight):
  """Including an empty row, which has no weight."""
  result = way(functools.partial(aggregate, mode=mode, norm_length=8))(VALUES, MASK)
  assert (result.total, result.weight, result.mean) == (total, weight, total / weight)
  assert result.weight.dtype == jnp.float32


@given(st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=3, max_size=3))
@settings(max_examples=30, deadline=None)
def test_means_equal_numpy_row_by_row(mask):
  mask = np.asarray(mask)
  values = np.where(mask, np.linspace(-1, 2, 12).reshape(3, 4), 0).astype(np.float32)
  rows = [row[chosen] for row, chosen in zip(values, mask, strict=True) if chosen.any()]
  mean = lambda xs: np.mean(xs) if len(xs) else 0.0
  for mode, want in {
    "token_mean": mean(values[mask]),
    "seq_mean_token_mean": mean([row.mean() for row in rows]),
    "seq_mean_token_sum": mean([row.sum() for row in rows]),
    "seq_mean_token_sum_norm": mean([row.sum() / 4 for row in rows]),
  }.items():
    np.testing.assert_allclose(aggregate(values, mask, mode, norm_length=4).mean, want, rtol=1e-5, atol=1e-6)


@each_mode
def test_the_weight_depends_on_the_mask_alone(mode):
  for values in (VALUES, VALUES * 0, -VALUES):
    assert aggregate(values, MASK, mode, norm_length=8).weight == aggregation_weight(MASK, mode)


@each_mode
def test_an_empty_mask_has_mean_zero(mode):
  result = aggregate(VALUES * 0, MASK & False, mode, norm_length=8)
  assert result.total == result.weight == result.mean == 0


@each_mode
def test_doubling_every_row_keeps_the_mean_and_doubles_the_weight(mode):
  one = aggregate(VALUES, MASK, mode, norm_length=8)
  two = aggregate(np.tile(VALUES, (2, 1)), np.tile(MASK, (2, 1)), mode, norm_length=8)
  np.testing.assert_allclose(two.mean, one.mean, rtol=1e-6)
  assert two.weight == 2 * one.weight


def test_invalid_arguments_are_refused_with_a_cure():
  for function in (functools.partial(aggregate, VALUES), aggregation_weight):
    with pytest.raises(ValueError, match=r"aggregation is 'mean'; want one of .*token_mean"):
      function(MASK, "mean")
  for length in (None, 0):
    with pytest.raises(ValueError, match=rf"norm_length is {length}.*largest number of new"):
      aggregate(VALUES, MASK, "seq_mean_token_sum_norm", norm_length=length)
  with pytest.raises(AssertionError):
    aggregate(VALUES[:2], MASK, "token_mean")
  with pytest.raises(AssertionError):
    aggregation_weight(MASK.astype(np.float32), "token_mean")


def test_with_a_constant_length_the_weight_of_a_token_does_not_depend_on_its_rows_length():
  """The argument of Dr.GRPO; with the mean over the row it does."""
  of_a_token = lambda mode: jax.grad(lambda v: aggregate(v, MASK, mode, norm_length=8).mean)(VALUES)[:2, 1]
  long, short = of_a_token("seq_mean_token_sum_norm")
  assert long == short == 1 / 16
  long, short = of_a_token("seq_mean_token_mean")
  assert math.isclose(3 * long, short, rel_tol=1e-6)
