"""The CPU way of running mixture-of-experts layers: a loop over the row blocks that are in use.

Token-expert pairs are laid in order of expert. Each expert's stretch of that order is walked in blocks of a
fixed number of rows; the rows by which a stretch's last block runs over its end are computed for nothing and
overwritten by the next expert, so no padding is stored. The number of blocks is known only when the tokens are,
hence a loop with a dynamic bound and a hand-written gradient.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Order(NamedTuple):
  """Token-expert pairs sorted by expert. M = N * K pairs.

  Attributes:
    pair: [M] int32, which pair (n * K + k) stands at each place; pairs without an expert come last.
    place: [N, K] int32, where each pair stands; M or more for a pair without an expert.
    start: [E + 1] int32, first place of each expert; start[E] is the number of pairs that have an expert.
  """

  pair: jax.Array
  place: jax.Array
  start: jax.Array


def order_by_expert(expert_index, num_experts):
  """Sorts pairs by expert, stably. expert_index [N, K] int32; an entry outside [0, E) names no expert."""
  flat = expert_index.reshape(-1)
  flat = jnp.where((flat >= 0) & (flat < num_experts), flat, num_experts)
  pair = jnp.argsort(flat, stable=True).astype(jnp.int32)
  rank = jnp.zeros_like(pair).at[pair].set(jnp.arange(pair.size, dtype=jnp.int32))
  place = jnp.where(flat < num_experts, rank, pair.size)
  start = jnp.searchsorted(flat[pair], jnp.arange(num_experts + 1, dtype=jnp.int32)).astype(jnp.int32)
  return Order(pair, place.reshape(expert_index.shape), start)


class _Blocks(NamedTuple):
  count: jax.Array  # [] int32, blocks in use
  expert: jax.Array  # [blocks] int32
  first: jax.Array  # [blocks] int32, place of the block's first row


def _blocks(order, rows):
  pairs, experts = order.pair.size, order.start.size - 1
  needed = -(-jnp.diff(order.start) // rows)
  end = jnp.cumsum(needed)
  block = jnp.arange(-(-pairs // rows) + min(experts, pairs), dtype=jnp.int32)
  expert = jnp.minimum(jnp.searchsorted(end, block, side="right"), experts - 1).astype(jnp.int32)
  first = order.start[expert] + (block - (end - needed)[expert]) * rows
  return _Blocks(end[-1], expert, first)


def _dot(a, b, a_axis, b_axis):
  dtype = jnp.promote_types(a.dtype, jnp.float32)
  return jax.lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((), ())), preferred_element_type=dtype)


def _expert(weights, e):
  return (jax.lax.dynamic_index_in_dim(w, e, keepdims=False) for w in weights)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def run_blocks(x, expert_index, gate, weights, rows):
  """`models.moe.run_experts` by blocks of `rows` rows."""
  return _forward(x, expert_index, gate, weights, rows)[0]


def _forward(x, expert_index, gate, weights, rows):
  k = expert_index.shape[1]
  order = order_by_expert(expert_index, weights[0].shape[0])
  blocks = _blocks(order, rows)
  token = jnp.pad(order.pair // k, (0, rows))
  dtype = jnp.promote_types(x.dtype, jnp.float32)

  def body(b, out):
    first = blocks.first[b]
    w_gate, w_up, w_down = _expert(weights, blocks.expert[b])
    x_rows = x[jax.lax.dynamic_slice(token, (first,), (rows,))]
    hidden = jax.nn.silu(_dot(x_rows, w_gate, 1, 0)) * _dot(x_rows, w_up, 1, 0)
    y_rows = _dot(hidden.astype(x.dtype), w_down, 1, 0)
    return jax.lax.dynamic_update_slice(out, y_rows, (first, 0))

  out = jax.lax.fori_loop(0, blocks.count, body, jnp.zeros((order.pair.size + rows, x.shape[1]), dtype))
  y = sum(
    gate[:, i, None] * jnp.take(out[: order.pair.size], order.place[:, i], axis=0, mode="fill", fill_value=0)
    for i in range(k)
  )
  return y.astype(x.dtype), (x, gate, weights, order)


def _backward(rows, saved, dy):
  x, gate, weights, order = saved
  pairs, k = order.pair.size, gate.shape[1]
  blocks = _blocks(order, rows)
  dtype = jnp.promote_types(x.dtype, jnp.float32)
  token = jnp.pad(order.pair // k, (0, rows))
  gate_of = jnp.pad(gate.reshape(-1)[order.pair], (0, rows)).astype(dtype)
  dy = dy.astype(dtype)

  def body(b, carry):
    dx, dgate, dweights = carry
    e, first = blocks.expert[b], blocks.first[b]
    w_gate, w_up, w_down = _expert(weights, e)
    at = jax.lax.dynamic_slice(token, (first,), (rows,))
    mine = first + jnp.arange(rows) < order.start[e + 1]
    x_rows = x[at]
    scale = jnp.where(mine, jax.lax.dynamic_slice(gate_of, (first,), (rows,)), 0)[:, None]
    dy_rows = dy[at]
    a, u = _dot(x_rows, w_gate, 1, 0), _dot(x_rows, w_up, 1, 0)
    sigmoid = jax.nn.sigmoid(a)
    hidden = a * sigmoid * u
    dhidden = _dot(dy_rows.astype(x.dtype), w_down, 1, 1)
    dgate_rows = jnp.sum(dhidden * hidden, axis=1)
    dhidden = dhidden * scale
    da = (dhidden * u * sigmoid * (1 + a * (1 - sigmoid))).astype(x.dtype)
    du = (dhidden * a * sigmoid).astype(x.dtype)
    dx_rows = _dot(da, w_gate, 1, 1) + _dot(du, w_up, 1, 1)
    steps = (
      _dot(x_rows, da, 0, 0),
      _dot(x_rows, du, 0, 0),
      _dot(hidden.astype(x.dtype), (scale * dy_rows).astype(x.dtype), 0, 0),
    )
    dx = jax.lax.dynamic_update_slice(dx, dx_rows, (first, 0))
    dgate = jax.lax.dynamic_update_slice(dgate, dgate_rows, (first,))
    return dx, dgate, tuple(dw.at[e].add(step) for dw, step in zip(dweights, steps, strict=True))

  zeros = (
    jnp.zeros((pairs + rows, x.shape[1]), dtype),
    jnp.zeros((pairs + rows,), dtype),
    tuple(jnp.zeros(w.shape, dtype) for w in weights),
  )
  dx, dgate, dweights = jax.lax.fori_loop(0, blocks.count, body, zeros)
  dx = sum(jnp.take(dx[:pairs], order.place[:, i], axis=0, mode="fill", fill_value=0) for i in range(k))
  dgate = jnp.take(dgate[:pairs], order.place, mode="fill", fill_value=0)
  return (
    dx.astype(x.dtype),
    None,
    dgate.astype(gate.dtype),
    tuple(dw.astype(w.dtype) for dw, w in zip(dweights, weights, strict=True)),
  )


run_blocks.defvjp(_forward, _backward)
