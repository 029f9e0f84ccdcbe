"""Sequence-level objectives: cases by hand, the printed formulas, conventions and placements."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rspo_jax.objectives.sequence_level import gmpo, gspo, rloo
from rspo_jax.objectives.token_level import grpo, policy_gradient
from rspo_jax.types import PLACEMENTS
from tests.support.objective_cases import assert_same, batch, under_placements


def row(objective, log_ratio, advantage, *, log_shift=None, **options):
  """One row: (Terms, gradient of the row's term), as numpy; padded, so that all lengths run the same programs."""
  n = len(log_ratio)
  padded = jnp.asarray(np.pad(np.asarray(log_ratio, np.float32), (0, 5 - n), constant_values=np.nan))[None]
  shift = None if log_shift is None else jnp.full(padded.shape, log_shift)
  f = lambda q: objective(q, jnp.asarray([advantage], jnp.float32), np.arange(5)[None] < n, log_shift=shift, **options)
  gradient = jax.grad(lambda q: f(q).objective[0, 0])(padded)
  return jax.tree.map(lambda x: np.asarray(x)[0, :n], (f(padded), gradient))


def value(objective, *arguments, **options):
  """The row's term, which is repeated on each of its tokens."""
  terms, _ = row(objective, *arguments, **options)
  assert (terms.objective == terms.objective[0]).all()
  return float(terms.objective[0])


@pytest.mark.parametrize(
  ("log_ratio", "advantage", "want", "low", "high"),
  [
    ([0.1, -0.0998], 1.0, math.exp(1e-4), False, False),
    ([0.001, 0.003], 2.0, 2.0 * 1.0004, False, True),
    ([0.001, 0.003], -2.0, -2.0 * math.exp(0.002), False, False),
    ([-0.001, -0.003], -2.0, -2.0 * 0.9997, True, False),
    ([-0.001, -0.003], 2.0, 2.0 * math.exp(-0.002), False, False),
  ],
)
def test_gspo_clips_the_sequence_ratio_by_hand(log_ratio, advantage, want, low, high):
  terms, gradient = row(gspo, log_ratio, advantage)
  np.testing.assert_allclose(terms.objective, [want, want], rtol=2e-7)
  assert terms.clipped_low.tolist() == [low] * 2
  assert terms.clipped_high.tolist() == [high] * 2
  np.testing.assert_allclose(gradient, [0 if low or high else want / 2] * 2, rtol=1e-6)


@pytest.mark.parametrize("trust", [0.9996, 0.9, 0.8])
def test_router_shift_before_gspos_narrow_clip_removes_gradients_of_negative_sequences_only(trust):
  shift = {"log_shift": math.log(trust)}
  negative, gradient = row(gspo, [0.0, 0.0], -1.0, placement="before_clip", **shift)
  assert negative.clipped_low.all() and not gradient.any()
  np.testing.assert_allclose(negative.objective, -0.9997, rtol=1e-6)
  # A positive sequence above the upper bound moves below it.
  over = [0.00045, 0.00045]
  assert row(gspo, over, 1.0)[0].clipped_high.all()
  positive, gradient = row(gspo, over, 1.0, placement="before_clip", **shift)
  assert not positive.clipped_high.any() and gradient.all()
  for placement in ("weight", "after_clip"):
    for q, advantage in (([0.0, 0.0], -1.0), (over, 1.0)):
      base, base_gradient = row(gspo, q, advantage)
      damped, gradient = row(gspo, q, advantage, placement=placement, **shift)
      np.testing.assert_allclose(damped.objective, trust * base.objective, rtol=1e-6)
      np.testing.assert_allclose(gradient, trust * base_gradient, rtol=1e-6)
      assert_same(damped[1:], base[1:])


def test_a_trust_within_gspos_bounds_removes_no_gradient():
  terms, gradient = row(gspo, [0.0, 0.0], -1.0, log_shift=math.log(0.9998), placement="before_clip")
  assert not terms.grad_clipped.any() and gradient.all()


@pytest.mark.parametrize(
  ("log_ratio", "advantage", "exponent", "low", "high"),
  [
    ([1.0, 0.2], 2.0, (0.4 + 0.2) / 2, [0, 0], [1, 0]),
    ([1.0, 0.2], -2.0, (1.0 + 0.2) / 2, [0, 0], [0, 0]),
    ([-1.0, -0.2], 2.0, (-1.0 - 0.2) / 2, [0, 0], [0, 0]),
    ([-1.0, -0.2], -2.0, (-0.4 - 0.2) / 2, [1, 0], [0, 0]),
  ],
)
@pytest.mark.parametrize("bounds", ["ratio", "signed"])
def test_gmpo_clips_tokens_inside_the_geometric_mean_by_hand(log_ratio, advantage, exponent, low, high, bounds):
  terms, gradient = row(gmpo, log_ratio, advantage, bounds=bounds)
  want = advantage * math.exp(exponent)
  np.testing.assert_allclose(terms.objective, [want] * 2, rtol=1e-6)
  assert terms.clipped_low.tolist() == low
  assert terms.clipped_high.tolist() == high
  np.testing.assert_allclose(gradient, want / 2 * ~terms.grad_clipped, rtol=1e-6)


def test_gmpos_two_conventions_differ_in_the_bound_of_negative_sequences():
  bounds = dict(eps_low=0.1, eps_high=0.3)
  for convention, lowest in (("ratio", -0.1), ("signed", -0.3)):
    np.testing.assert_allclose(value(gmpo, [-2.0], -1.0, bounds=convention, **bounds), -math.exp(lowest), rtol=1e-6)
    np.testing.assert_allclose(value(gmpo, [2.0], 1.0, bounds=convention, **bounds), math.exp(0.3), rtol=1e-6)


def test_length_epsilon_is_added_to_the_length():
  want = 2.0 * math.exp((0.3 + 0.1) / (2 + 0.5))
  np.testing.assert_allclose(value(gmpo, [0.3, 0.1], 2.0, length_epsilon=0.5), want, rtol=1e-6)


@pytest.mark.parametrize(
  ("placement", "log_ratio", "advantage", "exponent"),
  [
    ("before_clip", [0.45, 0.2], 2.0, (0.35 + 0.1) / 2),
    ("before_clip", [-0.45, -0.2], -2.0, (-0.4 - 0.3) / 2),
    ("after_clip", [0.45, 0.2], 2.0, (0.4 + 0.2) / 2 - 0.1),
    ("after_clip", [-0.45, -0.2], -2.0, (-0.4 - 0.2) / 2 + 0.1),
    ("weight", [0.45, 0.2], 2.0, (0.4 + 0.2) / 2 - 0.1),
    ("weight", [-0.45, -0.2], -2.0, (-0.4 - 0.2) / 2 - 0.1),
  ],
)
def test_rspo_is_gmpo_with_router_shift_by_hand(placement, log_ratio, advantage, exponent):
  got = value(gmpo, log_ratio, advantage, log_shift=-0.1, placement=placement)
  np.testing.assert_allclose(got, advantage * math.exp(exponent), rtol=1e-6)


def test_v1_placement_in_gmpo_amplifies_negative_sequences_and_a_weight_damps_both():
  for advantage in (1.0, -1.0):
    base, base_gradient = row(gmpo, [0.0, 0.1], advantage)
    for placement, factor in (
      ("before_clip", math.exp(-0.1)),
      ("weight", math.exp(-0.1)),
      ("after_clip", math.exp(-0.1 * advantage)),
    ):
      terms, gradient = row(gmpo, [0.0, 0.1], advantage, log_shift=-0.1, placement=placement)
      np.testing.assert_allclose(terms.objective, factor * base.objective, rtol=1e-6)
      np.testing.assert_allclose(gradient, factor * base_gradient, rtol=1e-6)


@pytest.mark.parametrize(
  ("log_ratio", "advantage", "want", "low", "high"),
  [
    ([0.1, 0.05], 2.0, 2.0 * math.exp(0.15), False, False),
    ([0.1, 0.2], 2.0, 2.0 * 1.2, False, True),
    ([0.1, 0.2], -2.0, -2.0 * math.exp(0.3), False, False),
    ([-0.2, -0.2], -2.0, -2.0 * 0.8, True, False),
    ([20.0, 20.0], -1.0, -math.exp(30.0), False, True),
  ],
)
def test_rloo_clips_the_product_of_ratios_by_hand(log_ratio, advantage, want, low, high):
  """Not normalised by length; bounded by 30 nats."""
  terms, gradient = row(rloo, log_ratio, advantage)
  np.testing.assert_allclose(terms.objective, [want] * 2, rtol=1e-5)
  assert terms.clipped_low.tolist() == [low] * 2
  assert terms.clipped_high.tolist() == [high] * 2
  np.testing.assert_allclose(gradient, [0 if low or high else want] * 2, rtol=1e-5)


def test_rloos_trust_is_the_product_over_the_row():
  got = value(rloo, [0.1, 0.2], 2.0, log_shift=-0.1, placement="before_clip")
  np.testing.assert_allclose(got, 2.0 * math.exp(0.1), rtol=1e-6)
  for placement in ("after_clip", "weight"):
    got = value(rloo, [0.1, 0.2], 2.0, log_shift=-0.1, placement=placement)
    np.testing.assert_allclose(got, 2.0 * 1.2 * math.exp(-0.2), rtol=1e-6)


def test_rloos_other_conventions_are_grpo_and_the_policy_gradient():
  log_ratio, advantage, mask, log_shift = batch(seed=8)
  for placement in PLACEMENTS:
    options = dict(log_shift=log_shift, placement=placement)
    token = rloo(log_ratio, advantage, mask, ratio="token", eps_low=0.1, eps_high=0.3, **options)
    assert_same(token, grpo(log_ratio, advantage, mask, eps_low=0.1, eps_high=0.3, **options))
    none = rloo(log_ratio, advantage, mask, ratio="none", **options)
    assert_same(none, policy_gradient(log_ratio, advantage, mask, **options))


def printed(name, q, advantage, shift, placement):
  """One row's term as the papers print it (min of two terms, sign(A) in front), float64 numpy."""
  after = np.zeros_like(q) if placement == "before_clip" else shift
  q = q + shift - after
  sign = np.sign(advantage)
  if name == "gmpo":
    signed = np.minimum(sign * q, np.clip(sign * q, -0.2, 0.3))
    return advantage * np.exp(sign * np.mean(signed) + np.mean(after) * (sign if placement == "after_clip" else 1))
  combine = np.mean if name == "gspo" else np.sum
  ratio = np.exp(combine(q))
  return min(ratio * advantage, np.clip(ratio, 0.8, 1.3) * advantage) * np.exp(combine(after))


BOUNDED = {
  "gspo": functools.partial(gspo, eps_low=0.2, eps_high=0.3),
  "gmpo": functools.partial(gmpo, eps_low=0.2, eps_high=0.3, bounds="signed"),
  "rloo": functools.partial(rloo, eps_low=0.2, eps_high=0.3),
}
COLUMNS = 4


all_objectives = under_placements(BOUNDED)


@given(
  tokens=st.lists(st.floats(-3, 3), min_size=1, max_size=COLUMNS), advantage=st.floats(-3, 3), shift=st.floats(-0.3, 0)
)
@settings(max_examples=60, deadline=None)
def test_objectives_equal_the_printed_formulas(tokens, advantage, shift):
  n = len(tokens)
  shifts = shift * np.linspace(0, 1, n)
  pad = lambda x: np.pad(np.asarray(x), (0, COLUMNS - n))[None]
  with jax.enable_x64(True):
    got = all_objectives(pad(tokens), np.asarray([advantage]), np.arange(COLUMNS)[None] < n, pad(shifts))
  for name, placement in ((name, p) for name in BOUNDED for p in PLACEMENTS):
    values = got[name][placement]
    assert values.dtype == np.float64
    want = printed(name, np.asarray(tokens), advantage, shifts, placement)
    np.testing.assert_allclose(values[0, :n], want, rtol=1e-9, atol=1e-12, err_msg=f"{name} {placement}")


def test_an_open_bound_never_clips():
  for objective, eps_low in ((gspo, 1.0), (gmpo, math.inf), (rloo, 1.0)):
    for q, advantage in ((-20.0, -1.0), (9.0, 1.0)):
      terms, _ = row(objective, [q], advantage, eps_low=eps_low, eps_high=math.inf)
      assert not (terms.clipped_low | terms.clipped_high | terms.grad_clipped).any()
      np.testing.assert_allclose(terms.objective, advantage * math.exp(q), rtol=1e-5)


def test_unknown_conventions_are_refused_with_a_cure():
  arguments = jnp.zeros((1, 2)), jnp.ones(1), jnp.ones((1, 2), bool)
  with pytest.raises(ValueError, match=r"bounds is 'paper'; want 'ratio' .* or 'signed'"):
    gmpo(*arguments, bounds="paper")
  with pytest.raises(ValueError, match="ratio is 'seq'; want 'sequence', 'token' or 'none'"):
    rloo(*arguments, ratio="seq")
  with pytest.raises(ValueError, match=r"eps_low is -0.1 and eps_high is 0.4; .*0.4 for a ratio in"):
    gmpo(*arguments, eps_low=-0.1)
