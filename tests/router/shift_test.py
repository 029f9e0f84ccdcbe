"""Router shift on plain arrays: deviations by hand and by brute force, layers, levels and floors."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rspo_jax.router.shift import (
  DEVIATIONS,
  ShiftOptions,
  combine_deviation,
  expert_overlap,
  layer_deviation,
  router_drift,
  router_kl,
  router_log_shift,
)
from rspo_jax.types import RoutingTrace

eager_and_jitted = pytest.mark.parametrize("way", [lambda f: f, jax.jit], ids=["eager", "jit"])
L, B, T, E, K = 3, 2, 4, 6, 2


def trace(seed):
  """One layer's, [B, T, ...]: experts and log-probabilities as `trace_probe` keeps them."""
  log_prob = jax.nn.log_softmax(jax.random.normal(jax.random.key(seed), (B, T, E)) * 2).astype(jnp.float16)
  index = jax.lax.top_k(log_prob, K)[1]
  return RoutingTrace(index.astype(jnp.uint8), jnp.take_along_axis(log_prob, index, axis=-1), log_prob)


def test_router_drift_on_plain_arrays_by_hand():
  new = jnp.log(jnp.asarray([[0.5, 0.2], [0.1, 0.4]]))
  old = jnp.log(jnp.asarray([[0.25, 0.4], [0.1, 0.2]]))
  two = math.log(2)
  np.testing.assert_allclose(router_drift(new, old), [two, two / 2], rtol=1e-6)
  np.testing.assert_allclose(router_drift(new, old, squared=True), [two**2, two**2 / 2], rtol=1e-6)


@eager_and_jitted
def test_overlap_counts_shared_experts_in_any_order(way):
  old = jnp.asarray([[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3], [255, 254, 1, 0]], jnp.uint8)
  new = jnp.asarray([[3, 2, 1, 0], [9, 8, 1, 0], [4, 5, 6, 7], [254, 3, 4, 5]], jnp.int32)
  np.testing.assert_array_equal(way(expert_overlap)(new, old), [1.0, 0.5, 0.0, 0.25])


logits = st.lists(st.floats(-8, 8, width=32), min_size=E, max_size=E)


@given(logits, logits)
@settings(max_examples=50, deadline=None)
def test_kl_is_that_of_old_from_new_over_all_experts(new, old):
  """Scores that do not sum to 1 are normalised."""
  new, old = np.asarray(new, np.float32), np.asarray(old, np.float32)
  p, q = (np.exp(x.astype(np.float64)) / np.exp(x.astype(np.float64)).sum() for x in (old, new))
  got = router_kl(new, old)
  np.testing.assert_allclose(got, sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)), rtol=1e-4, atol=1e-5)
  assert got >= 0
  assert router_kl(old, old) == 0


@eager_and_jitted
@pytest.mark.parametrize("kind", DEVIATIONS)
def test_an_unmoved_router_deviates_by_exactly_zero_and_a_moved_one_does_not(way, kind):
  one, other = trace(0), trace(1)
  deviation = way(functools.partial(layer_deviation, kind))
  assert not deviation(one, one).any()
  moved = deviation(other, one)
  assert moved.shape == (B, T) and moved.dtype == jnp.float32
  assert (moved >= 0).all() and moved.any()


def test_layer_deviation_selects_the_function_by_name():
  new, old = trace(1), trace(0)
  for kind, want in {
    "abs": router_drift(new.log_prob, old.log_prob),
    "squared": router_drift(new.log_prob, old.log_prob, squared=True),
    "kl": router_kl(new.all_log_prob, old.all_log_prob),
    "overlap": 1 - expert_overlap(new.expert_index, old.expert_index),
  }.items():
    np.testing.assert_array_equal(layer_deviation(kind, new, old), want)
  only_chosen = new.replace(all_log_prob=None), old.replace(all_log_prob=None)
  assert layer_deviation("abs", *only_chosen).any(), "only kl needs all experts"


BY_LAYER = np.random.default_rng(0).uniform(0, 1, (L, B, T)).astype(np.float32)
MASK = np.asarray([[False, True, True, True], [False, False, False, True]])


@eager_and_jitted
@pytest.mark.parametrize("layers", ["mean", "sum", "max"])
def test_layers_are_combined_for_every_token(way, layers):
  got = way(functools.partial(combine_deviation, options=ShiftOptions(layers=layers)))(BY_LAYER, MASK)
  np.testing.assert_allclose(got, getattr(np, layers)(BY_LAYER, axis=0), rtol=1e-6)


