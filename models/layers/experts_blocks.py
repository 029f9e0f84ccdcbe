"""The CPU backend of the experts: a loop over blocks of rows of the active experts.

Token-expert pairs are sorted by expert, and each expert's range is processed in blocks of a fixed number of rows. An
expert's weights are read once, nothing is padded in memory, and dropped pairs cost no work. The number of blocks
depends on the routing, hence loops with a dynamic bound and a custom VJP. The inputs of the SwiGLU are saved for the
gradient, 2 F numbers per pair, which is 0.93 of the time of a train step that recomputes them. Setting `remat` in the
model's configuration saves that memory.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

# Rows per block for the pairs of an expert that remain after its full blocks. 0.97 of the time of a train step with
# 24,576 pairs over 16 experts, where on average half a block of 128 rows per expert would be empty.
TAIL_ROWS = 16


class Experts(NamedTuple):
  """Weights of the experts of one layer.

  Attributes:
    gate, up: [E, D, F]. down: [E, F, D].
    gate_bias, up_bias: [E, F], or None for both.
  """

  gate: jax.Array
  up: jax.Array
  down: jax.Array
  gate_bias: jax.Array | None = None
  up_bias: jax.Array | None = None


def swiglu(a: jax.Array, u: jax.Array, limit: float | None = None) -> jax.Array:
  """silu(a) * u. With a limit, the form of gpt-oss: a sigmoid(1.702 a) (u + 1), where a is clamped to at most limit and
  u to [-limit, limit]."""
  if limit is None:
    return jax.nn.silu(a) * u
  a, u = jnp.minimum(a, limit), jnp.clip(u, -limit, limit)
  return a * jax.nn.sigmoid(1.702 * a) * (u + 1)


class Order(NamedTuple):
  """Token-expert pairs sorted by expert, then by token. M = N * K pairs, E experts.

  Attributes:
    pair: [M] int32, the pair (n * K + k) at each sorted position; dropped pairs are last.
    start: [E + 1] int32, first position of each expert; start[E] is the number of pairs that are not dropped.
  """

  pair: jax.Array
  start: jax.Array


def order_by_expert(expert_index: jax.Array, num_experts: int) -> Order:
  """expert_index [N, K] int32 -> Order; entries outside [0, num_experts) are dropped.

  Raises:
    ValueError: too many pairs for 32-bit sort keys.
  """
  flat, pairs = expert_index.reshape(-1), expert_index.size
  if pairs * (num_experts + 1) >= 2**31:
    raise ValueError(
      f"{pairs} token-expert pairs over {num_experts} experts do not fit 32-bit sort keys; want fewer than "
      f"{2**31 // (num_experts + 1)} pairs. Split the batch."
    )
  flat = jnp.where((flat >= 0) & (flat < num_experts), flat, num_experts)
  # Sorting one packed key takes a third of the time of a stable argsort on CPUs.
  key = jax.lax.sort(flat * pairs + jnp.arange(pairs, dtype=jnp.int32), is_stable=False)
  # compare_all halves the compile time of the default method and takes under 1 % of the layer's run time.
  start = jnp.searchsorted(key, jnp.arange(num_experts + 1, dtype=jnp.int32) * pairs, method="compare_all")
  return Order(key % pairs, start.astype(jnp.int32))


class _Block(NamedTuple):
  start: jax.Array  # [] int32, sorted position of its first row
  pair: jax.Array  # [rows] int32
  token: jax.Array  # [rows] int32
  valid: jax.Array  # [rows, 1] bool, False in rows after the expert's last pair


def _loop_over_experts(order, run_expert, carry):
  """carry = run_expert(e, carry) for every expert that has pairs; weights of the other experts are not read."""

  def body(state):
    position, carry = state
    e = jnp.sum(order.start <= position, dtype=jnp.int32) - 1
    return order.start[e + 1], run_expert(e, carry)

  return jax.lax.while_loop(lambda state: state[0] < order.start[-1], body, (order.start[0], carry))[1]


def _loop_over_blocks(order, k, e, rows, step, carry):
  """carry = step(block, carry) for every block of expert e: full blocks, then blocks of `TAIL_ROWS` for the rest."""

  def loop(start, end, count, rows, carry):
    def body(b, carry):
      first = start + b * rows
      position = first + jnp.arange(rows, dtype=jnp.int32)
      pair = _gather_rows(order.pair, jnp.minimum(position, order.pair.size - 1))
      return step(_Block(first, pair, pair // k, (position < end)[:, None]), carry)

    return jax.lax.fori_loop(0, count, body, carry)

  start, end = order.start[e], order.start[e + 1]
  if rows > TAIL_ROWS:
    full = (end - start) // rows
    carry = loop(start, end, full, rows, carry)
    start, rows = start + full * rows, TAIL_ROWS
  return loop(start, end, (end - start + rows - 1) // rows, rows, carry)


def _dot(a, b, a_axis, b_axis):
  dtype = jnp.promote_types(a.dtype, jnp.float32)
  return jax.lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((), ())), preferred_element_type=dtype)


def _gather_rows(x, index):
  return x.at[index].get(mode="promise_in_bounds")


def _write_rows(x, rows, *, start):
  return jax.lax.dynamic_update_slice_in_dim(x, rows, start, axis=0)


def _scatter_add_rows(x, index, rows):
  return x.at[index].add(rows, mode="promise_in_bounds")


def _select_expert(weights, e, dtype):
  return jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, e, keepdims=False).astype(dtype), weights)


def _swiglu_inputs(x_rows, expert):
  """(a, u), the gate and up projections of x_rows, each [rows, F]."""
  a, u = _dot(x_rows, expert.gate, 1, 0), _dot(x_rows, expert.up, 1, 0)
  return (a, u) if expert.gate_bias is None else (a + expert.gate_bias, u + expert.up_bias)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def run_blocks(x, expert_index, gate, weights, rows, limit=None):
  """`models.layers.experts.run_experts` by blocks of `rows` rows."""
  return _run(x, expert_index, gate, weights, rows, limit, keep=False)[0]


def _forward(x, expert_index, gate, weights, rows, limit):
  return _run(x, expert_index, gate, weights, rows, limit, keep=True)


def _run(x, expert_index, gate, weights, rows, limit, keep):
  """(output [N, D], residuals of the gradient). keep: whether to save the inputs of the SwiGLU in the residuals."""
  order = order_by_expert(expert_index, weights.gate.shape[0])
  gates = gate.reshape(-1)

  def run_expert(e, carry):
    expert = _select_expert(weights, e, x.dtype)

    def step(block, carry):
      y, saved = carry
      inputs = _swiglu_inputs(_gather_rows(x, block.token), expert)
      if keep:  # invalid rows of the last block are overwritten by the next expert
        saved = jax.tree.map(partial(_write_rows, start=block.start), saved, inputs)
      y_rows = _dot(swiglu(*inputs, limit).astype(x.dtype), expert.down, 1, 0)
      y_rows = y_rows * _gather_rows(gates, block.pair)[:, None]
      return _scatter_add_rows(y, block.token, jnp.where(block.valid, y_rows, 0)), saved

    return _loop_over_blocks(order, gate.shape[1], e, rows, step, carry)

  dtype = jnp.promote_types(x.dtype, jnp.float32)
  saved = (jnp.zeros((gates.size + rows, weights.gate.shape[2]), dtype),) * 2 if keep else ()
  y, saved = _loop_over_experts(order, run_expert, (jnp.zeros(x.shape, dtype), saved))
  return y.astype(x.dtype), (x, gate, weights, order, saved)


def _backward(rows, limit, residuals, dy):
  x, gate, weights, order, saved = residuals
  _, width, hidden_width = weights.gate.shape
  dtype = jnp.promote_types(x.dtype, jnp.float32)
  gates = gate.reshape(-1)

  def run_expert(e, carry):
    dx, dgates, dweights = carry
    expert = _select_expert(weights, e, x.dtype)

    def step(block, carry):
      dx, dgates, grads = carry
      x_rows, dy_rows = _gather_rows(x, block.token), _gather_rows(dy, block.token)
      scale = jnp.where(block.valid, _gather_rows(gates, block.pair)[:, None], 0)
      inputs = [jax.lax.dynamic_slice_in_dim(array, block.start, block.pair.size) for array in saved]
      hidden, swiglu_vjp = jax.vjp(partial(swiglu, limit=limit), *inputs)
      dhidden = _dot(dy_rows, expert.down, 1, 1)
      dgate_rows = jnp.sum(dhidden * hidden, axis=1, keepdims=True)
      da, du = swiglu_vjp(dhidden * scale)
      if expert.gate_bias is None:
        dbiases = (None, None)
      else:
        dbiases = (grads.gate_bias + da.sum(axis=0), grads.up_bias + du.sum(axis=0))
      da, du, hidden = da.astype(x.dtype), du.astype(x.dtype), (scale * hidden).astype(x.dtype)
      dx_rows = _dot(da, expert.gate, 1, 1) + _dot(du, expert.up, 1, 1)
      # XLA on CPUs contracts over rows at half speed: with transposed operands the gradient takes 0.79 of the time.
      da, du, hidden = jax.lax.optimization_barrier((da.T, du.T, hidden.T))
      return (
        _scatter_add_rows(dx, block.token, dx_rows),  # scale is 0 in invalid rows
        _scatter_add_rows(dgates, block.pair, jnp.where(block.valid, dgate_rows, 0)[:, 0]),
        Experts(
          grads.gate + _dot(da, x_rows, 1, 0),
          grads.up + _dot(du, x_rows, 1, 0),
          grads.down + _dot(hidden, dy_rows, 1, 0),
          *dbiases,
        ),
      )

    zero = jnp.zeros((hidden_width, width), dtype)
    bias = None if weights.gate_bias is None else jnp.zeros((hidden_width,), dtype)
    grads = Experts(zero, zero, zero, bias, bias)
    dx, dgates, grads = _loop_over_blocks(order, gate.shape[1], e, rows, step, (dx, dgates, grads))
    grads = grads._replace(gate=grads.gate.T, up=grads.up.T)
    return dx, dgates, jax.tree.map(lambda w, g: w.at[e].set(g.astype(w.dtype)), dweights, grads)

  zeros = (jnp.zeros(x.shape, dtype), jnp.zeros(gates.shape, dtype), jax.tree.map(jnp.zeros_like, weights))
  dx, dgates, dweights = _loop_over_experts(order, run_expert, zeros)
  return dx.astype(x.dtype), None, dgates.reshape(gate.shape).astype(gate.dtype), dweights


run_blocks.defvjp(_forward, _backward)
