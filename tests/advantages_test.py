"""Group advantages: hand-worked groups, the two conventions of std, and groups that must teach nothing."""

import functools
import math

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rspo_jax.advantages import group_advantages, zero_variance_fraction

eager_and_jitted = pytest.mark.parametrize("way", [lambda f: f, jax.jit], ids=["eager", "jit"])
REWARD = np.asarray([1, 0, 0, 1, 0, 0, 2, 0], np.float32)


@eager_and_jitted
@pytest.mark.parametrize(
  ("options", "want"),
  [
    # Deviations: sqrt(1/3) and 1 by n - 1; 1/2 and sqrt(3)/2 by n.
    ({}, [0.75**0.5, -(0.75**0.5), -(0.75**0.5), 0.75**0.5, -0.5, -0.5, 1.5, -0.5]),
    (dict(ddof=0), [1, -1, -1, 1, *np.asarray([-1, -1, 3, -1]) / math.sqrt(3)]),
    (dict(normalize_std=False), [0.5, -0.5, -0.5, 0.5, -0.5, -0.5, 1.5, -0.5]),
    (dict(epsilon=1.0, ddof=0), [1 / 3, -1 / 3, -1 / 3, 1 / 3, *np.asarray([-0.5, -0.5, 1.5, -0.5]) / (1 + 0.75**0.5)]),
  ],
  ids=["default", "ddof=0", "no std", "epsilon"],
)
def test_advantages_by_hand(way, options, want):
  advantage = way(functools.partial(group_advantages, samples_per_prompt=4, **options))(REWARD)
  assert advantage.dtype == np.float32
  np.testing.assert_allclose(advantage, want, rtol=1e-5)


jitted_advantages = jax.jit(group_advantages, static_argnames=("samples_per_prompt", "normalize_std"))


@given(st.lists(st.integers(0, 5), min_size=12, max_size=12), st.sampled_from([2, 3, 4, 6]), st.booleans())
@settings(max_examples=40, deadline=None)
def test_every_group_has_mean_zero_and_is_untouched_by_the_others(reward, samples, normalize):
  reward = np.asarray(reward, np.float32) / 5
  of = lambda reward: np.asarray(jitted_advantages(reward, samples, normalize_std=normalize)).reshape(-1, samples)
  advantage = of(reward)
  np.testing.assert_allclose(advantage.mean(1), 0, atol=1e-6)
  np.testing.assert_array_equal(advantage[0], of(np.append(reward[:samples], 9 * reward[samples:]))[0])
  varied = reward.reshape(-1, samples).std(1) > 0
  if normalize:
    np.testing.assert_allclose(np.std(advantage, axis=1, ddof=1), varied, rtol=1e-4)


@eager_and_jitted
@pytest.mark.parametrize("normalize", [True, False])
def test_equal_rewards_give_exactly_zero_advantage_whatever_the_mean_rounds_to(way, normalize):
  samples = 7
  values = (np.arange(1, 60) / 10 + 0.01).astype(np.float32)
  advantage = way(functools.partial(group_advantages, samples_per_prompt=samples, normalize_std=normalize))
  reward = np.repeat(values, samples)
  rounded = reward.reshape(-1, samples).mean(1) != values
  assert rounded.any(), "the rewards must contain groups whose mean rounds away from their value"
  assert not advantage(reward).any()


def test_advantages_carry_no_gradient():
  assert not jax.grad(lambda r: (group_advantages(r, 4) ** 3).sum())(REWARD).any()


@eager_and_jitted
def test_zero_variance_fraction_counts_groups(way):
  reward = np.asarray([0, 0, 1, 1, 0, 1, 0.1, 0.1], np.float32)
  assert way(functools.partial(zero_variance_fraction, samples_per_prompt=2))(reward) == 0.75
  assert way(functools.partial(zero_variance_fraction, samples_per_prompt=4))(reward) == 0.0


@pytest.mark.parametrize("function", [group_advantages, zero_variance_fraction])
def test_rewards_that_form_no_groups_are_named_with_their_cure(function):
  with pytest.raises(ValueError, match=r"8 rewards do not divide .*samples_per_prompt=3; want prompt-major"):
    function(REWARD, 3)
  with pytest.raises(ValueError, match="samples_per_prompt is 1; a group needs at least 2"):
    function(REWARD, 1)
  with pytest.raises(ValueError, match=r"reward has shape \(2, 4\); want \[B\]"):
    function(REWARD.reshape(2, 4), 4)


@pytest.mark.parametrize("ddof", [-1, 4])
def test_ddof_must_leave_a_degree_of_freedom(ddof):
  with pytest.raises(ValueError, match=r"ddof is .*want 0 <= ddof < samples_per_prompt=4"):
    group_advantages(REWARD, 4, ddof=ddof)
