"""Advantages: groups by hand and against numpy, the conventions, and groups of equal rewards."""

import functools
import math

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rspo_jax.objectives.advantages import (
  BASELINES,
  SCALES,
  AdvantageOptions,
  compute_advantages,
  group_advantages,
  token_advantages,
  whiten,
  zero_variance,
  zero_variance_fraction,
)

eager_and_jitted = pytest.mark.parametrize("way", [lambda f: f, jax.jit], ids=["eager", "jit"])
REWARD = np.asarray([1, 0, 0, 1, 0, 0, 2, 0], np.float32)
MEAN_REMOVED = [0.5, -0.5, -0.5, 0.5, -0.5, -0.5, 1.5, -0.5]


@eager_and_jitted
@pytest.mark.parametrize(
  ("options", "want"),
  [
    # Deviations: sqrt(1/3) and 1 by n - 1; 1/2 and sqrt(3)/2 by n.
    ({}, [0.75**0.5, -(0.75**0.5), -(0.75**0.5), 0.75**0.5, -0.5, -0.5, 1.5, -0.5]),
    (dict(ddof=0), [1, -1, -1, 1, *np.asarray([-1, -1, 3, -1]) / math.sqrt(3)]),
    (dict(scale="none"), MEAN_REMOVED),
    (dict(scale="batch_std"), MEAN_REMOVED),  # the tokens' deviation, see whiten
    (dict(baseline="leave_one_out", scale="none"), np.asarray(MEAN_REMOVED) * 4 / 3),
    (dict(baseline="none", scale="none"), REWARD),
    (dict(epsilon=1.0, ddof=0), [1 / 3, -1 / 3, -1 / 3, 1 / 3, *np.asarray([-0.5, -0.5, 1.5, -0.5]) / (1 + 0.75**0.5)]),
  ],
  ids=str,
)
def test_advantages_by_hand(way, options, want):
  advantage = way(functools.partial(group_advantages, group=4, **options))(REWARD)
  assert advantage.dtype == np.float32
  np.testing.assert_allclose(advantage, want, rtol=1e-5)


def reference(reward, group, keep, baseline, scale, ddof):
  """Row by row, from the definition, in float64."""
  out = np.zeros(len(reward))
  for i in np.flatnonzero(keep):
    members = [reward[j] for j in np.flatnonzero(keep) if group[j] == group[i]]
    rest = [reward[j] for j in np.flatnonzero(keep) if group[j] == group[i] and j != i]
    base = {"group_mean": np.mean(members), "leave_one_out": np.mean(rest) if rest else reward[i], "none": 0}[baseline]
    out[i] = reward[i] - base
    if scale == "group_std" and len(members) > ddof:
      out[i] /= np.std(members, ddof=ddof) + 1e-6
  return out


ROWS = 9
run_all = jax.jit(
  lambda reward, group, keep: {
    (baseline, scale, ddof): group_advantages(reward, group, keep=keep, baseline=baseline, scale=scale, ddof=ddof)
    for baseline in BASELINES
    for scale in SCALES
    for ddof in (0, 1)
  }
)


@given(
  st.lists(st.tuples(st.integers(0, 3), st.integers(0, ROWS - 1), st.booleans()), min_size=ROWS, max_size=ROWS),
)
@settings(max_examples=40, deadline=None)
def test_advantages_equal_numpy_for_groups_of_any_size_and_order_with_filtered_rows(rows):
  reward, group, keep = (np.asarray(x) for x in zip(*rows, strict=True))
  reward = (reward / 4).astype(np.float32)  # exact in float32, so that equal rewards are equal to their mean
  advantages = run_all(reward, group, keep)
  for (baseline, scale, ddof), got in advantages.items():
    want = reference(reward, group, keep, baseline, scale, ddof)
    if baseline == "none" and scale == "group_std":  # a group of equal rewards divides by epsilon alone
      got, want = np.minimum(got, 1e3), np.minimum(want, 1e3)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5, err_msg=f"{baseline} {scale} {ddof}")
  with_nan = run_all(np.where(keep, reward, np.nan).astype(np.float32), group, keep)
  for key, got in with_nan.items():
    np.testing.assert_array_equal(got, advantages[key])
    assert not np.asarray(got)[~keep].any()


