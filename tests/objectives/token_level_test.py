"""Token-level objectives: cases by hand, the printed formulas, and the conventions."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rspo_jax.objectives.sequence_level import gspo
from rspo_jax.objectives.token_level import cispo, grpo, gspo_token, policy_gradient, sapo
from rspo_jax.types import PLACEMENTS
from tests.support.objective_cases import assert_same, batch, total, under_placements


def row(objective, log_ratio, advantage, *, log_shift=None, **options):
  """One row: (Terms, gradient of the sum), as numpy; padded, so that all lengths run the same programs."""
  n = len(log_ratio)
  padded = jnp.asarray(np.pad(np.asarray(log_ratio, np.float32), (0, 5 - n), constant_values=np.nan))[None]
  shift = None if log_shift is None else jnp.full(padded.shape, log_shift)
  f = lambda q: objective(q, jnp.asarray([advantage], jnp.float32), np.arange(5)[None] < n, log_shift=shift, **options)
  gradient = jax.grad(lambda q: f(q).objective.sum())(padded)
  return jax.tree.map(lambda x: np.asarray(x)[0, :n], (f(padded), gradient))


@pytest.mark.parametrize(
  ("ratio", "advantage", "want", "low", "high"),
  [
    (1.5, 2.0, 2.4, False, True),
    (0.5, 2.0, 1.0, False, False),
    (1.5, -1.0, -1.5, False, False),
    (0.5, -1.0, -0.8, True, False),
    (1.0, -3.0, -3.0, False, False),
    (1.25, 2.0, 2.4, False, True),
    (1.15, 2.0, 2.3, False, False),
  ],
)
def test_grpo_matches_ppo_by_hand(ratio, advantage, want, low, high):
  terms, gradient = row(grpo, [math.log(ratio)], advantage)
  np.testing.assert_allclose(terms.objective, want, rtol=1e-6)
  assert (terms.clipped_low[0], terms.clipped_high[0], terms.grad_clipped[0]) == (low, high, low or high)
  np.testing.assert_allclose(gradient, 0 if low or high else want, rtol=1e-6)


@pytest.mark.parametrize(
  ("ratio", "advantage", "want", "high"),
  [(5.0, -2.0, -6.0, True), (2.9, -2.0, -5.8, False), (5.0, 2.0, 2.4, True), (0.1, -2.0, -1.6, False)],
)
def test_dual_clip_bounds_the_ratio_of_negative_advantages_by_hand(ratio, advantage, want, high):
  terms, gradient = row(grpo, [math.log(ratio)], advantage, dual_clip=3.0)
  np.testing.assert_allclose(terms.objective, want, rtol=1e-6)
  assert terms.clipped_high[0] == high
  assert (gradient[0] == 0) == terms.grad_clipped[0]


@pytest.mark.parametrize(
  ("placement", "ratio", "advantage", "want", "clipped"),
  [
    ("before_clip", 1.4, 2.0, 1.4 * 0.8 * 2.0, False),  # trust moves the ratio below the bound
    ("before_clip", 1.6, 2.0, 1.2 * 2.0, True),
    ("before_clip", 0.9, -1.0, -0.8, True),  # trust moves the ratio below the lower bound
    ("after_clip", 1.4, 2.0, 1.2 * 0.8 * 2.0, True),
    ("after_clip", 0.9, -1.0, -0.9 * 0.8, False),
    ("weight", 1.4, 2.0, 1.2 * 0.8 * 2.0, True),
    ("weight", 0.9, -1.0, -0.9 * 0.8, False),
  ],
)
def test_grpo_with_router_shift_by_hand(placement, ratio, advantage, want, clipped):
  terms, _ = row(grpo, [math.log(ratio)], advantage, log_shift=math.log(0.8), placement=placement)
  np.testing.assert_allclose(terms.objective, want, rtol=1e-6)
  assert terms.grad_clipped[0] == clipped


def test_policy_gradient_ignores_the_ratio_and_the_placement():
  for placement in PLACEMENTS:
    terms, gradient = row(policy_gradient, [-3.0, 0.0, 5.0], 2.0, log_shift=math.log(0.5), placement=placement)
    np.testing.assert_allclose(terms.objective, 1.0, rtol=1e-6)
    np.testing.assert_allclose(gradient, 1.0, rtol=1e-6)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_cispo_bounds_the_weight_for_both_signs_and_keeps_every_gradient(advantage):
  terms, gradient = row(cispo, np.log([0.1, 0.5, 1.0, 1.2, 9.0]), advantage, eps_low=0.4, eps_high=0.3)
  want = advantage * np.asarray([0.6, 0.6, 1.0, 1.2, 1.3])
  np.testing.assert_allclose(terms.objective, want, rtol=1e-6)
  np.testing.assert_allclose(gradient, want, rtol=1e-6)
  assert terms.clipped_low.tolist() == [True, True, False, False, False]
  assert terms.clipped_high.tolist() == [False, False, False, False, True]
  assert not terms.grad_clipped.any()


def test_cispos_two_conventions_describe_the_same_interval():
  q = [-9.0, -0.2, 0.3, 1.5, 4.0]
  assert_same(row(cispo, q, 1.0), row(cispo, q, 1.0, bounds="absolute"), rtol=1e-6)
  around = row(cispo, q, 1.0, eps_low=0.25, eps_high=0.5)
  assert_same(around, row(cispo, q, 1.0, eps_low=0.75, eps_high=1.5, bounds="absolute"), rtol=1e-6)
  # The same number is a different bound.
  np.testing.assert_allclose(row(cispo, [9.0], 1.0, eps_high=5.0)[0].objective, 6.0, rtol=1e-6)
  np.testing.assert_allclose(row(cispo, [9.0], 1.0, eps_high=5.0, bounds="absolute")[0].objective, 5.0, rtol=1e-6)


def test_sapo_by_hand_is_a_gate_that_decays_on_both_sides():
  sigmoid = lambda x: 1 / (1 + np.exp(-x))
  q = np.asarray([-2.0, -0.5, 0.0, 0.5, 2.0])
  for advantage, tau in ((2.0, 1.0), (-2.0, 1.05)):
    terms, gradient = row(sapo, q, advantage)
    gate = sigmoid(tau * (np.exp(q) - 1))
    np.testing.assert_allclose(terms.objective, advantage * 4 / tau * gate, rtol=1e-5)
    np.testing.assert_allclose(gradient, advantage * 4 * gate * (1 - gate) * np.exp(q), rtol=1e-4)
    np.testing.assert_allclose(gradient[2], advantage, rtol=1e-6)
  assert not row(sapo, [80.0, 300.0], -1.0)[1].any()  # flat, not NaN where exp overflows


def test_gspo_token_has_gspos_value_and_gradient():
  arrays = batch(seed=21)
  for bounds in ({}, dict(eps_low=0.1, eps_high=0.1)):

    def run(objective, bounds=bounds):
      log_ratio, advantage, mask, log_shift = arrays

      def mean(q):
        terms = objective(q, advantage, mask, log_shift=log_shift, **bounds)
        return total(terms.objective, mask, "seq_mean_token_mean").mean, terms

      return jax.value_and_grad(mean, has_aux=True)(log_ratio)

    assert_same(run(gspo_token), run(gspo), rtol=1e-6, atol=1e-7)


def test_tokens_with_zero_advantage_count_for_gspo_tokens_ratio():
  q, mask = jnp.asarray([[0.5, 0.1]]), jnp.ones((1, 2), bool)
  terms = gspo_token(q, jnp.asarray([[0.0, -1.0]]), mask)
  np.testing.assert_allclose(terms.objective, [[0.0, -math.exp(0.3)]], rtol=1e-6)


def printed(name, q, advantage, shift, placement):
  """One row as the papers print it (min of two terms, ratios instead of logarithms), float64 numpy."""
  before, after = (np.exp(shift), 1.0) if placement == "before_clip" else (1.0, np.exp(shift))
  ratio = np.exp(q) * before
  if name == "policy_gradient":
    return advantage * np.exp(shift)
  if name == "sapo":
    tau = np.where(advantage > 0, 1.0, 1.05)
    return advantage * after * 4 / tau / (1 + np.exp(-tau * (ratio - 1)))
  if name == "cispo":
    return advantage * np.clip(ratio, 0.7, 1.3) * after
  if name == "gspo_token":
    ratio = np.full_like(ratio, np.exp(np.mean(np.log(ratio))))
  surrogate = np.minimum(ratio * advantage, np.clip(ratio, 0.8, 1.3) * advantage)
  if name == "dual_clip":
    surrogate = np.where(advantage < 0, np.maximum(surrogate, 1.5 * advantage), surrogate)
  return surrogate * after


BOUNDED = {
  "policy_gradient": policy_gradient,
  "grpo": functools.partial(grpo, eps_high=0.3),
  "dual_clip": functools.partial(grpo, eps_high=0.3, dual_clip=1.5),
  "cispo": functools.partial(cispo, eps_low=0.3, eps_high=0.3),
  "sapo": sapo,
  "gspo_token": functools.partial(gspo_token, eps_low=0.2, eps_high=0.3),
}
COLUMNS = 4


all_objectives = under_placements(BOUNDED)


@given(
  tokens=st.lists(st.tuples(st.floats(-3, 3), st.floats(-3, 3)), min_size=1, max_size=COLUMNS),
  shift=st.floats(-0.3, 0),
)
@settings(max_examples=60, deadline=None)
def test_objectives_equal_the_printed_formulas(tokens, shift):
  """In float64, with an advantage for every token."""
  q, advantage = np.asarray(tokens).T
  n = len(tokens)
  shifts = shift * np.linspace(0, 1, n)
  pad = lambda x: np.pad(x, (0, COLUMNS - n))[None]
  with jax.enable_x64(True):
    got = all_objectives(pad(q), pad(advantage), np.arange(COLUMNS)[None] < n, pad(shifts))
  for name, placement in ((name, p) for name in BOUNDED for p in PLACEMENTS):
    values = got[name][placement]
    assert values.dtype == np.float64
    want = printed(name, q, advantage, shifts, placement)
    np.testing.assert_allclose(values[0, :n], want, rtol=1e-9, atol=1e-12, err_msg=f"{name} {placement}")


def test_unequal_bounds_bind_on_the_side_of_the_advantages_sign():
  for objective in (grpo, gspo_token):
    bounds = dict(eps_low=0.1, eps_high=0.3)
    np.testing.assert_allclose(row(objective, [-2.0], -1.0, **bounds)[0].objective, -0.9, rtol=1e-6)
    np.testing.assert_allclose(row(objective, [2.0], 1.0, **bounds)[0].objective, 1.3, rtol=1e-6)


def test_an_open_bound_never_clips():
  for objective in (grpo, cispo, gspo_token):
    for q, advantage in ((-20.0, -1.0), (9.0, 1.0)):
      terms, gradient = row(objective, [q], advantage, eps_low=1.0, eps_high=math.inf)
      assert not (terms.clipped_low | terms.clipped_high).any()
      np.testing.assert_allclose(terms.objective, advantage * math.exp(q), rtol=1e-5)
      np.testing.assert_allclose(gradient, terms.objective, rtol=1e-6)


def test_impossible_options_are_refused_with_a_cure():
  arguments = jnp.zeros((1, 2)), jnp.ones(1), jnp.ones((1, 2), bool)
  for bad in (1.0, 0.5, math.nan):
    with pytest.raises(ValueError, match="dual_clip is .*ratio above 1"):
      grpo(*arguments, dual_clip=bad)
  for bad in (0.0, -1.0, math.nan):
    with pytest.raises(ValueError, match="tau_pos is .* and tau_neg is .*want both > 0"):
      sapo(*arguments, tau_pos=bad)
    with pytest.raises(ValueError, match="want both > 0"):
      sapo(*arguments, tau_neg=bad)
  with pytest.raises(ValueError, match="bounds is 'trl'; want 'around_one'.* or 'absolute'"):
    cispo(*arguments, bounds="trl")
  with pytest.raises(ValueError, match=r"eps_high is 0.28; with bounds='absolute'.*contains 1.*'around_one'"):
    cispo(*arguments, bounds="absolute", eps_high=0.28)
