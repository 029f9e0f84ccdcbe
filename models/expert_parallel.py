"""The experts of one layer on a mesh: every device runs the experts it holds on the tokens of its expert group."""

from collections.abc import Sequence

import jax

from models.moe import run_experts
from rspo_jax.types import Array, Layout


def run_sharded_experts(
  x: Array, expert_index: Array, gate: Array, weights: Sequence[Array], *, backend: str, layout: Layout | None
) -> Array:
  """`run_experts` for x [B, T, D], expert_index and gate [B, T, K], over the mesh of `layout` (None: one device).

  Tokens are gathered along the expert axis, each device adds up what its own experts say, and the sums are scattered
  back: dropless and exact, whatever the routing. Splitting the experts' inner width ("expert_mlp") adds one more sum.

  Returns:
    [B, T, D] in x.dtype.
  """

  def run_flat(x, expert_index, gate, weights):
    flat = [array.reshape(-1, array.shape[-1]) for array in (x, expert_index, gate)]
    return run_experts(*flat, weights, backend=backend).reshape(x.shape)

  if layout is None:
    return run_flat(x, expert_index, gate, tuple(weights))

  expert_axis, inner_axis = layout.rules["experts"], layout.rules["expert_mlp"]

  def run_local(x, expert_index, gate, weights):
    experts_here = weights[0].shape[0]
    if expert_axis is not None:
      x, expert_index, gate = jax.lax.all_gather((x, expert_index, gate), expert_axis, axis=0, tiled=True)
      expert_index = expert_index - jax.lax.axis_index(expert_axis) * experts_here
    y = run_flat(x, expert_index, gate, weights)
    if inner_axis is not None:
      y = jax.lax.psum(y, inner_axis)
    if expert_axis is not None:
      y = jax.lax.psum_scatter(y, expert_axis, scatter_dimension=0, tiled=True)
    return y

  rows = layout.spec("batch", None, None)
  inward, outward = layout.spec("experts", None, "expert_mlp"), layout.spec("experts", "expert_mlp", None)
  # check_vma=False: the blocks backend has its own VJP, whose weight gradients are local; the transpose of shard_map
  # then sums them over the axes the weights are not split on.
  return jax.shard_map(
    run_local,
    mesh=layout.mesh,
    in_specs=(rows, rows, rows, (inward, inward, outward)),
    out_specs=rows,
    check_vma=False,
  )(x, expert_index, gate, tuple(weights))