@given(st.permutations(range(8)))
@settings(max_examples=20, deadline=None)
def test_group_numbers_in_any_order_give_the_advantages_of_a_group_size(order):
  order = np.asarray(order)
  by_size, by_number = (
    group_advantages(REWARD, 4),
    group_advantages(REWARD[order], np.asarray([0] * 4 + [5] * 4)[order]),
  )
  np.testing.assert_allclose(by_number, by_size[order], rtol=1e-6)


@given(st.lists(st.integers(0, 5), min_size=12, max_size=12), st.sampled_from([2, 3, 4, 6]))
@settings(max_examples=30, deadline=None)
def test_every_group_has_mean_zero_and_does_not_depend_on_other_groups(reward, samples):
  reward = np.asarray(reward, np.float32) / 5
  group = np.arange(12) // samples
  of = lambda reward: {key: np.asarray(x).reshape(-1, samples) for key, x in run_groups(reward, group).items()}
  got, moved = of(reward), of(np.append(reward[:samples], 9 * reward[samples:]))
  for scale, advantage in got.items():
    np.testing.assert_allclose(advantage.mean(1), 0, atol=1e-6)
    np.testing.assert_array_equal(advantage[0], moved[scale][0])
  varied = reward.reshape(-1, samples).std(1) > 0
  np.testing.assert_allclose(np.std(got["group_std"], axis=1, ddof=1), varied, rtol=1e-4)


run_groups = jax.jit(lambda reward, group: {scale: group_advantages(reward, group, scale=scale) for scale in SCALES})


@eager_and_jitted
@pytest.mark.parametrize("options", [{}, dict(scale="none"), dict(baseline="leave_one_out")], ids=str)
def test_equal_rewards_give_exactly_zero_advantage_even_if_their_mean_is_rounded(way, options):
  samples = 7
  values = (np.arange(1, 60) / 10 + 0.01).astype(np.float32)
  reward = np.repeat(values, samples)
  rounded = reward.reshape(-1, samples).mean(1) != values
  assert rounded.any(), "the rewards must contain groups whose mean rounds away from their value"
  assert not way(functools.partial(group_advantages, group=samples, **options))(reward).any()
  assert zero_variance(reward, samples).all()


def test_advantages_carry_no_gradient():
  mask = np.ones((8, 2), bool)
  for f in (
    lambda r: group_advantages(r, 4),
    lambda r: token_advantages(r, mask, penalty=r[:, None] * mask),
    lambda r: whiten(r, mask[:, 0]),
  ):
    assert not jax.grad(lambda r, f=f: (f(r) ** 3).sum())(REWARD).any()


def test_zero_variance_ignores_filtered_rows():
  reward = np.asarray([0, 0, 1, 1, 0, 1], np.float32)
  group = np.asarray([0, 1, 0, 1, 2, 2])
  assert zero_variance(reward, group).tolist() == [False] * 6
  keep = np.asarray([True, True, False, True, False, True])
  assert zero_variance(reward, group, keep=keep).tolist() == [True, False, True, False, True, True]


@eager_and_jitted
def test_zero_variance_fraction_counts_groups(way):
  reward = np.asarray([0, 0, 1, 1, 0, 1, 0.1, 0.1], np.float32)
  assert way(functools.partial(zero_variance_fraction, samples_per_prompt=2))(reward) == 0.75
  assert way(functools.partial(zero_variance_fraction, samples_per_prompt=4))(reward) == 0.0


@eager_and_jitted
def test_a_tokens_advantage_is_the_rows_minus_the_costs_from_that_token_on(way):
  mask = np.asarray([[True, False, True, True], [False, True, False, False]])
  penalty = np.where(mask, [[0.1, 9, 0.2, 0.4], [9, 0.5, 9, 9]], np.nan).astype(np.float32)
  advantage = np.asarray([1.0, -2.0], np.float32)
  got = way(lambda a, m, p: token_advantages(a, m, penalty=p))(advantage, mask, penalty)
  np.testing.assert_allclose(got, [[0.3, 0, 0.4, 0.6], [0, -2.5, 0, 0]], rtol=1e-6, atol=1e-7)
  np.testing.assert_array_equal(token_advantages(advantage, mask), mask * advantage[:, None])


