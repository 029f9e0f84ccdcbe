"""Checkpoints that survive a kill at any moment.

A step is `workdir/checkpoints/<step>/`, one Orbax checkpoint. Orbax writes it under a temporary name and
renames it when it is whole, so a folder with a plain step number is complete. Disks still lose and flip bits
later on; therefore a checkpoint carries fingerprints of its arrays, and loading compares them.
"""

import json
import logging
import math
import os
import pathlib
import time
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from rspo_jax.run.workdir import claim_workdir, dump_json_atomic, lock_workdir, to_plain_json

__all__ = [
  "CheckpointError",
  "CheckpointMismatchError",
  "Checkpoints",
  "Restored",
  "abstract",
  "claim_workdir",
  "dump_json_atomic",
  "fingerprints",
]

_log = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
  """A checkpoint, or none of the workdir, can be read. The message names the step folders and the cure."""


class CheckpointMismatchError(ValueError):
  """The checkpoint holds another tree than the one asked for. The message names the leaves that differ."""


class Restored(NamedTuple):
  """state: as the abstract state asked for. meta: the dict given to `save`. step: where it was saved."""

  state: Any
  meta: dict[str, Any]
  step: int


class Checkpoints:
  """The checkpoints of one workdir: saved asynchronously, the newest `keep` and the best one kept.

  Args:
    workdir: the folder of the run.
    keep: how many of the newest steps stay, >= 1. The best step by `best_metric` stays beside them.
    best_metric: the key of `save(metrics=...)` that ranks the steps: larger is better, then newer.
    read_only: for looking at a run that another process may be writing. Deletes nothing, and `save` raises.
  Raises:
    ValueError: keep < 1; read_only where there are no checkpoints; a workdir another process is writing to.

  All processes of a run make the same calls in the same order. A context manager; else `close` it.
  """

  def __init__(
    self,
    workdir: str | os.PathLike,
    *,
    keep: int = 2,
    best_metric: str = "eval/success",
    read_only: bool = False,
  ):
    if keep < 1:
      raise ValueError(f"keep is {keep}; want at least 1, or the run could not be continued.")
    self._workdir = pathlib.Path(workdir).absolute()
    self._folder = self._workdir / "checkpoints"
    if read_only and not self._folder.is_dir():
      raise ValueError(f"no checkpoints at {self._folder}. Name the --workdir of a run that has saved one.")
    self._keep = keep
    self._best_metric = best_metric
    self._read_only = read_only
    self._unreadable: set[int] = set()
    self._lock = None if read_only or jax.process_index() else lock_workdir(self._workdir)
    self._orbax = ocp.training.Checkpointer(
      self._folder,
      preservation_policy=self,
      cleanup_tmp_directories=not read_only,  # what a killed save left behind
    )
    self._metrics = {step: self._read_metrics(step) for step in self.steps()}

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def steps(self) -> list[int]:
    """The steps on disk and the one being saved, oldest first, without those `restore` found unreadable."""
    return [c.step for c in self._orbax.checkpoints if c.step not in self._unreadable]

  def latest_step(self) -> int | None:
    """The newest of `steps()`, None when there is none."""
    return max(self.steps(), default=None)

  def best_step(self) -> int | None:
    """The step with the largest `best_metric`, the newest of equals; None when no step carries the metric."""
    return self._best_of(self.steps())

  def save(self, step: int, state: Any, meta: Mapping[str, Any], metrics: Mapping[str, float] | None = None) -> bool:
    """Starts saving, and returns once the arrays are on the host: `state` may be donated right after.

    Args:
      step: updates taken so far over the whole run (all phases); rises from save to save.
      state: a pytree of jax arrays, sharded in any way.
      meta: what else continues the run, JSON-able: phase, data position, seed, config hash.
      metrics: scalars by name; `best_metric` among them enters the step into the contest for the best.
    Returns:
      False when this very step is on disk already (nothing is written), else True.
    Raises:
      ValueError: a step older than the newest on disk, a read-only folder, meta that JSON cannot hold.
      Any error of the save before this one.
    """
    if self._read_only:
      raise ValueError(f"{self._folder} was opened read-only; open it with read_only=False to save.")
    newest = self.latest_step()
    if newest is not None and step < newest:
      raise ValueError(
        f"step {step} is older than the newest checkpoint {self._folder / str(newest)}. Steps rise over the "
        "whole run (all phases): continue from what `restore` returns, or use a fresh --workdir."
      )
    if step == newest:
      return False
    self._move_unreadable_aside()
    known = {name: float(value) for name, value in (metrics or {}).items() if math.isfinite(value)}
    record = {"meta": to_plain_json(meta), "metrics": known, "leaves": _describe(state, fingerprints(state))}
    self._metrics[step] = known
    self._orbax.save_checkpointables_async(
      step, {"state": state}, force=True, custom_metadata=record | {"crc32": _crc32(record)}
    )
    return True

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
    """Orbax asks, after each save, which of the steps on disk (oldest first) to keep."""
    del context
    steps = [c.step for c in checkpoints]
    kept = {*steps[-self._keep :], self._best_of(steps)}
    return [step in kept for step in steps]

  def restore(self, abstract_state: Any) -> Restored | None:
    """The newest complete checkpoint, laid out as asked; None when the workdir has none.

    A checkpoint that cannot be read is tried twice; then a warning names its folder and the one before it is
    taken. With several processes that is an error instead, for they must all agree on the step. The next
    `save` moves unreadable folders to `workdir/unreadable/`.

    Args:
      abstract_state: a pytree of `jax.ShapeDtypeStruct` with shardings (see `abstract`), or of arrays; or a function
        that makes it of the checkpoint's meta.
    Raises:
      CheckpointMismatchError: the checkpoint is of another tree, shape or dtype.
      CheckpointError: there are checkpoints and none of them can be read.
    """
    failures = []
    for step in reversed(self.steps()):
      try:
        return self.restore_step(step, abstract_state)
      except CheckpointError as error:
        if jax.process_count() > 1:
          raise
        failures.append(str(error))
        self._unreadable.add(step)
        _log.warning("%s Falling back to the checkpoint before it.", error)
    if failures:
      raise CheckpointError("\n".join(["no checkpoint of this workdir can be read:", *failures]))
    return None

  def restore_step(self, step: int, abstract_state: Any) -> Restored:
    """One step, such as `best_step()`. Arguments and errors as in `restore`, but without falling back."""
    self.wait()
    path = self._folder / str(step)
    if step not in self.steps():
      raise ValueError(f"no checkpoint at {path}; the steps there are {self.steps()}.")
    wanted = abstract_state if callable(abstract_state) else abstract(abstract_state)
    for attempt in (1, 2):
      try:
        return self._load(step, wanted)
      except CheckpointMismatchError:
        raise
      except Exception as error:
        _log.warning("loading %s failed, attempt %d of 2", path, attempt, exc_info=True)
        failure = error
    reason = f"{type(failure).__name__}: {_first_line(failure)}"
    raise CheckpointError(
      f"checkpoint {path} cannot be read ({reason}). To continue from an older step, move that folder out of "
      f"{self._folder}; with none left, use a fresh --workdir."
    ) from failure

  def wait(self) -> None:
    """Blocks until the last save is on disk; raises what went wrong in it."""
    self._orbax.wait()

  def close(self) -> None:
    """Waits, then frees the threads and the workdir."""
    try:
      self._orbax.close()
    finally:
      if self._lock is not None:
        self._lock.close()
        self._lock = None

  def _best_of(self, steps: Sequence[int]) -> int | None:
    name = self._best_metric
    ranked = [(self._metrics[step][name], step) for step in steps if name in self._metrics.get(step, {})]
    return max(ranked)[1] if ranked else None

  def _read_record(self, step: int) -> dict[str, Any]:
    """What `save` wrote beside the arrays."""
    record = dict(self._orbax.checkpointables_metadata(step).custom_metadata)
    if record.pop("crc32") != _crc32(record):
      raise OSError("damaged metadata")
    return record

  def _read_metrics(self, step: int) -> dict[str, float]:
    """Kept in our record, not as Orbax's metrics: a damaged file of those keeps all steps from opening."""
    try:
      return self._read_record(step)["metrics"]
    except Exception:  # whatever is wrong, `restore` says so if that step is needed
      _log.info("checkpoint %d has no readable metadata", step, exc_info=True)
      return {}

  def _load(self, step: int, wanted: Any) -> Restored:
    record = self._read_record(step)
    wanted = abstract(wanted(record["meta"])) if callable(wanted) else wanted
    saved = record["leaves"]
    _check_same_tree(self._folder / str(step), saved, _describe(wanted))
    state = self._orbax.load_checkpointables(step, {"state": wanted})["state"]
    found = _describe(state, fingerprints(state))
    damaged = [name for name in saved if saved[name] != found[name]]
    if damaged:
      raise OSError(f"damaged data in {', '.join(damaged)}")
    return Restored(state, record["meta"], step)

  def _move_unreadable_aside(self) -> None:
    """Else a folder that cannot be loaded would count as one of the newest, and block its own step."""
    if not self._unreadable:
      return
    self.wait()
    for step in sorted(self._unreadable):
      aside = self._workdir / "unreadable" / f"{step}-{time.time_ns()}"
      aside.parent.mkdir(exist_ok=True)
      (self._folder / str(step)).rename(aside)
      _log.warning("moved the unreadable checkpoint of step %d to %s", step, aside)
    self._unreadable.clear()
    self._orbax.reload()