@eager_and_jitted
@pytest.mark.parametrize("layers", ["mean", "max"])
def test_a_sequences_deviation_is_the_mean_over_its_tokens_for_any_values_in_the_padding(way, layers):
  options = ShiftOptions(layers=layers, level="sequence")
  combine = way(functools.partial(combine_deviation, options=options))
  per_token = getattr(np, layers)(BY_LAYER, axis=0)
  for outside in (0.0, 1e6, np.nan):
    got = combine(np.where(MASK, BY_LAYER, np.float32(outside)), MASK)
    for row in range(B):
      np.testing.assert_allclose(got[row], [per_token[row][MASK[row]].mean()] * T, rtol=1e-6)
  assert not combine(BY_LAYER, MASK & False).any()


@eager_and_jitted
def test_log_shift_is_minus_drift_down_to_the_log_floor(way):
  drift = jnp.asarray([[0.0, 0.1, 0.2], [0.22, 0.23, 50.0]])
  log_shift = way(functools.partial(router_log_shift, floor=0.8))(drift)
  assert log_shift.dtype == jnp.float32
  floor = math.log(0.8)
  np.testing.assert_allclose(log_shift, [[0.0, -0.1, -0.2], [-0.22, floor, floor]], rtol=1e-6)
  scheduled = way(lambda drift, floor: router_log_shift(drift, floor=floor))(drift, jnp.asarray(0.8))
  np.testing.assert_allclose(scheduled, log_shift, rtol=1e-6)


def test_floor_one_switches_router_shift_off():
  for floor in (1.0, jnp.ones(())):
    assert (router_log_shift(jnp.asarray([[0.0, 0.3, 9.0]]), floor=floor) == 0).all()


def test_log_shift_carries_no_gradient():
  drift = jnp.asarray([[0.0, 0.1, 0.5]])
  for argument in (0, 1):
    gradient = jax.grad(lambda x, floor: router_log_shift(x, floor=floor).sum(), argument)(drift, jnp.asarray(0.8))
    assert not gradient.any()


@pytest.mark.parametrize("floor", [0.0, -0.5, 1.01, math.nan])
def test_a_floor_outside_its_range_is_refused_with_a_cure(floor):
  for make in (
    lambda: router_log_shift(jnp.zeros((1, 1)), floor=floor),
    lambda: ShiftOptions(floor=floor),
    lambda: ShiftOptions(floor_start=floor),
    lambda: ShiftOptions(floor_start=floor, floor_updates=10),
  ):
    with pytest.raises(ValueError, match=r"floor\w* is .*want a value in \(0, 1\]. Use 1.0 to switch"):
      make()


@eager_and_jitted
def test_the_floor_can_follow_a_linear_schedule(way):
  options = ShiftOptions(floor=0.8, floor_updates=10, floor_begin=4)
  floor = way(options.floor_at)
  for step, want in ((0, 1.0), (4, 1.0), (9, 0.9), (14, 0.8), (1000, 0.8)):
    np.testing.assert_allclose(floor(jnp.asarray(step, jnp.int32)), want, rtol=1e-6)
  trust = way(lambda step, drift: jnp.exp(router_log_shift(drift, floor=options.floor_at(step))))
  np.testing.assert_allclose(trust(jnp.asarray(9, jnp.int32), jnp.full((1, 1), 5.0)), 0.9, rtol=1e-6)


def test_a_floor_without_a_schedule_is_constant():
  assert ShiftOptions(floor=0.7).floor_at(jnp.asarray(10**6)) == 0.7


def test_the_papers_choices_are_the_defaults():
  options = ShiftOptions()
  assert options.floor_updates == options.floor_begin == 0
  assert (options.floor, options.placement, options.deviation, options.layers, options.level) == (
    0.8, "before_clip", "abs", "mean", "token"
  )  # fmt: skip


@pytest.mark.parametrize("name", ["placement", "deviation", "layers", "level"])
def test_unknown_options_are_refused(name):
  with pytest.raises(ValueError, match=rf"router shift's {name} is 'none'; want one of \("):
    ShiftOptions(**{name: "none"})


@pytest.mark.parametrize("options", [{"floor_updates": -1}, {"floor_begin": -1}], ids=str)
def test_a_negative_number_of_updates_is_refused(options):
  with pytest.raises(ValueError, match=r"floor_updates is .* and floor_begin .*want both >= 0"):
    ShiftOptions(**options)


def test_the_kl_of_routers_that_share_no_expert_is_finite():
  far = router_kl(jnp.asarray([[-100.0, 0.0], [-9000.0, 0.0]]), jnp.asarray([[0.0, -100.0], [0.0, -9000.0]]))
  np.testing.assert_allclose(far, [100.0, 9000.0], rtol=1e-6)
