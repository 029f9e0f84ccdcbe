"""The routing trace: alignment, exactness, size, comparison with the current router, replay, and no gradient."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rspo_jax.router.shift import DEVIATIONS, router_log_shift
from rspo_jax.router.trace import (
  drift_probe,
  expert_load,
  load_probe,
  replay_from_trace,
  stack_trace,
  to_positions,
  to_slots,
  trace_probe,
  trace_probe_inputs,
)
from rspo_jax.types import RouterOutput

L, B, T, E, K = 3, 2, 6, 16, 4
eager_and_jitted = pytest.mark.parametrize("way", [lambda f: f, jax.jit], ids=["eager", "jit"])
each_router = pytest.mark.parametrize("router_log_prob", [jax.nn.log_softmax, jax.nn.log_sigmoid])


def router_logits(seed=0, experts=E, scale=3.0):
  """[L, B, T, experts] float32."""
  return jax.random.normal(jax.random.key(seed), (L, B, T, experts)) * scale


def through_layers(probe, logits, probe_inputs=None):
  """Runs a probe as a model does: in a scan over layers, with the top-k choice of the logits."""

  def layer(carry, x):
    layer_logits, layer_inputs = x
    gate, expert_index = jax.lax.top_k(jax.nn.softmax(layer_logits), K)
    return carry, probe(RouterOutput(layer_logits, expert_index, gate), layer_inputs)

  return jax.lax.scan(layer, 0, (logits, probe_inputs))[1]


def record(logits, router_log_prob=jax.nn.log_softmax, **fields):
  return stack_trace(through_layers(trace_probe(router_log_prob, **fields), logits))


def compare(logits, trace, router_log_prob=jax.nn.log_softmax, mask=None, deviation="abs"):
  mask = jnp.ones((B, T), bool) if mask is None else mask
  probe = drift_probe(router_log_prob, mask, deviation=deviation)
  return through_layers(probe, logits, trace_probe_inputs(trace))


@eager_and_jitted
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.uint8, jnp.int32, bool])
def test_to_slots_moves_each_position_to_the_next_slot(way, dtype):
  x = jax.random.randint(jax.random.key(0), (B, T, 3), 0, 2).astype(dtype)
  slots, positions = way(to_slots)(x), way(to_positions)(x)
  assert slots.dtype == positions.dtype == x.dtype
  for t in range(T):
    np.testing.assert_array_equal(slots[:, t], x[:, t - 1] if t > 0 else 0)
    np.testing.assert_array_equal(positions[:, t], x[:, t + 1] if t < T - 1 else 0)


@given(st.integers(1, 5), st.integers(0, 3))
@settings(max_examples=20, deadline=None)
def test_to_positions_inverts_to_slots_except_at_the_last_position(length, axis):
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


def test_probe_inputs_align_each_slot_with_the_position_that_scored_it():
  recorded = through_layers(trace_probe(jax.nn.log_softmax), router_logits())
  inputs = trace_probe_inputs(stack_trace(recorded))
  for one, other in zip(jax.tree.leaves(recorded), jax.tree.leaves(inputs), strict=True):
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
  """Recorded by one program and compared by another, with and without a gradient."""
  logits = router_logits(seed=1)
  recording = functools.partial(record, router_log_prob=router_log_prob, all_experts=True)
  scored = to_positions(jnp.ones((B, T), bool))  # a row's last position has no old entry

  def compare_all(logits, trace):
    of = functools.partial(compare, logits, trace, router_log_prob, scored)
    return {deviation: of(deviation=deviation) for deviation in DEVIATIONS}

  def trained(logits, trace):
    return jnp.sum(logits**2), compare_all(logits, trace)

  for trace in (recording(logits), jax.jit(recording)(logits)):
    for drifts in (
      compare_all(logits, trace),
      jax.jit(compare_all)(logits, trace),
      jax.jit(jax.grad(trained, has_aux=True))(logits, trace)[1],
    ):
      for drift in drifts.values():
        deviation = to_slots(drift.deviation, axis=2)
        assert (deviation == 0).all()
        assert (drift.overlap == B * (T - 1)).all()
        assert (router_log_shift(deviation.mean(0), floor=0.8) == 0).all()


@eager_and_jitted
def test_drift_is_the_mean_change_of_the_old_experts_log_probs(way):
  old, new = router_logits(seed=2), router_logits(seed=2) + router_logits(seed=3, scale=0.5)
  trace = record(old)
  drift = to_slots(way(compare)(new, trace).deviation, axis=2)
  before, after = (np.asarray(jax.nn.log_softmax(x)) for x in (old, new))
  for layer, b, t in np.ndindex(L, B, T):
    chosen = np.argsort(-np.asarray(old)[layer, b, t - 1])[:K]
    want = np.abs(after - before)[layer, b, t - 1, chosen].mean() if t else 0.0
    np.testing.assert_allclose(drift[layer, b, t], want, atol=2**-8)


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


def test_both_probes_count_the_load_of_the_current_choice():
  old, new = router_logits(seed=4), router_logits(seed=5)
  mask = jax.random.bernoulli(jax.random.key(6), 0.5, (B, T))
  load = compare(new, record(old), mask=mask).load
  np.testing.assert_array_equal(load, through_layers(load_probe(jax.nn.log_softmax, mask), new).load)
  chosen = np.asarray(jax.lax.top_k(new, K)[1])
  for layer in range(L):
    np.testing.assert_array_equal(load[layer], np.bincount(chosen[layer][np.asarray(mask)].ravel(), minlength=E))


def test_probes_carry_no_gradient_and_store_nothing_for_the_backward_pass():
  trace, logits = record(router_logits(seed=7)), router_logits(seed=8)
  gradient = jax.grad(lambda x: compare(x, trace).deviation.sum())(logits)
  assert (gradient == 0).all()
  gradient = jax.grad(lambda x: record(x).log_prob.astype(jnp.float32).sum())(logits)
  assert (gradient == 0).all()

  def stored(with_probe):
    def forward(x):
      return jnp.sum(x * 2.0) + (with_probe(x) if with_probe else 0.0)

    return sum(leaf.size for leaf in jax.tree.leaves(jax.vjp(forward, logits)[1]) if hasattr(leaf, "size"))

  assert stored(lambda x: compare(x, trace).deviation.sum()) == stored(None)
  assert stored(lambda x: jnp.sum(jax.nn.log_softmax(x) ** 2)) > stored(None)


@each_router
def test_router_entropy_is_that_of_the_normalised_router_over_masked_positions(router_log_prob):
  logits = router_logits(seed=9)
  mask = jax.random.bernoulli(jax.random.key(1), 0.5, (B, T))
  p = np.exp(np.asarray(router_log_prob(logits), np.float64))
  p /= p.sum(-1, keepdims=True)
  want = (-(p * np.log(p)).sum(-1) * np.asarray(mask)).sum(axis=(1, 2))
  np.testing.assert_allclose(compare(logits, record(logits), router_log_prob, mask).entropy, want, rtol=1e-5)
  np.testing.assert_allclose(through_layers(load_probe(router_log_prob, mask), logits).entropy, want, rtol=1e-5)


def test_overlap_is_counted_over_masked_positions_only():
  old, new = router_logits(seed=2), router_logits(seed=12)
  mask = to_positions(jax.random.bernoulli(jax.random.key(3), 0.5, (B, T)))
  chosen = [np.asarray(jax.lax.top_k(x, K)[1]) for x in (old, new)]
  want = np.zeros(L)
  for layer, b, t in np.ndindex(L, B, T):
    want[layer] += mask[b, t] * len(set(chosen[0][layer, b, t]) & set(chosen[1][layer, b, t])) / K
  np.testing.assert_allclose(compare(new, record(old), mask=mask).overlap, want, rtol=1e-6)


def test_every_deviation_equals_numpy_at_the_position_that_scored_the_token():
  """Slot by slot."""
  old, new = router_logits(seed=2), router_logits(seed=2) + router_logits(seed=3, scale=0.7)
  trace = record(old, all_experts=True)
  before, after = (np.asarray(jax.nn.log_softmax(x), np.float64) for x in (old, new))
  for deviation in DEVIATIONS:
    got = to_slots(compare(new, trace, deviation=deviation).deviation, axis=2)
    for layer, b, t in np.ndindex(L, B, T):
      p, q = before[layer, b, t - 1], after[layer, b, t - 1]
      chosen, current = np.argsort(-p)[:K], np.argsort(-q)[:K]
      want = {
        "abs": np.abs(q - p)[chosen].mean(),
        "squared": ((q - p) ** 2)[chosen].mean(),
        "kl": (np.exp(p) * (p - q)).sum(),
        "overlap": 1 - len(set(chosen) & set(current)) / K,
      }[deviation]
      np.testing.assert_allclose(got[layer, b, t], want if t else 0.0, atol=2e-2 if deviation == "squared" else 5e-3)


def test_a_replay_has_the_experts_and_gates_of_every_position():
  logits = router_logits(seed=4)
  gate, expert_index = jax.lax.top_k(jax.nn.softmax(logits), K)
  trace = record(logits, gates=True)
  replay = replay_from_trace(trace, gates=True)
  np.testing.assert_array_equal(replay.expert_index[:, :, :-1], expert_index[:, :, :-1])
  np.testing.assert_array_equal(replay.gate[:, :, :-1], gate[:, :, :-1])
  assert replay_from_trace(trace).gate is None
  with pytest.raises(ValueError, match="holds no gates"):
    replay_from_trace(record(logits), gates=True)


def test_drift_probe_without_a_trace_names_the_probe_to_use():
  with pytest.raises(ValueError, match=r"probe_inputs=None.*load_probe"):
    through_layers(drift_probe(jax.nn.log_softmax, jnp.ones((B, T), bool)), router_logits())