def abstract(state: Any) -> Any:
  """The same tree with a `jax.ShapeDtypeStruct` (shape, dtype, sharding) for every array.

  Raises:
    ValueError: a leaf without a sharding; restoring would not know where to put it.
  """

  def describe(path, leaf):
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
      name = jax.tree_util.keystr(path)
      raise ValueError(f"leaf {name} ({leaf}) has no sharding; want a jax array or ShapeDtypeStruct with one.")
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

  return jax.tree_util.tree_map_with_path(describe, state)


def fingerprints(state: Any) -> list[int]:
  """A 32-bit fingerprint of every leaf's bits, in the order of `jax.tree.leaves`.

  Integer sums on the devices: one cheap pass over memory, and the sharding does not matter. Equal lists mean
  (but for a chance of 2^-32 a leaf) bitwise equal states. Any dtype but complex and typed random keys.
  """
  leaves = jax.tree.leaves(state)
  return [int(x) for x in jax.device_get(_fingerprint(leaves))] if leaves else []


@jax.jit
def _fingerprint(leaves: list[jax.Array]) -> jax.Array:
  return jnp.stack([_fingerprint_leaf(leaf) for leaf in leaves])


def _fingerprint_leaf(leaf: jax.Array) -> jax.Array:
  if leaf.dtype == jnp.bool_:
    words = leaf.astype(jnp.uint32)
  else:
    word = {1: jnp.uint8, 2: jnp.uint16}.get(leaf.dtype.itemsize, jnp.uint32)
    words = jax.lax.bitcast_convert_type(leaf, word).astype(jnp.uint32)
  # Odd weights, so that any one flipped bit shows; different ones, so that swapped values do. The multipliers
  # are arbitrary even constants.
  weight = jnp.ones(words.shape, jnp.uint32)
  for axis in range(words.ndim):
    multiplier = (0x9E3779B0, 0x85EBCA76, 0xC2B2AE3C, 0x27D4EB2E)[axis % 4]
    weight += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(multiplier)
  return jnp.sum(words * weight, dtype=jnp.uint32)