@given(
  st.lists(st.tuples(st.floats(-5, 5, width=32, allow_subnormal=False), st.booleans()), min_size=8, max_size=8),
  st.sampled_from([0, 1]),
)
@settings(max_examples=30, deadline=None)
def test_whitening_equals_numpy_on_the_selected_entries(entries, ddof):
  x, mask = (np.asarray(column).reshape(2, 4) for column in zip(*entries, strict=True))
  x = x.astype(np.float32)
  got = np.asarray(whiten(np.where(mask, x, np.nan), mask, ddof=ddof))
  assert not got[~mask].any()
  chosen = x[mask].astype(np.float64)
  if len(chosen) <= ddof:
    assert not got.any()
    return
  deviation = np.sqrt(chosen.var(ddof=ddof) + 1e-8)
  rounding = 5e-7 * np.abs(chosen).max()  # of the mean in float32
  np.testing.assert_allclose(got[mask], (chosen - chosen.mean()) / deviation, rtol=1e-5, atol=rounding / deviation)


def test_whitening_over_tokens_weighs_rows_by_their_length():
  mask = np.asarray([[True] * 3, [True, False, False]])
  got = whiten(np.where(mask, [[1.0], [-3.0]], 0).astype(np.float32), mask, ddof=0)
  np.testing.assert_allclose(got, [[1 / math.sqrt(3)] * 3, [-math.sqrt(3), 0, 0]], rtol=1e-5)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("with_penalty", [False, True])
def test_compute_advantages_composes_baseline_scale_and_penalty(scale, with_penalty):
  rng = np.random.default_rng(3)
  mask = rng.random((8, 5)) < 0.6
  penalty = np.where(mask, rng.random(mask.shape), np.nan).astype(np.float32) if with_penalty else None
  options = dict(baseline="group_mean", scale=scale, ddof=0, epsilon=0.1)
  got = jax.jit(functools.partial(compute_advantages, group=4, **options))(REWARD, mask, penalty=penalty)
  rows = functools.partial(group_advantages, group=4, **options)
  if scale == "batch_std":
    want = whiten(token_advantages(rows(REWARD), mask, penalty=penalty), mask)
    assert got.shape == mask.shape and abs(float(got.sum())) < 1e-5
  else:
    want = rows(REWARD - (np.nansum(penalty, axis=1) if with_penalty else 0))
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  "wrong", [{"baseline": "mean"}, {"scale": "std"}, {"ddof": -1}, {"epsilon": 0.0}, {"epsilon": float("nan")}], ids=str
)
def test_impossible_advantage_options_are_refused(wrong):
  with pytest.raises(ValueError, match=rf"{next(iter(wrong))} .*want"):
    AdvantageOptions(**wrong)
  assert AdvantageOptions() == AdvantageOptions(None, None, 1, 1e-6)


@pytest.mark.parametrize("function", [group_advantages, zero_variance, zero_variance_fraction])
def test_incomplete_groups_are_refused_with_a_cure(function):
  with pytest.raises(ValueError, match=r"8 rewards do not divide into groups of 3; want prompt-major"):
    function(REWARD, 3)
  with pytest.raises(ValueError, match="group is 1; a group needs at least 2"):
    function(REWARD, 1)
  with pytest.raises(ValueError, match=r"reward has shape \(2, 4\); want \[B\]"):
    function(REWARD.reshape(2, 4), 4)


def test_arrays_of_another_length_are_refused():
  with pytest.raises(ValueError, match=r"group has shape \(7,\); want \[8\]"):
    group_advantages(REWARD, np.zeros(7, int))
  with pytest.raises(ValueError, match=r"keep has shape \(7,\); want \[8\]"):
    zero_variance(REWARD, 4, keep=np.ones(7, bool))


def test_unknown_conventions_are_refused():
  with pytest.raises(ValueError, match=r"baseline is 'mean' .*want a baseline of .*leave_one_out"):
    group_advantages(REWARD, 4, baseline="mean")
  with pytest.raises(ValueError, match=r"scale 'std'; want .*group_std"):
    group_advantages(REWARD, 4, scale="std")
  for ddof in (-1, 4):
    with pytest.raises(ValueError, match=rf"ddof is {ddof}; want 0 <= ddof < the size of a group"):
      group_advantages(REWARD, 4, ddof=ddof)
