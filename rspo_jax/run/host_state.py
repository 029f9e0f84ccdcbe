"""The tree that a run checkpoints: its train state and, with partial rollouts, host arrays packed into one array."""

import io
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from rspo_jax.types import Layout, TrainState


class RunState(NamedTuple):
  """A train state and host arrays.

  Attributes:
    train: the train state.
    host: [n] uint8, the bytes of a .npz file. n is padded to a power of two, so that few sizes occur and few programs
      are compiled for them.
  """

  train: TrainState
  host: jax.Array


def bundle(state: TrainState, arrays: Mapping[str, np.ndarray], layout: Layout) -> tuple[Any, dict[str, int]]:
  """The tree to save, and the entries to add to its meta, from which `abstract_bundle` knows the size.

  Returns:
    (`state`, {}) if there are no arrays, else (`RunState`, {"host_bytes": bytes before padding}).
  """
  if not arrays:
    return state, {}
  file = io.BytesIO()
  np.savez(file, **arrays)
  content = np.frombuffer(file.getvalue(), np.uint8)
  host = np.zeros(_padded(content.size), np.uint8)
  host[: content.size] = content
  placed = jax.make_array_from_callback(host.shape, layout.sharding(), lambda index: host[index])
  return RunState(state, placed), {"host_bytes": content.size}


def abstract_bundle(state: TrainState, meta: Mapping[str, Any], layout: Layout) -> Any:
  """The abstract tree of a checkpoint with this meta.

  Args:
    state: its abstract train state. meta: the meta that the checkpoint was saved with.
  """
  if not meta.get("host_bytes"):
    return state
  return RunState(state, jax.ShapeDtypeStruct((_padded(meta["host_bytes"]),), np.uint8, sharding=layout.sharding()))


def unbundle(saved: Any, meta: Mapping[str, Any]) -> tuple[TrainState, dict[str, np.ndarray]]:
  """The train state and the host arrays of a restored tree; the inverse of `bundle`."""
  if not isinstance(saved, RunState):
    return saved, {}
  host = np.asarray(saved.host.addressable_data(0))[: meta["host_bytes"]]
  with np.load(io.BytesIO(host.tobytes())) as arrays:
    return saved.train, dict(arrays)


def _padded(size: int) -> int:
  return 1 << (size - 1).bit_length()
