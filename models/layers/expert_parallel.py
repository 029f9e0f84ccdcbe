"""Expert parallelism: every device runs its own experts on the tokens of all devices along the expert axis."""

import functools

import jax
import jax.numpy as jnp

from models.layers.experts import Experts, platform_of, run_experts
from rspo_jax.types import Array, Layout


def top_k(score: Array, k: int, layout: Layout | None) -> tuple[Array, Array]:
  """The k largest along the last axis of score [B, ..., N]: (values, index int32), each [B, ..., k], largest first.

  Under shard_map, because XLA would otherwise gather the scores of all rows on all devices.
  """
  local_top_k = functools.partial(jax.lax.top_k, k=k)
  if layout is None:
    return local_top_k(score)
  rows = layout.spec("batch", *[None] * (score.ndim - 1))
  return jax.shard_map(local_top_k, mesh=layout.mesh, in_specs=rows, out_specs=rows)(score)


def run_sharded_experts(
  x: Array,
  expert_index: Array,
  gate: Array,
  weights: Experts,
  *,
  swiglu_limit: float | None = None,
  backend: str,
  layout: Layout | None,
) -> Array:
  """`run_experts` for x [B, T, D], expert_index and gate [B, T, K], over the mesh of `layout` (None: one device).

  Tokens are gathered along the expert axis, each device sums the outputs of its own experts, and the sums are
  reduce-scattered: dropless and exact for every routing. Splitting the experts' inner width ("expert_mlp") adds a psum.

  Returns:
    [B, T, D] in x.dtype.
  """
  run = functools.partial(run_experts, swiglu_limit=swiglu_limit, backend=backend, platform=platform_of(layout))

  def run_flat(x, expert_index, gate, weights):
    flat = [array.reshape(-1, array.shape[-1]) for array in (x, expert_index, gate)]
    return run(*flat, weights).reshape(x.shape)

  if layout is None:
    return run_flat(x, expert_index, gate, weights)

  def split_axis(logical: str) -> str | None:
    """The mesh axis of a logical axis; None if it has one device, where a collective would still cost a rendezvous."""
    axis = layout.rules[logical]
    return axis if axis is not None and layout.mesh.shape[axis] > 1 else None

  expert_axis, inner_axis = split_axis("experts"), split_axis("expert_mlp")

  def run_local(x, expert_index, gate, weights):
    local_experts = weights.gate.shape[0]
    if expert_axis is not None:
      x = jax.lax.all_gather(x, expert_axis, axis=0, tiled=True)
      gate, expert_index = _gather_pairs(gate, expert_index, expert_axis)
      expert_index = expert_index - jax.lax.axis_index(expert_axis) * local_experts
    y = run_flat(x, expert_index, gate, weights)
    if inner_axis is not None:
      y = jax.lax.psum(y, inner_axis)
    if expert_axis is not None:
      y = jax.lax.psum_scatter(y, expert_axis, scatter_dimension=0, tiled=True)
    return y

  rows = layout.spec("batch", None, None)
  up, down = layout.spec("experts", None, "expert_mlp"), layout.spec("experts", "expert_mlp", None)
  bias = None if weights.gate_bias is None else layout.spec("experts", "expert_mlp")
  # check_vma=False: the custom VJP of the blocks backend returns local weight gradients, which the transpose of
  # shard_map then sums over the mesh axes that do not split the weights.
  return jax.shard_map(
    run_local,
    mesh=layout.mesh,
    in_specs=(rows, rows, rows, Experts(up, up, down, bias, bias)),
    out_specs=rows,
    check_vma=False,
  )(x, expert_index, gate, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _gather_pairs(gate: Array, expert_index: Array, axis: str) -> tuple[Array, Array]:
  """(gate float32, expert_index int32) of all devices along `axis`, in one collective."""
  bits = jnp.concatenate([jax.lax.bitcast_convert_type(gate, jnp.int32), expert_index], axis=-1)
  bits = jax.lax.all_gather(bits, axis, axis=0, tiled=True)
  gate, expert_index = jnp.split(bits, 2, axis=-1)
  return jax.lax.bitcast_convert_type(gate, jnp.float32), expert_index


def _gather_pairs_forward(gate, expert_index, axis):
  return _gather_pairs(gate, expert_index, axis), None


def _gather_pairs_backward(axis, _, cotangents):
  return jax.lax.psum_scatter(cotangents[0], axis, scatter_dimension=0, tiled=True), None


_gather_pairs.defvjp(_gather_pairs_forward, _gather_pairs_backward)
