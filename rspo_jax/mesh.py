"""Device meshes, the table that maps logical axes to mesh axes, and moving batches onto a mesh and back."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding

from rspo_jax.types import Layout, Params, Policy

AXES = ("data", "fsdp", "expert", "tensor")

# Rows of activations are split over every axis but "tensor". Parameters: the width is split over "fsdp", heads, inner
# widths and vocabulary over "tensor", experts over "expert".
RULES = {
  "batch": ("data", "fsdp", "expert"),
  "layers": None,
  "embed": "fsdp",
  "vocab": "tensor",
  "heads": "tensor",
  "kv_heads": "tensor",
  "head_dim": None,
  "mlp": "tensor",
  "experts": "expert",
  "expert_mlp": "tensor",
  "norm": None,
}


def make_layout(shape: Mapping[str, int] | None = None, devices: Sequence[jax.Device] | None = None) -> Layout:
  """A mesh of the given shape over `devices` (all of them by default).

  Args:
    shape: size of any of the axes 'data', 'fsdp', 'expert', 'tensor'; an absent axis has size 1. At most one size may
      be -1: all remaining devices. None puts every device on 'data'.
  Raises:
    ValueError: an unknown axis, or sizes whose product is not the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  shape = dict(shape) if shape else {"data": -1}
  if unknown := set(shape) - set(AXES):
    raise ValueError(f"mesh axes {sorted(unknown)} are unknown; the axes are {', '.join(AXES)}.")
  sizes = [shape.get(axis, 1) for axis in AXES]
  if sizes.count(-1) == 1:
    sizes[sizes.index(-1)] = len(devices) // -math.prod(sizes)
  if min(sizes) < 1 or math.prod(sizes) != len(devices):
    raise ValueError(
      f"a mesh of {dict(zip(AXES, sizes, strict=True))} does not cover {len(devices)} devices; make the product of the "
      "sizes equal to that number (one axis may be -1: all remaining devices)."
    )
  # With explicit axes, linen's sharded contractions raise.
  mesh = Mesh(np.asarray(devices).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))
  return Layout(mesh, RULES)


def param_shardings(policy: Policy, layout: Layout) -> Params:
  """A sharding for every parameter.

  Raises:
    ValueError: an axis of a parameter is not divisible by the mesh axis it is split over; names all such parameters.
  """
  shapes = jax.eval_shape(policy.init, jax.random.key(0))
  problems = []

  def shard(path, shape, logical):
    sharding = layout.sharding(*logical)
    try:
      sharding.shard_shape(shape.shape)
    except ValueError:
      problems.append(f"  {jax.tree_util.keystr(path)} {shape.shape} over {sharding.spec}")
    return sharding

  if policy.logical_axes is None:
    return jax.tree.map(lambda leaf: layout.sharding(), shapes)
  shardings = jax.tree_util.tree_map_with_path(shard, shapes, policy.logical_axes())
  if problems:
    raise ValueError(
      f"these parameters do not divide over the mesh {dict(layout.mesh.shape)}; choose smaller mesh axes:\n"
      + "\n".join(problems)
    )
  return shardings


def abstract_params(policy: Policy, layout: Layout | None = None) -> Params:
  """Shapes, dtypes and, on a mesh, shardings of the parameters, without creating them."""
  shapes = jax.eval_shape(policy.init, jax.random.key(0))
  if layout is None:
    return shapes
  return jax.tree.map(_with_sharding, shapes, param_shardings(policy, layout))


def abstract_batch(batch: Any, layout: Layout | None = None) -> Any:
  """Abstract arrays that lead with the batch axis, sharded as `put_batch` shards them."""
  if layout is None:
    return batch
  return jax.tree.map(lambda leaf: _with_sharding(leaf, layout.sharding("batch", *(None,) * (leaf.ndim - 1))), batch)


def _with_sharding(shape: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)


def platform(layout: Layout | None = None) -> str:
  """The platform of the mesh's devices ("cpu", "gpu", "tpu"), of the default device without a mesh."""
  device = jax.devices()[0] if layout is None else layout.mesh.devices.flat[0]
  return device.platform


def put_batch(batch: Any, layout: Layout) -> Any:
  """Host arrays as device arrays, sharded over their rows.

  Args:
    batch: a pytree of arrays that lead with the batch axis; every process has all rows.

  Raises:
    ValueError: the batch axis does not divide over the mesh.
  """

  def put(leaf):
    leaf = np.asarray(leaf)
    if leaf.shape[0] % layout.batch_shards:
      raise ValueError(
        f"{leaf.shape[0]} rows do not divide over the {layout.batch_shards} batch shards of the mesh "
        f"{dict(layout.mesh.shape)}; change the number of rows or the mesh."
      )
    sharding = layout.sharding("batch", *(None,) * (leaf.ndim - 1))
    return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

  return jax.tree.map(put, batch)


def fetch(tree: Any) -> Any:
  """Device arrays as numpy arrays, complete on every process."""
  if jax.process_count() == 1:
    return jax.device_get(tree)
  return multihost_utils.process_allgather(tree, tiled=True)
