"""Recording, comparing and weighing routing: alignment, exactness, size, and the absence of any gradient."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rspo_jax.routing import (
  count_load,
  expert_load,
  expert_overlap,
  record_routing,
  router_drift,
  router_log_shift,
  stack_trace,
  to_positions,
  to_slots,
  trace_for_probe,
  watch_routing,
)

L, B, T, E, K = 3, 2, 6, 16, 4
eager_and_jitted = pytest.mark.parametrize("way", [lambda f: f, jax.jit], ids=["eager", "jit"])
each_router = pytest.mark.parametrize("router_log_prob", [jax.nn.log_softmax, jax.nn.log_sigmoid])


def router_logits(seed=0, experts=E, scale=3.0):
  """[L, B, T, experts] float32."""
  return jax.random.normal(jax.random.key(seed), (L, B, T, experts)) * scale


def through_layers(probe, logits, probe_inputs=None):
  """Runs a probe as a model does: in a scan over layers, with the top-k choice of the live logits."""

  def layer(carry, x):
    layer_logits, layer_inputs = x
    return carry, probe(layer_logits, jax.lax.top_k(layer_logits, K)[1], layer_inputs)

  return jax.lax.scan(layer, 0, (logits, probe_inputs))[1]


def record(logits, router_log_prob=jax.nn.log_softmax):
  return stack_trace(through_layers(record_routing(router_log_prob), logits))


def watch(logits, trace, router_log_prob=jax.nn.log_softmax, mask=None):
  mask = jnp.ones((B, T), bool) if mask is None else mask
  return through_layers(watch_routing(router_log_prob, mask), logits, trace_for_probe(trace))


@eager_and_jitted
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.uint8, jnp.int32, bool])
def test_slots_describe_the_position_before_them(way, dtype):
  x = jax.random.randint(jax.random.key(0), (B, T, 3), 0, 2).astype(dtype)
  slots, positions = way(to_slots)(x), way(to_positions)(x)
  assert slots.dtype == positions.dtype == x.dtype
  for t in range(T):
    np.testing.assert_array_equal(slots[:, t], x[:, t - 1] if t > 0 else 0)
    np.testing.assert_array_equal(positions[:, t], x[:, t + 1] if t < T - 1 else 0)


@given(st.integers(1, 5), st.integers(0, 3))
@settings(max_examples=20, deadline=None)
def test_moving_to_slots_and_back_loses_only_the_last_position(length, axis):
  shape = [2, 2, 2, 2]
  shape[axis] = length
  x = np.arange(1, 1 + math.prod(shape), dtype=np.float32).reshape(shape)
  back = np.moveaxis(to_positions(to_slots(x, axis=axis), axis=axis), axis, 0)
  np.testing.assert_array_equal(back[:-1], np.moveaxis(x, axis, 0)[:-1])
  assert not back[-1].any()


@eager_and_jitted
@each_router
def test_trace_holds_for_each_slot_the_routing_of_the_position_before_it(way, router_log_prob):
  logits = router_logits()
  trace = way(functools.partial(record, router_log_prob=router_log_prob))(logits)
  log_prob = np.asarray(router_log_prob(logits))
  for layer, b, t in np.ndindex(L, B, T):
    if t == 0:
      assert not trace.expert_index[b, t].any()
      assert not trace.log_prob[b, t].any()
      continue
    chosen = np.argsort(-np.asarray(logits)[layer, b, t - 1])[:K]
    np.testing.assert_array_equal(trace.expert_index[b, t, layer], chosen)
    # A float16 has 11 bits.
    np.testing.assert_allclose(trace.log_prob[b, t, layer], log_prob[layer, b, t - 1, chosen], rtol=2**-11, atol=1e-4)


def test_probe_inputs_put_each_slot_back_under_the_position_that_scored_it():
  recorded = through_layers(record_routing(jax.nn.log_softmax), router_logits())
  given_back = trace_for_probe(stack_trace(recorded))
  for one, other in zip(recorded, given_back, strict=True):
    assert one.dtype == other.dtype
    np.testing.assert_array_equal(one[:, :, :-1], other[:, :, :-1])


@pytest.mark.parametrize(("experts", "dtype", "limit"), [(16, np.uint8, 3), (256, np.uint8, 3), (257, np.uint16, 4)])
def test_trace_costs_at_most_three_bytes_per_entry_up_to_256_experts(experts, dtype, limit):
  logits = router_logits(experts=experts).at[..., -1].set(50.0)
  trace = record(logits)
  assert trace.expert_index.dtype == dtype
  assert trace.expert_index.nbytes + trace.log_prob.nbytes == limit * B * T * L * K
  assert (trace.expert_index[:, 1:, :, 0] == experts - 1).all()


@each_router
def test_unmoved_router_has_exactly_zero_drift_and_zero_log_shift(router_log_prob):
  """Recorded by one program and compared by another, with and without a gradient around it."""
  logits = router_logits(seed=1)
  recording = functools.partial(record, router_log_prob=router_log_prob)
  comparing = functools.partial(watch, router_log_prob=router_log_prob)

  def trained(logits, trace):
    watched = comparing(logits, trace)
    return jnp.sum(logits**2), watched

  for trace in (recording(logits), jax.jit(recording)(logits)):
    for watched in (
      comparing(logits, trace),
      jax.jit(comparing)(logits, trace),
      jax.jit(jax.grad(trained, has_aux=True))(logits, trace)[1],
    ):
      drift = to_slots(watched.drift, axis=2)
      assert (drift == 0).all()
      assert (to_slots(watched.overlap, axis=2)[:, :, 1:] == 1).all()
      assert (router_log_shift(drift.mean(0), floor=0.8) == 0).all()


@eager_and_jitted
def test_drift_is_the_mean_change_of_the_old_experts_log_probs(way):
  old, new = router_logits(seed=2), router_logits(seed=2) + router_logits(seed=3, scale=0.5)
  trace = record(old)
  drift = to_slots(way(watch)(new, trace).drift, axis=2)
  before, after = (np.asarray(jax.nn.log_softmax(x)) for x in (old, new))
  for layer, b, t in np.ndindex(L, B, T):
    chosen = np.argsort(-np.asarray(old)[layer, b, t - 1])[:K]
    want = np.abs(after - before)[layer, b, t - 1, chosen].mean() if t else 0.0
    np.testing.assert_allclose(drift[layer, b, t], want, atol=2**-8)


def test_router_drift_on_plain_arrays_by_hand():
  new = jnp.log(jnp.asarray([[0.5, 0.2], [0.1, 0.4]]))
  old = jnp.log(jnp.asarray([[0.25, 0.4], [0.1, 0.2]]))
  np.testing.assert_allclose(router_drift(new, old), [math.log(2), math.log(2) / 2], rtol=1e-6)


@eager_and_jitted
def test_overlap_counts_shared_experts_in_any_order(way):
  old = jnp.asarray([[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3], [255, 254, 1, 0]], jnp.uint8)
  new = jnp.asarray([[3, 2, 1, 0], [9, 8, 1, 0], [4, 5, 6, 7], [254, 3, 4, 5]], jnp.int32)
  np.testing.assert_array_equal(way(expert_overlap)(new, old), [1.0, 0.5, 0.0, 0.25])


@eager_and_jitted
def test_load_counts_only_masked_positions_and_adds_up_over_a_split(way):
  rng = np.random.default_rng(0)
  index = np.stack([rng.permutation(E)[:K] for _ in range(B * T)]).reshape(B, T, K)
  mask = rng.random((B, T)) < 0.6
  count = way(lambda index, mask: expert_load(index, mask, E))
  load = count(index, mask)
  assert load.dtype == jnp.int32
  np.testing.assert_array_equal(load, np.bincount(index[mask].ravel(), minlength=E))
  np.testing.assert_array_equal(load, count(index[:1], mask[:1]) + count(index[1:], mask[1:]))


def test_both_probes_count_the_same_load_of_the_live_choice():
  old, new = router_logits(seed=4), router_logits(seed=5)
  mask = jax.random.bernoulli(jax.random.key(6), 0.5, (B, T))
  watched = watch(new, record(old), mask=mask).load
  np.testing.assert_array_equal(watched, through_layers(count_load(mask), new))
  chosen = np.asarray(jax.lax.top_k(new, K)[1])
  for layer in range(L):
    np.testing.assert_array_equal(watched[layer], np.bincount(chosen[layer][np.asarray(mask)].ravel(), minlength=E))


def test_watching_carries_no_gradient_and_keeps_nothing_for_the_backward_pass():
  trace, logits = record(router_logits(seed=7)), router_logits(seed=8)
  gradient = jax.grad(lambda x: watch(x, trace).drift.sum())(logits)
  assert (gradient == 0).all()
  gradient = jax.grad(lambda x: record(x).log_prob.astype(jnp.float32).sum())(logits)
  assert (gradient == 0).all()

  def kept(with_probe):
    def forward(x):
      return jnp.sum(x * 2.0) + (with_probe(x) if with_probe else 0.0)

    return sum(leaf.size for leaf in jax.tree.leaves(jax.vjp(forward, logits)[1]) if hasattr(leaf, "size"))

  assert kept(lambda x: watch(x, trace).drift.sum()) == kept(None)
  assert kept(lambda x: jnp.sum(jax.nn.log_softmax(x) ** 2)) > kept(None)


@eager_and_jitted
def test_log_shift_is_minus_drift_down_to_the_log_floor(way):
  drift = jnp.asarray([[0.0, 0.1, 0.2], [0.22, 0.23, 50.0]])
  log_shift = way(functools.partial(router_log_shift, floor=0.8))(drift)
  assert log_shift.dtype == jnp.float32
  floor = math.log(0.8)
  np.testing.assert_allclose(log_shift, [[0.0, -0.1, -0.2], [-0.22, floor, floor]], rtol=1e-6)


def test_floor_one_switches_router_shift_off():
  assert (router_log_shift(jnp.asarray([[0.0, 0.3, 9.0]]), floor=1.0) == 0).all()


def test_log_shift_carries_no_gradient():
  drift = jnp.asarray([[0.0, 0.1, 0.5]])
  assert not jax.grad(lambda x: router_log_shift(x, floor=0.8).sum())(drift).any()


@pytest.mark.parametrize("floor", [0.0, -0.5, 1.01, math.nan])
def test_a_floor_outside_its_range_is_named_with_its_cure(floor):
  with pytest.raises(ValueError, match=r"floor is .*want a value in \(0, 1\]. Use 1.0 to switch"):
    router_log_shift(jnp.zeros((1, 1)), floor=floor)


def test_watching_without_a_trace_names_the_probe_to_use():
  with pytest.raises(ValueError, match=r"probe_inputs=None.*count_load"):
    through_layers(watch_routing(jax.nn.log_softmax, jnp.ones((B, T), bool)), router_logits())
