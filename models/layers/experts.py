"""The experts of one layer, dropless, by one of several backends; "auto" is the fastest for the platform."""

import jax
import jax.numpy as jnp

from models.layers.experts_blocks import Experts, order_by_expert, run_blocks, swiglu
from rspo_jax.types import Array, Layout

# (limit, rows): a block has this many rows if the mean number of pairs per expert is below the limit. One core of a
# Zen 5, float32, width 256 and 16 experts of 128; time relative to the best of 4..256 rows: 8 pairs per expert 1.00,
# 16 pairs 1.00, 32 pairs 1.00, 64 pairs 1.24 (gradient 1.00), 128 pairs 1.02 (1.04), 256 and more (BLOCK_ROWS_LARGE)
# 1.00-1.03 (1.00-1.09). Width 512 and 32 experts of 256 with 384 pairs: 1.05 (1.06). Blocks of one row take half to
# three quarters of the time of 8 rows if few experts have two pairs. `python -m benchmarks.moe` repeats this.
BLOCK_ROWS = ((2, 1), (48, 8), (256, 64))
BLOCK_ROWS_LARGE = 128
# Outside CPUs, "auto" is "gathered" for fewer pairs per expert than this. Derived from bytes, not measured: a gathered
# expert is read, written and read again, while a grouped product may read each of the E experts once (as is reported of
# `ragged_dot` on NVIDIA GPUs). `python -m benchmarks.moe` measures it.
GATHERED_PAIRS = 1 / 3

BACKENDS = ("auto", "dense", "ragged", "blocks", "gathered")


def run_experts(
  x: Array,
  expert_index: Array,
  gate: Array,
  weights: Experts | tuple[Array, Array, Array],
  *,
  swiglu_limit: float | None = None,
  backend: str = "auto",
  platform: str | None = None,
) -> Array:
  """y_n = sum_k gate[n, k] * swiglu(x_n @ w_gate[e], x_n @ w_up[e]) @ w_down[e], e = expert_index[n, k].

  All backends compute the same function; products are accumulated and combined in float32. Differentiable (reverse
  mode) in x, gate and weights.

  Args:
    x: [N, D] float32 or bfloat16.
    expert_index: [N, K] int32. An entry outside [0, E) is dropped: it adds exactly zero and costs no work (padding,
      finished rows, experts of another device), except that "gathered" reads the weights of some expert for it.
    gate: [N, K] float32.
    weights: `Experts`, or (w_gate [E, D, F], w_up [E, D, F], w_down [E, F, D]), used in x's dtype. Biases are added to
      the inputs of the SwiGLU.
    swiglu_limit: see `swiglu`.
    backend: "dense" runs every expert on every token; "ragged" is `jax.lax.ragged_dot` over sorted tokens; "blocks"
      loops over blocks of tokens of one expert; "gathered" copies the expert's weights for every pair. "auto" is
      "blocks" on CPUs, with blocks of one row for few pairs, so that only active experts are read; elsewhere "gathered"
      for few pairs (`GATHERED_PAIRS`) and "ragged" otherwise.
    platform: the JAX platform that "auto" chooses for; None is the platform of the default device.
  Returns:
    [N, D] in x.dtype.
  Raises:
    ValueError: an unknown backend, inconsistent shapes, or too many pairs (`order_by_expert`).
  """
  weights = Experts(*weights)
  _check(x, expert_index, gate, weights, backend)
  if backend == "auto":
    backend = choose_backend(platform or platform_of(None), expert_index.size, weights.gate.shape[0])
  if backend == "blocks":
    rows = block_rows(expert_index.size, weights.gate.shape[0])
    return run_blocks(x, expert_index, gate, weights, rows, swiglu_limit)
  weights = jax.tree.map(lambda w: w.astype(x.dtype), weights)
  run = {"dense": _dense, "ragged": _ragged, "gathered": _gathered}[backend]
  return run(x, expert_index, gate, weights, swiglu_limit)


def platform_of(layout: Layout | None) -> str:
  """The platform of the mesh's devices, such as "cpu" or "gpu"; without a layout, of the default device.

  The devices of a mesh may be absent, if programs are only compiled for them.
  """
  if layout is not None:
    return layout.mesh.devices.flat[0].platform
  device = jax.config.jax_default_device or jax.devices()[0]
  return device if isinstance(device, str) else device.platform


def choose_backend(platform: str, pairs: int, num_experts: int) -> str:
  """The backend of "auto" for this many token-expert pairs on a JAX platform."""
  if platform == "cpu":
    return "blocks"
  return "gathered" if pairs < GATHERED_PAIRS * num_experts else "ragged"


