from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from models.layers.experts import block_rows, choose_backend, run_experts
from models.layers.experts_blocks import Experts, order_by_expert, run_blocks

WIDTH, HIDDEN = 24, 20


def layer(tokens, experts, k, index, *, dtype=jnp.float32, biases=False, seed=0):
  """x, expert_index, gate, weights of a small layer; `index`: (generator, shape) -> expert_index [N, K]."""
  rng = np.random.default_rng(seed)
  shapes = (experts, WIDTH, HIDDEN), (experts, WIDTH, HIDDEN), (experts, HIDDEN, WIDTH)
  x = jnp.asarray(rng.normal(size=(tokens, WIDTH)), dtype)
  gate = jnp.asarray(rng.normal(size=(tokens, k)), jnp.promote_types(dtype, jnp.float32))
  weights = Experts(*(jnp.asarray(rng.normal(size=shape) / shape[1] ** 0.5, dtype) for shape in shapes))
  if biases:
    pair = (jnp.asarray(rng.normal(size=(experts, HIDDEN)), dtype) for _ in range(2))
    weights = Experts(*weights[:3], *pair)
  return x, jnp.asarray(index(rng, (tokens, k)), jnp.int32), gate, weights


def distinct(experts):
  return lambda rng, shape: np.argsort(rng.random((shape[0], experts)), axis=1)[:, : shape[1]]


def some_outside(experts):
  return lambda rng, shape: rng.integers(-3, experts + 3, shape)


# tokens, experts, k, routing. "auto" uses blocks of 1, 8 and 128 rows for these.
ROUTINGS = {
  "one token": (1, 16, 4, distinct(16)),
  "less than a block": (5, 2, 1, distinct(2)),
  "one expert takes all": (53, 6, 1, lambda rng, shape: np.full(shape, 4)),
  "empty experts": (41, 8, 2, lambda rng, shape: rng.choice([1, 6], shape)),
  "some outside": (67, 4, 3, some_outside(4)),
  "large blocks": (431, 3, 2, some_outside(3)),
}


# Jitted once for all tests, which share shapes, because most of their time is compilation.
@partial(jax.jit, static_argnames=("backend", "swiglu_limit"))
def value_and_grads(x, expert_index, gate, weights, *, backend, swiglu_limit=None):
  """y, and the gradients of a fixed random projection of y with respect to x, gate and weights."""
  direction = jax.random.normal(jax.random.key(1), x.shape)

  def project(x, gate, weights):
    y = run_experts(x, expert_index, gate, weights, backend=backend, swiglu_limit=swiglu_limit)
    return jnp.sum(y.astype(jnp.float32) * direction), y

  grads, y = jax.grad(project, argnums=(0, 1, 2), has_aux=True)(x, gate, weights)
  return y, *grads


def assert_close(got, want, tolerance):
  """Compares the maximum difference of each leaf, relative to its maximum absolute value."""
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert a.dtype == b.dtype
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert np.abs(a - b).max() <= tolerance * max(np.abs(b).max(), 1e-30)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_every_backend_equals_dense_in_value_and_gradient(routing):
  arrays = layer(*ROUTINGS[routing])
  want = value_and_grads(*arrays, backend="dense")
  for backend in ("ragged", "blocks", "gathered"):
    assert_close(value_and_grads(*arrays, backend=backend), want, 1e-5)


@pytest.mark.parametrize("backend", ["dense", "ragged", "blocks", "gathered"])
def test_every_backend_equals_a_loop_over_tokens(backend):
  x, expert_index, gate, weights = layer(9, 4, 2, some_outside(4))
  want = np.zeros(x.shape)
  w_gate, w_up, w_down = (np.asarray(w, np.float64) for w in weights[:3])
  for n in range(9):
    for e, g in zip(np.asarray(expert_index[n]), np.asarray(gate[n], np.float64), strict=True):
      if 0 <= e < 4:
        row = np.asarray(x[n], np.float64)
        a = row @ w_gate[e]
        want[n] += g * (a / (1 + np.exp(-a)) * (row @ w_up[e])) @ w_down[e]
  got = jax.jit(partial(run_experts, backend=backend))(x, expert_index, gate, weights)
  assert_close(got, jnp.asarray(want, jnp.float32), 1e-5)


