"""The CPU way of running mixture-of-experts layers: a loop over the row blocks that are in use.

Token-expert pairs are put in order of expert. Each expert's stretch of that order is walked in blocks of a fixed
number of rows, so an expert's weights are read once, nothing is padded in memory, and the work is what the tokens
ask for. How many blocks an expert needs is known only when the tokens are: hence loops with a dynamic bound and a
hand-written gradient. What enters the SwiGLU is kept for it, 2 F numbers per pair in order of expert: that is 0.93 of
the time of a train step that computes it again. `remat` in the model's configuration saves the memory.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

# What is left of an expert's pairs after its whole blocks goes in blocks of so many rows: 0.97 of the time of a train
# step of 24,576 pairs over 16 experts; half a block of 128 per expert is nobody's.
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


def swiglu(a, u, limit=None):
  """silu(a) * u; with a limit, gpt-oss's form: a sigmoid(1.702 a) (u + 1), a cut off above and u at both sides."""
  if limit is None:
    return jax.nn.silu(a) * u
  a, u = jnp.minimum(a, limit), jnp.clip(u, -limit, limit)
  return a * jax.nn.sigmoid(1.702 * a) * (u + 1)


class Order(NamedTuple):
  """Token-expert pairs in order of expert, in order of token within one expert. M = N * K pairs, E experts.

  Attributes:
    pair: [M] int32, which pair (n * K + k) stands at each place; pairs without an expert come last.
    start: [E + 1] int32, first place of each expert; start[E] is the number of pairs that have an expert.
  """

  pair: jax.Array
  start: jax.Array


def order_by_expert(expert_index, num_experts):
  """expert_index [N, K] int32 -> Order; an entry outside [0, num_experts) names no expert.

  Raises:
    ValueError: more pairs than 32 bits can order.
  """
  flat, pairs = expert_index.reshape(-1), expert_index.size
  if pairs * (num_experts + 1) >= 2**31:
    raise ValueError(
      f"{pairs} token-expert pairs over {num_experts} experts came at once; want fewer than "
      f"{2**31 // (num_experts + 1)} pairs. Split the batch."
    )
  flat = jnp.where((flat >= 0) & (flat < num_experts), flat, num_experts)
  # One packed key: on CPU a third of the time of a stable argsort.
  key = jax.lax.sort(flat * pairs + jnp.arange(pairs, dtype=jnp.int32), is_stable=False)
  # Half the compile time of the default method, and under 1 % of the layer's run time.
  start = jnp.searchsorted(key, jnp.arange(num_experts + 1, dtype=jnp.int32) * pairs, method="compare_all")
  return Order(key % pairs, start.astype(jnp.int32))


class _Block(NamedTuple):
  place: jax.Array  # [] int32, of its first row in the order of pairs
  pair: jax.Array  # [rows] int32
  token: jax.Array  # [rows] int32
  mine: jax.Array  # [rows, 1] bool; False where the block runs over the expert's last row


def _each_busy_expert(order, run_expert, carry):
  """carry = run_expert(e, carry) for every expert that has pairs: the others' weights are not even read."""

  def body(state):
    place, carry = state
    e = jnp.sum(order.start <= place, dtype=jnp.int32) - 1
    return order.start[e + 1], run_expert(e, carry)

  return jax.lax.while_loop(lambda state: state[0] < order.start[-1], body, (order.start[0], carry))[1]


def _walk(order, k, e, rows, step, carry):
  """carry = step(block, carry) for every block of expert e: whole blocks, then smaller ones for what is left."""

  def blocks(start, end, count, rows, carry):
    def body(b, carry):
      first = start + b * rows
      place = first + jnp.arange(rows, dtype=jnp.int32)
      pair = _rows(order.pair, jnp.minimum(place, order.pair.size - 1))
      return step(_Block(first, pair, pair // k, (place < end)[:, None]), carry)

    return jax.lax.fori_loop(0, count, body, carry)

  start, end = order.start[e], order.start[e + 1]
  if rows > TAIL_ROWS:
    whole = (end - start) // rows
    carry = blocks(start, end, whole, rows, carry)
    start, rows = start + whole * rows, TAIL_ROWS
  return blocks(start, end, (end - start + rows - 1) // rows, rows, carry)


def _dot(a, b, a_axis, b_axis):
  dtype = jnp.promote_types(a.dtype, jnp.float32)
  return jax.lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((), ())), preferred_element_type=dtype)


def _rows(x, index):
  return x.at[index].get(mode="promise_in_bounds")


def _put_rows(x, rows, *, place):
  return jax.lax.dynamic_update_slice_in_dim(x, rows, place, axis=0)


def _add_rows(x, index, rows):
  return x.at[index].add(rows, mode="promise_in_bounds")


def _of_expert(weights, e, dtype):
  return jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, e, keepdims=False).astype(dtype), weights)