def _crc32(record: Mapping[str, Any]) -> int:
  return zlib.crc32(json.dumps(record, sort_keys=True).encode())


def _first_line(error: BaseException) -> str:
  return (str(error).strip().splitlines() or [""])[0][:300]


def _describe(state: Any, prints: Sequence[int] | None = None) -> dict[str, list[Any]]:
  """Leaf name -> [shape, dtype, fingerprint or None]."""
  flat, _ = jax.tree_util.tree_flatten_with_path(state)
  prints = [None] * len(flat) if prints is None else prints
  return {
    jax.tree_util.keystr(path): [list(leaf.shape), str(leaf.dtype), number]
    for (path, leaf), number in zip(flat, prints, strict=True)
  }


def _check_same_tree(path: pathlib.Path, saved: dict[str, list[Any]], wanted: dict[str, list[Any]]) -> None:
  def show(table: dict[str, list[Any]], name: str) -> str:
    return f"{table[name][1]}{table[name][0]}" if name in table else "absent"

  differing = [
    f"  {name}: {show(saved, name)} -> {show(wanted, name)}"
    for name in sorted(saved.keys() | wanted.keys())
    if show(saved, name) != show(wanted, name)
  ]
  if differing:
    head = f"checkpoint {path} holds another model or optimizer; leaf: in the checkpoint -> asked for"
    more = [f"  and {len(differing) - 20} more"] if len(differing) > 20 else []
    cure = "Use the config that checkpoint was written with, or another --workdir."
    raise CheckpointMismatchError("\n".join([head, *differing[:20], *more, cure]))