@pytest.mark.parametrize("backend", ["ragged", "blocks", "gathered"])
def test_bfloat16_stays_near_float32(backend):
  x, expert_index, gate, weights = layer(67, 4, 3, some_outside(4), dtype=jnp.bfloat16)
  got = value_and_grads(x, expert_index, gate, weights, backend=backend)
  exact = jax.tree.map(lambda a: a.astype(jnp.float32), (x, gate, weights))
  want = value_and_grads(exact[0], expert_index, *exact[1:], backend="dense")
  assert got[0].dtype == got[1].dtype == got[3][0].dtype == jnp.bfloat16
  assert_close(jax.tree.map(lambda a: a.astype(jnp.float32), got), want, 0.03)


def test_every_backend_has_the_biases_and_clamps_of_gpt_oss():
  x, expert_index, gate, weights = layer(67, 4, 3, some_outside(4), biases=True)
  w_gate, w_up, w_down, gate_bias, up_bias = (np.asarray(w, np.float64) for w in weights)
  want = np.zeros((67, WIDTH))
  for n, k in np.ndindex(expert_index.shape):
    e = int(expert_index[n, k])
    if 0 <= e < 4:
      a = np.minimum(x[n] @ w_gate[e] + gate_bias[e], 0.5)
      u = np.clip(x[n] @ w_up[e] + up_bias[e], -0.5, 0.5)
      want[n] += gate[n, k] * ((u + 1) * a / (1 + np.exp(-1.702 * a)) @ w_down[e])
  outputs = {
    name: value_and_grads(x, expert_index, gate, weights, backend=name, swiglu_limit=0.5)
    for name in ("dense", "ragged", "blocks", "gathered")
  }
  for y, *grads in outputs.values():
    assert_close(y, want.astype(np.float32), 1e-5)
    assert_close(grads, list(outputs["dense"][1:]), 1e-5)


def test_gradient_of_blocks_with_biases_and_a_limit_equals_finite_differences_in_float64():
  with jax.enable_x64(True):
    x, expert_index, gate, weights = layer(11, 4, 2, some_outside(4), dtype=jnp.float64, biases=True)
    run = jax.jit(lambda x, gate, weights: run_blocks(x, expert_index, gate, weights, 4, 2.5))
    check_grads(run, (x, gate, weights), order=1, modes=["rev"], atol=1e-6, rtol=1e-6, eps=1e-6)


def test_float32_weights_used_in_bfloat16_keep_float32_gradients():
  x, expert_index, gate, weights = layer(67, 4, 3, some_outside(4))
  want = value_and_grads(x, expert_index, gate, weights, backend="dense")[3]
  run = partial(value_and_grads, backend="blocks")
  assert_close(run(x.astype(jnp.bfloat16), expert_index, gate, weights)[3], want, 0.03)


@pytest.mark.parametrize(("routing", "rows"), [("empty experts", 4), ("some outside", 1), ("one expert takes all", 64)])
def test_gradient_of_blocks_equals_finite_differences_in_float64(routing, rows):
  with jax.enable_x64(True):
    _, experts, k, index = ROUTINGS[routing]
    x, expert_index, gate, weights = layer(11, experts, k, index, dtype=jnp.float64)
    run = jax.jit(lambda x, gate, weights: run_blocks(x, expert_index, gate, weights, rows))
    check_grads(run, (x, gate, weights), order=1, modes=["rev"], atol=1e-6, rtol=1e-6, eps=1e-5)