def _inward(x_rows, expert):
  """What enters the SwiGLU: (a, u), each [rows, F]."""
  a, u = _dot(x_rows, expert.gate, 1, 0), _dot(x_rows, expert.up, 1, 0)
  return (a, u) if expert.gate_bias is None else (a + expert.gate_bias, u + expert.up_bias)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def run_blocks(x, expert_index, gate, weights, rows, limit=None):
  """`models.layers.experts.run_experts` by blocks of `rows` rows."""
  return _run(x, expert_index, gate, weights, rows, limit, keep=False)[0]


def _forward(x, expert_index, gate, weights, rows, limit):
  return _run(x, expert_index, gate, weights, rows, limit, keep=True)


def _run(x, expert_index, gate, weights, rows, limit, keep):
  """(the experts' sum [N, D], what the gradient needs). keep: or only the sum is wanted."""
  order = order_by_expert(expert_index, weights.gate.shape[0])
  gates = gate.reshape(-1)

  def run_expert(e, carry):
    expert = _of_expert(weights, e, x.dtype)

    def step(block, carry):
      y, inner = carry
      entering = _inward(_rows(x, block.token), expert)
      if keep:  # a last block runs over into the next expert's places, which that expert then fills
        inner = jax.tree.map(partial(_put_rows, place=block.place), inner, entering)
      y_rows = _dot(swiglu(*entering, limit).astype(x.dtype), expert.down, 1, 0) * _rows(gates, block.pair)[:, None]
      return _add_rows(y, block.token, jnp.where(block.mine, y_rows, 0)), inner

    return _walk(order, gate.shape[1], e, rows, step, carry)

  dtype = jnp.promote_types(x.dtype, jnp.float32)
  inner = (jnp.zeros((gates.size + rows, weights.gate.shape[2]), dtype),) * 2 if keep else ()
  y, inner = _each_busy_expert(order, run_expert, (jnp.zeros(x.shape, dtype), inner))
  return y.astype(x.dtype), (x, gate, weights, order, inner)


def _backward(rows, limit, saved, dy):
  x, gate, weights, order, inner = saved
  _, width, hidden_width = weights.gate.shape
  dtype = jnp.promote_types(x.dtype, jnp.float32)
  gates = gate.reshape(-1)

  def run_expert(e, carry):
    dx, dgates, dweights = carry
    expert = _of_expert(weights, e, x.dtype)

    def step(block, carry):
      dx, dgates, grads = carry
      x_rows, dy_rows = _rows(x, block.token), _rows(dy, block.token)
      scale = jnp.where(block.mine, _rows(gates, block.pair)[:, None], 0)
      entered = [jax.lax.dynamic_slice_in_dim(kept, block.place, block.pair.size) for kept in inner]
      hidden, pull = jax.vjp(partial(swiglu, limit=limit), *entered)
      dhidden = _dot(dy_rows, expert.down, 1, 1)
      dgate_rows = jnp.sum(dhidden * hidden, axis=1, keepdims=True)
      da, du = pull(dhidden * scale)
      if expert.gate_bias is None:
        dbiases = (None, None)
      else:
        dbiases = (grads.gate_bias + da.sum(axis=0), grads.up_bias + du.sum(axis=0))
      da, du, hidden = da.astype(x.dtype), du.astype(x.dtype), (scale * hidden).astype(x.dtype)
      dx_rows = _dot(da, expert.gate, 1, 1) + _dot(du, expert.up, 1, 1)
      # XLA CPU contracts over rows at half speed: turned first, the whole gradient takes 0.79 of the time.
      da, du, hidden = jax.lax.optimization_barrier((da.T, du.T, hidden.T))
      return (
        _add_rows(dx, block.token, dx_rows),  # the scale has zeroed what is not mine
        _add_rows(dgates, block.pair, jnp.where(block.mine, dgate_rows, 0)[:, 0]),
        Experts(
          grads.gate + _dot(da, x_rows, 1, 0),
          grads.up + _dot(du, x_rows, 1, 0),
          grads.down + _dot(hidden, dy_rows, 1, 0),
          *dbiases,
        ),
      )

    zero = jnp.zeros((hidden_width, width), dtype)
    bias = None if weights.gate_bias is None else jnp.zeros((hidden_width,), dtype)
    dx, dgates, grads = _walk(order, gate.shape[1], e, rows, step, (dx, dgates, Experts(zero, zero, zero, bias, bias)))
    grads = grads._replace(gate=grads.gate.T, up=grads.up.T)
    return dx, dgates, jax.tree.map(lambda w, g: w.at[e].set(g.astype(w.dtype)), dweights, grads)

  zeros = (jnp.zeros(x.shape, dtype), jnp.zeros(gates.shape, dtype), jax.tree.map(jnp.zeros_like, weights))
  dx, dgates, dweights = _each_busy_expert(order, run_expert, zeros)
  return dx.astype(x.dtype), None, dgates.reshape(gate.shape).astype(gate.dtype), dweights


run_blocks.defvjp(_forward, _backward)
