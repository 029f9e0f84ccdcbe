"""Runs the experts of a mixture-of-experts layer, dropless, in the way that is fastest where it runs."""

import jax
import jax.numpy as jnp

from models.moe_blocks import order_by_expert, run_blocks

BACKENDS = ("auto", "dense", "ragged", "blocks", "gather")


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
    backend: "dense" runs every expert on every token; "ragged" is `jax.lax.ragged_dot` over sorted tokens;
      "blocks" loops over blocks of one expert's tokens; "gather" fetches the weights of every pair; "auto" picks.
  Returns:
    [N, D] in x.dtype.
  Raises:
    ValueError: an unknown backend, or shapes that do not belong together.
  """
  _check(x, expert_index, gate, weights, backend)
  if backend == "auto":
    backend = "blocks" if jax.default_backend() == "cpu" else "ragged"
  if backend == "blocks":
    pairs_per_expert = expert_index.size / weights[0].shape[0]
    return run_blocks(x, expert_index, gate, weights, 8 if pairs_per_expert < 64 else 128)
  weights = tuple(w.astype(x.dtype) for w in weights)
  return {"dense": _dense, "ragged": _ragged, "gather": _gather}[backend](x, expert_index, gate, weights)


def _check(x, expert_index, gate, weights, backend):
  if backend not in BACKENDS:
    raise ValueError(f"backend is {backend!r}; want one of {', '.join(BACKENDS)}.")
  shapes = tuple(w.shape for w in weights)
  n, d = x.shape
  e, _, f = shapes[0]
  if shapes != ((e, d, f), (e, d, f), (e, f, d)):
    raise ValueError(
      f"weights are {shapes} for x {x.shape}; want (w_gate [E, D, F], w_up [E, D, F], w_down [E, F, D])."
    )
  if gate.shape != expert_index.shape or expert_index.shape[0] != n or expert_index.ndim != 2:
    raise ValueError(
      f"expert_index is {expert_index.shape}, gate {gate.shape} for x {x.shape}; want both [N, K], N = {n}."
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
  k = expert_index.shape[1]
  dtype = jnp.promote_types(x.dtype, jnp.float32)
  order = order_by_expert(expert_index, w_gate.shape[0])
  place = jnp.zeros_like(order.pair).at[order.pair].set(jnp.arange(order.pair.size, dtype=jnp.int32))
  sizes = jnp.diff(order.start)
  # What ragged_dot leaves in rows behind the last group, forwards and backwards, is nobody's promise.
  live = (jnp.arange(order.pair.size) < order.start[-1])[:, None]

  def dot(rows, w):
    return jnp.where(live, jax.lax.ragged_dot(rows, w, sizes, preferred_element_type=dtype), 0)

  x_rows = jnp.where(live, x[order.pair // k], 0)
  hidden = jax.nn.silu(dot(x_rows, w_gate)) * dot(x_rows, w_up)
  out = dot(jnp.where(live, hidden, 0).astype(x.dtype), w_down)
  return jnp.einsum("nkd,nk->nd", out[place.reshape(gate.shape)], gate).astype(x.dtype)


def _gather(x, expert_index, gate, weights):
  w_gate, w_up, w_down = weights
  dtype = jnp.promote_types(x.dtype, jnp.float32)
  here = (expert_index >= 0) & (expert_index < w_gate.shape[0])
  e = jnp.where(here, expert_index, 0)
  a = jnp.einsum("nd,nkdf->nkf", x, w_gate[e], preferred_element_type=dtype)
  u = jnp.einsum("nd,nkdf->nkf", x, w_up[e], preferred_element_type=dtype)
  hidden = (jax.nn.silu(a) * u).astype(x.dtype)
  out = jnp.einsum("nkf,nkfd->nkd", hidden, w_down[e], preferred_element_type=dtype)
  return jnp.einsum("nkd,nk->nd", out, jnp.where(here, gate, 0)).astype(x.dtype)
