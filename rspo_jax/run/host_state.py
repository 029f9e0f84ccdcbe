"""What a checkpoint of a run holds: its train state and, where something is carried over, arrays of the host."""

import io
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from rspo_jax.types import Layout, TrainState


class RunState(NamedTuple):
  """A train state, and the host's arrays as the bytes [n] uint8 of a .npz file.

  The bytes are padded to a power of two: few sizes, and so few programs that look at them.
  """

  train: TrainState
  host: jax.Array


def bundle(state: TrainState, arrays: Mapping[str, np.ndarray], layout: Layout) -> tuple[Any, dict[str, int]]:
  """What to save, and what to add to its meta so that `abstract` knows its size. Without arrays it is the state."""
  if not arrays:
    return state, {}
  file = io.BytesIO()
  np.savez(file, **arrays)
  found = np.frombuffer(file.getvalue(), np.uint8)
  host = np.zeros(_padded(found.size), np.uint8)
  host[: found.size] = found
  placed = jax.make_array_from_callback(host.shape, layout.sharding(), lambda index: host[index])
  return RunState(state, placed), {"host_bytes": found.size}


def abstract(state: TrainState, meta: Mapping[str, Any], layout: Layout) -> Any:
  """The abstract tree of a checkpoint with this meta; state: its abstract train state."""
  if not meta.get("host_bytes"):
    return state
  return RunState(state, jax.ShapeDtypeStruct((_padded(meta["host_bytes"]),), np.uint8, sharding=layout.sharding()))


def unbundle(saved: Any, meta: Mapping[str, Any]) -> tuple[TrainState, dict[str, np.ndarray]]:
  """The train state and the arrays of what was restored."""
  if not isinstance(saved, RunState):
    return saved, {}
  host = np.asarray(saved.host.addressable_data(0))[: meta["host_bytes"]]
  with np.load(io.BytesIO(host.tobytes())) as arrays:
    return saved.train, dict(arrays)


def _padded(size: int) -> int:
  return 1 << (size - 1).bit_length()