def block_rows(pairs: int, num_experts: int) -> int:
  """Rows per block of the blocks backend for this many token-expert pairs."""
  return next((rows for limit, rows in BLOCK_ROWS if pairs < limit * num_experts), BLOCK_ROWS_LARGE)


def _check(x, expert_index, gate, weights, backend):
  if backend not in BACKENDS:
    raise ValueError(f"backend is {backend!r}; want {', '.join(map(repr, BACKENDS))}.")
  shapes = tuple(w.shape for w in weights[:3])
  experts, hidden = shapes[0][0], shapes[0][-1]
  up, down = (experts, x.shape[-1], hidden), (experts, hidden, x.shape[-1])
  if x.ndim != 2 or shapes != (up, up, down):
    raise ValueError(
      f"x is {x.shape} and weights are {shapes}; want x [N, D] and (w_gate [E, D, F], w_up [E, D, F], "
      "w_down [E, F, D]). Flatten batch and time, and put the input axis of every matrix first."
    )
  if expert_index.ndim != 2 or expert_index.shape[0] != x.shape[0] or gate.shape != expert_index.shape:
    raise ValueError(
      f"expert_index is {expert_index.shape} and gate {gate.shape} for x {x.shape}; want both [N, K] with "
      f"N = {x.shape[0]}. Flatten batch and time the same way in all three."
    )


def _dense(x, expert_index, gate, weights, limit):
  dtype = jnp.promote_types(x.dtype, jnp.float32)
  selected = expert_index[..., None] == jnp.arange(weights.gate.shape[0])
  expert_gate = jnp.sum(jnp.where(selected, gate[..., None], 0), axis=1)
  a = jnp.einsum("nd,edf->enf", x, weights.gate, preferred_element_type=dtype)
  u = jnp.einsum("nd,edf->enf", x, weights.up, preferred_element_type=dtype)
  if weights.gate_bias is not None:
    a, u = a + weights.gate_bias[:, None], u + weights.up_bias[:, None]
  hidden = swiglu(a, u, limit).astype(x.dtype)
  out = jnp.einsum("enf,efd->end", hidden, weights.down, preferred_element_type=dtype)
  return jnp.einsum("end,ne->nd", out, expert_gate).astype(x.dtype)


def _gathered(x, expert_index, gate, weights, limit):
  dtype = jnp.promote_types(x.dtype, jnp.float32)
  valid = (expert_index >= 0) & (expert_index < weights.gate.shape[0])
  experts = jax.tree.map(lambda w: w.at[expert_index].get(mode="clip"), weights)  # [N, K, ...]
  a = jnp.einsum("nd,nkdf->nkf", x, experts.gate, preferred_element_type=dtype)
  u = jnp.einsum("nd,nkdf->nkf", x, experts.up, preferred_element_type=dtype)
  if experts.gate_bias is not None:
    a, u = a + experts.gate_bias, u + experts.up_bias
  out = jnp.einsum("nkf,nkfd->nkd", swiglu(a, u, limit).astype(x.dtype), experts.down, preferred_element_type=dtype)
  return jnp.einsum("nkd,nk->nd", out, jnp.where(valid, gate, 0)).astype(x.dtype)


def _ragged(x, expert_index, gate, weights, limit):
  dtype = jnp.promote_types(x.dtype, jnp.float32)
  order = order_by_expert(expert_index, weights.gate.shape[0])
  position = jnp.zeros_like(order.pair).at[order.pair].set(jnp.arange(order.pair.size, dtype=jnp.int32))
  sizes = jnp.diff(order.start)
  # ragged_dot and its gradient leave the rows after the last group undefined.
  active = (jnp.arange(order.pair.size) < order.start[-1])[:, None]

  def dot(rows, w, bias=None):
    rows = jnp.where(active, rows, 0).astype(x.dtype)
    out = jax.lax.ragged_dot(rows, w, sizes, preferred_element_type=dtype)
    if bias is not None:
      out = out + bias.at[expert_index.reshape(-1)[order.pair]].get(mode="clip")
    return jnp.where(active, out, 0)

  x_rows = x[order.pair // gate.shape[1]]
  hidden = swiglu(dot(x_rows, weights.gate, weights.gate_bias), dot(x_rows, weights.up, weights.up_bias), limit)
  out = dot(hidden, weights.down)
  return jnp.einsum("nkd,nk->nd", out[position.reshape(gate.shape)], gate).astype(x.dtype)
