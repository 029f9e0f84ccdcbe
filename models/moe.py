"""Runs the experts of a mixture-of-experts layer, dropless, in the way that is fastest where it runs."""

import jax
import jax.numpy as jnp

from models.moe_blocks import order_by_expert, run_blocks

# (pairs per expert, rows of a block): a block has this many rows while an expert gets fewer pairs than that on
# average. One core of a Zen 5, float32, width 256 and 16 experts of 128; time against the best of 4..256 rows: 8 pairs
# 1.00, 16 pairs 1.00, 32 pairs 1.00; 64 pairs 1.24 (gradient 1.00), 128 pairs 1.02 (1.04); 256 and more, 128 rows
# below, 1.00-1.03 (1.00-1.09). Width 512 and 32 experts of 256 with 384 pairs 1.05 (1.06). Single rows take half to
# three quarters of the time of 8 where hardly any expert gets two. `python -m benchmarks.moe` measures again.
BLOCK_ROWS = ((2, 1), (48, 8), (256, 64))
BLOCK_ROWS_LARGE = 128


def run_experts(x, expert_index, gate, weights, *, backend="auto"):
  """y_n = sum_k gate[n, k] * (silu(x_n @ w_gate[e]) * (x_n @ w_up[e])) @ w_down[e], e = expert_index[n, k].

  Every backend gives the same numbers; products are accumulated and combined in float32. Differentiable (reverse
  mode) in x, gate and weights.

  Args:
    x: [N, D] float32 or bfloat16.
    expert_index: [N, K] int32. An entry outside [0, E) names no expert here: it adds exactly zero and costs no
      work (padding, finished rows, experts of another device).
    gate: [N, K] float32.
    weights: (w_gate [E, D, F], w_up [E, D, F], w_down [E, F, D]), used in x's dtype.
    backend: "dense" runs every expert on every token, "ragged" is `jax.lax.ragged_dot` over sorted tokens,
      "blocks" loops over blocks of one expert's tokens; "auto" is blocks on CPU and ragged elsewhere.
  Returns:
    [N, D] in x.dtype.
  Raises:
    ValueError: an unknown backend, shapes that do not belong together, or too many pairs (`order_by_expert`).
  """
  _check(x, expert_index, gate, weights, backend)
  if backend == "auto":
    backend = "blocks" if jax.default_backend() == "cpu" else "ragged"
  if backend == "blocks":
    return run_blocks(x, expert_index, gate, weights, block_rows(expert_index.size, weights[0].shape[0]))
  weights = tuple(w.astype(x.dtype) for w in weights)
  return (_dense if backend == "dense" else _ragged)(x, expert_index, gate, weights)


def block_rows(pairs, num_experts):
  """Rows of one block of the blocks backend for this many token-expert pairs, as measured."""
  return next((rows for limit, rows in BLOCK_ROWS if pairs < limit * num_experts), BLOCK_ROWS_LARGE)


def _check(x, expert_index, gate, weights, backend):
  if backend not in ("auto", "dense", "ragged", "blocks"):
    raise ValueError(f"backend is {backend!r}; want 'auto', 'dense', 'ragged' or 'blocks'.")
  shapes = tuple(w.shape for w in weights)
  experts, hidden = shapes[0][0], shapes[0][-1]
  inward, outward = (experts, x.shape[-1], hidden), (experts, hidden, x.shape[-1])
  if x.ndim != 2 or shapes != (inward, inward, outward):
    raise ValueError(
      f"x is {x.shape} and weights are {shapes}; want x [N, D] and (w_gate [E, D, F], w_up [E, D, F], "
      "w_down [E, F, D]). Flatten batch and time, and put the input axis of every matrix first."
    )
  if expert_index.ndim != 2 or expert_index.shape[0] != x.shape[0] or gate.shape != expert_index.shape:
    raise ValueError(
      f"expert_index is {expert_index.shape} and gate {gate.shape} for x {x.shape}; want both [N, K] with "
      f"N = {x.shape[0]}. Flatten batch and time the same way in all three."
    )


def _dense(x, expert_index, gate, weights):
  w_gate, w_up, w_down = weights
  dtype = jnp.promote_types(x.dtype, jnp.float32)
  chosen = expert_index[..., None] == jnp.arange(w_gate.shape[0])
  share = jnp.sum(jnp.where(chosen, gate[..., None], 0), axis=1)
  a = jnp.einsum("nd,edf->enf", x, w_gate, preferred_element_type=dtype)
  u = jnp.einsum("nd,edf->enf", x, w_up, preferred_element_type=dtype)
  out = jnp.einsum("enf,efd->end", (jax.nn.silu(a) * u).astype(x.dtype), w_down, preferred_element_type=dtype)
  return jnp.einsum("end,ne->nd", out, share).astype(x.dtype)


def _ragged(x, expert_index, gate, weights):
  w_gate, w_up, w_down = weights
  dtype = jnp.promote_types(x.dtype, jnp.float32)
  order = order_by_expert(expert_index, w_gate.shape[0])
  place = jnp.zeros_like(order.pair).at[order.pair].set(jnp.arange(order.pair.size, dtype=jnp.int32))
  sizes = jnp.diff(order.start)
  # What ragged_dot leaves in rows behind the last group, forwards and backwards, is nobody's promise.
  live = (jnp.arange(order.pair.size) < order.start[-1])[:, None]

  def dot(rows, w):
    rows = jnp.where(live, rows, 0).astype(x.dtype)
    return jnp.where(live, jax.lax.ragged_dot(rows, w, sizes, preferred_element_type=dtype), 0)

  x_rows = x[order.pair // gate.shape[1]]
  out = dot(jax.nn.silu(dot(x_rows, w_gate)) * dot(x_rows, w_up), w_down)
  return jnp.einsum("nkd,nk->nd", out[place.reshape(gate.shape)], gate).astype(x.dtype)