@pytest.mark.parametrize("backend", ["dense", "ragged", "blocks"])
def test_dropped_pairs_add_exactly_zero_and_get_zero_gradient(backend):
  x, expert_index, gate, weights = layer(67, 4, 3, some_outside(4))
  run = partial(value_and_grads, backend=backend)
  y, dx, dgate, dweights = run(x, expert_index, gate, weights)
  dropped = (expert_index < 0) | (expert_index >= 4)
  all_dropped = jnp.all(dropped, axis=1)
  assert bool(all_dropped.any())
  assert not np.any(dgate[dropped])
  assert np.all(dgate[~dropped] != 0)
  assert not np.any(y[all_dropped])
  assert not np.any(dx[all_dropped])

  other_index = jnp.where(dropped, jnp.where(expert_index < 0, -(2**31), 2**31 - 1), expert_index)
  again = run(jnp.where(all_dropped[:, None], 1e3, x), other_index, jnp.where(dropped, 1e3, gate), weights)
  for a, b in zip(jax.tree.leaves((y, dx, dgate, dweights)), jax.tree.leaves(again), strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("backend", ["dense", "ragged", "blocks"])
def test_output_and_gradients_are_exactly_zero_if_all_pairs_are_dropped(backend):
  x, _, gate, weights = layer(*ROUTINGS["some outside"])
  no_expert = jnp.where(jnp.arange(gate.size).reshape(gate.shape) % 2 == 0, -1, 4)
  for leaf in jax.tree.leaves(value_and_grads(x, no_expert, gate, weights, backend=backend)):
    assert not np.any(leaf)


def test_eager_equals_jitted():
  arrays = layer(*ROUTINGS["some outside"])
  assert_close(run_experts(*arrays), jax.jit(run_experts)(*arrays), 1e-6)
  direction = jax.random.normal(jax.random.key(1), arrays[0].shape)
  dx = jax.grad(lambda x: jnp.vdot(run_experts(x, *arrays[1:]), direction))(arrays[0])
  assert_close(dx, value_and_grads(*arrays, backend="blocks")[1], 1e-6)


def test_auto_on_cpus_is_blocks():
  arrays = layer(*ROUTINGS["some outside"])
  text = jax.jit(run_experts).lower(*arrays).as_text()
  assert text == jax.jit(partial(run_experts, backend="blocks")).lower(*arrays).as_text()
  assert text != jax.jit(partial(run_experts, backend="ragged")).lower(*arrays).as_text()


def test_auto_on_gpus_is_gathered_for_few_pairs_and_ragged_for_many():
  arrays = layer(*ROUTINGS["some outside"])
  text = jax.jit(partial(run_experts, platform="gpu")).lower(*arrays).as_text()
  assert text == jax.jit(partial(run_experts, backend="ragged")).lower(*arrays).as_text()
  for platform in ("gpu", "tpu"):
    assert [choose_backend(platform, pairs, 128) for pairs in (8, 42, 43, 1024)] == [*["gathered"] * 2, *["ragged"] * 2]
  assert {choose_backend("cpu", pairs, 128) for pairs in (8, 1024)} == {"blocks"}


def test_block_rows_grow_with_the_pairs_per_expert():
  assert [block_rows(16 * pairs, 16) for pairs in (1, 2, 47, 48, 255, 256, 10**5)] == [1, 8, 8, 64, 64, 128, 128]


def test_output_of_a_token_does_not_depend_on_dropped_tokens():
  x, expert_index, gate, weights = layer(67, 4, 3, distinct(4))
  run = jax.jit(partial(run_blocks, rows=8))
  half = jnp.where(jnp.arange(67)[:, None] < 30, expert_index, -1)
  np.testing.assert_array_equal(run(x, half, gate, weights)[:30], run(x, expert_index, gate, weights)[:30])


def test_pairs_are_sorted_by_expert_then_by_token():
  expert_index = layer(97, 6, 2, some_outside(6))[1]
  order = order_by_expert(expert_index, 6)
  flat = np.asarray(expert_index).reshape(-1)
  flat = np.where((flat < 0) | (flat > 5), 6, flat)
  np.testing.assert_array_equal(order.pair, np.argsort(flat, kind="stable"))
  np.testing.assert_array_equal(order.start, [np.sum(flat < e) for e in range(7)])


def test_blocks_work_in_scan_and_checkpoint():
  x, expert_index, gate, weights = layer(37, 4, 2, some_outside(4))
  stack = jax.tree.map(lambda w: jnp.stack([w, 2 * w]), weights)

  def scanned(x, gate, stack, checkpoint):
    def one(x, weights):
      return x + run_experts(x, expert_index, gate, weights, backend="blocks"), None

    return jnp.sum(jax.lax.scan(jax.checkpoint(one) if checkpoint else one, x, stack)[0] ** 2)

  def unrolled(x, gate, stack):
    for i in range(2):
      x = x + run_experts(x, expert_index, gate, jax.tree.map(lambda w, i=i: w[i], stack), backend="dense")
    return jnp.sum(x**2)

  want = jax.jit(jax.grad(unrolled, argnums=(0, 1, 2)))(x, gate, stack)
  for checkpoint in (False, True):
    run = jax.jit(jax.grad(partial(scanned, checkpoint=checkpoint), argnums=(0, 1, 2)))
    assert_close(run(x, gate, stack), want, 1e-5)


def test_blocks_work_in_shard_map_and_pmap():
  devices = jax.device_count()
  if devices < 2:
    pytest.skip("one device")
  x, expert_index, gate, weights = layer(8 * devices, 4, 2, some_outside(4))
  direction = jax.random.normal(jax.random.key(1), x.shape)
  want = value_and_grads(x, expert_index, gate, weights, backend="dense")[1:]

  def grads(x, expert_index, gate, direction, weights):
    def project(x, gate, weights):
      return jnp.vdot(run_experts(x, expert_index, gate, weights, backend="blocks"), direction)

    dx, dgate, dweights = jax.grad(project, argnums=(0, 1, 2))(x, gate, weights)
    return dx, dgate, jax.lax.psum(dweights, "data")

  mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
  split = (P("data"),) * 4
  mapped = jax.shard_map(
    grads, mesh=mesh, in_specs=(*split, P()), out_specs=(P("data"), P("data"), P()), check_vma=False
  )
  assert_close(jax.jit(mapped)(x, expert_index, gate, direction, weights), want, 1e-5)

  rows = [a.reshape(devices, -1, *a.shape[1:]) for a in (x, expert_index, gate, direction)]
  dx, dgate, dweights = jax.pmap(grads, axis_name="data", in_axes=(0, 0, 0, 0, None))(*rows, weights)
  first = jax.tree.map(lambda a: a[0], dweights)
  assert_close((dx.reshape(x.shape), dgate.reshape(gate.shape), first), want, 1e-5)


def test_outputs_of_expert_shards_sum_to_the_whole_layer():
  x, expert_index, gate, weights = layer(67, 6, 3, distinct(6))
  whole = run_experts(x, expert_index, gate, weights)
  parts = [Experts(*(w[3 * i : 3 * i + 3] for w in weights[:3])) for i in range(2)]
  halves = [run_experts(x, expert_index - 3 * i, gate, part) for i, part in enumerate(parts)]
  assert_close(halves[0] + halves[1], whole, 1e-6)


def test_errors_say_the_cure():
  x, expert_index, gate, weights = layer(8, 4, 2, distinct(4))
  with pytest.raises(ValueError, match=r"backend is 'fast'.*'blocks'"):
    run_experts(x, expert_index, gate, weights, backend="fast")
  with pytest.raises(ValueError, match=r"weights are .*w_down \[E, F, D\]"):
    run_experts(x, expert_index, gate, (*weights[:2], weights[2].swapaxes(1, 2)))
  with pytest.raises(ValueError, match=r"x is \(2, 4, 24\).*Flatten batch and time"):
    run_experts(x.reshape(2, 4, 24), expert_index, gate, weights)
  with pytest.raises(ValueError, match=r"weights are \(\(24, 20\)"):
    run_experts(x, expert_index, gate, tuple(w[0] for w in weights[:3]))
  with pytest.raises(ValueError, match=r"expert_index is \(4, 2\).*N = 8"):
    run_experts(x, expert_index[:4], gate[:4], weights)
  with pytest.raises(ValueError, match=r"pairs over 2000 experts do not fit.*Split the batch"):
    jax.eval_shape(partial(order_by_expert, num_experts=2000), jax.ShapeDtypeStruct((2**20, 2), jnp.int32))
