"""Checkpoints that survive a kill at any moment.

A step is `workdir/checkpoints/<step>/`, one Orbax checkpoint. Orbax writes it under a temporary name and renames it
when it is complete, so a folder named by a plain step number is complete. Disks can still lose or flip bits later;
therefore a checkpoint stores fingerprints of its arrays, and loading compares them.
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
from orbax.checkpoint import v1 as ocp

from rspo_jax.run.fingerprints import fingerprints
from rspo_jax.run.leaves import abstract, differing_leaves, leaf_table
from rspo_jax.run.workdir import lock_workdir, to_plain_json

_log = logging.getLogger(__name__)
_SHOWN_LEAVES = 20  # of a mismatch, in the error message


class CheckpointError(RuntimeError):
  """A checkpoint, or every checkpoint of the workdir, is unreadable. The message names the folders and the cure."""


class CheckpointMismatchError(ValueError):
  """The checkpoint holds another tree than the requested one. The message names the leaves that differ."""


class Restored(NamedTuple):
  """A checkpoint that was loaded.

  Attributes:
    state: laid out as the abstract state requested. meta: the dict given to `save`. step: the step it was saved at.
  """

  state: Any
  meta: dict[str, Any]
  step: int


class Checkpoints:
  """The checkpoints of one workdir, saved asynchronously; keeps the newest `keep` steps and the best one.

  Args:
    workdir: the folder of the run.
    keep: number of newest steps to keep, >= 1. The best step by `best_metric` is kept in addition.
    best_metric: the key of `save(metrics=...)` that ranks the steps: larger is better; ties go to the newer step.
    read_only: for reading a run that another process may be writing. Nothing is deleted, and `save` raises.
  Raises:
    ValueError: keep < 1; read_only without any checkpoints; a workdir that another process is writing to.

  All processes of a run make the same calls in the same order. Use it as a context manager, or call `close`.
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
      raise ValueError(f"keep is {keep}; want at least 1, otherwise the run cannot be resumed.")
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
      cleanup_tmp_directories=not read_only,  # left behind by a save that was killed
    )
    self._metrics = {step: self._read_metrics(step) for step in self.steps()}

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def steps(self) -> list[int]:
    """The steps on disk and the one being saved, oldest first, without those that `restore` could not read."""
    return [c.step for c in self._orbax.checkpoints if c.step not in self._unreadable]

  def latest_step(self) -> int | None:
    """The newest of `steps()`, or None."""
    return max(self.steps(), default=None)

  def best_step(self) -> int | None:
    """The step with the largest `best_metric`, the newest in a tie; None if no step has the metric."""
    return self._best_of(self.steps())

  def save(self, step: int, state: Any, meta: Mapping[str, Any], metrics: Mapping[str, float] | None = None) -> bool:
    """Starts saving, and returns once the arrays are on the host, so that `state` may be donated afterwards.

    Args:
      step: number of updates so far in the whole run (all phases); increases from save to save.
      state: a pytree of jax arrays with any sharding.
      meta: JSON-able values that resuming needs besides the arrays: phase, data position, seed, config hash.
      metrics: scalars by name; if `best_metric` is among them, the step competes for the best one.
    Returns:
      False if this step is on disk already (nothing is written), else True.
    Raises:
      ValueError: a step older than the newest on disk, a read-only folder, meta that is not JSON-able.
      Any error of the previous asynchronous save.
    """
    if self._read_only:
      raise ValueError(f"{self._folder} was opened read-only; open it with read_only=False to save.")
    newest = self.latest_step()
    if newest is not None and step < newest:
      raise ValueError(
        f"step {step} is older than the newest checkpoint {self._folder / str(newest)}. Steps increase over the "
        "whole run (all phases): continue from the state that `restore` returns, or use a fresh --workdir."
      )
    if step == newest:
      return False
    self._move_unreadable_aside()
    finite = {name: float(value) for name, value in (metrics or {}).items() if math.isfinite(value)}
    record = {"meta": to_plain_json(meta), "metrics": finite, "leaves": leaf_table(state, fingerprints(state))}
    self._metrics[step] = finite
    self._orbax.save_checkpointables_async(
      step, {"state": state}, force=True, custom_metadata=record | {"crc32": _crc32(record)}
    )
    return True

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
    """Orbax's preservation policy, called after each save: which of the steps on disk (oldest first) to keep."""
    del context
    steps = [c.step for c in checkpoints]
    kept = {*steps[-self._keep :], self._best_of(steps)}
    return [step in kept for step in steps]

  def restore(self, abstract_state: Any) -> Restored | None:
    """The newest readable checkpoint, laid out as requested; None if the workdir has no checkpoints.

    A checkpoint that fails to load is tried a second time. If that fails too, a warning names its folder and the
    previous checkpoint is loaded; with several processes it is an error instead, because all processes must load the
    same step. The next `save` moves unreadable folders to `workdir/unreadable/`.

    Args:
      abstract_state: a pytree of `jax.ShapeDtypeStruct` with shardings (see `abstract`), or of arrays; or a function
        that builds it from the checkpoint's meta.
    Raises:
      CheckpointMismatchError: the checkpoint has another tree, shape or dtype.
      CheckpointError: there are checkpoints, but none of them can be read.
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
    """One step, such as `best_step()`. Arguments and errors as for `restore`, but without falling back."""
    self.wait()
    path = self._folder / str(step)
    if step not in self.steps():
      raise ValueError(f"no checkpoint at {path}; the steps there are {self.steps()}.")
    requested = abstract_state if callable(abstract_state) else abstract(abstract_state)
    for attempt in (1, 2):
      try:
        return self._load(step, requested)
      except CheckpointMismatchError:
        raise
      except Exception as error:
        _log.warning("loading %s failed, attempt %d of 2", path, attempt, exc_info=True)
        failure = error
    reason = f"{type(failure).__name__}: {_first_line(failure)}"
    raise CheckpointError(
      f"checkpoint {path} cannot be read ({reason}). To continue from an older step, move that folder out of "
      f"{self._folder}; if none is left, use a fresh --workdir."
    ) from failure

  def wait(self) -> None:
    """Blocks until the last save is on disk; raises the error of that save, if any."""
    self._orbax.wait()

  def close(self) -> None:
    """Waits for the last save, then releases the threads and the workdir's lock."""
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
    """The metadata that `save` wrote beside the arrays."""
    record = dict(self._orbax.checkpointables_metadata(step).custom_metadata)
    if record.pop("crc32") != _crc32(record):
      raise OSError("damaged metadata")
    return record

  def _read_metrics(self, step: int) -> dict[str, float]:
    """Metrics from our own record: with Orbax's metrics file, one damaged file would prevent opening all steps."""
    try:
      return self._read_record(step)["metrics"]
    except Exception:  # `restore` reports it if this step is needed
      _log.info("checkpoint %d has no readable metadata", step, exc_info=True)
      return {}

  def _load(self, step: int, requested: Any) -> Restored:
    record = self._read_record(step)
    requested = abstract(requested(record["meta"])) if callable(requested) else requested
    saved = record["leaves"]
    _check_same_tree(self._folder / str(step), differing_leaves(saved, leaf_table(requested)))
    state = self._orbax.load_checkpointables(step, {"state": requested})["state"]
    loaded = leaf_table(state, fingerprints(state))
    damaged = [name for name in saved if saved[name] != loaded[name]]
    if damaged:
      raise OSError(f"damaged data in {', '.join(damaged)}")
    return Restored(state, record["meta"], step)

  def _move_unreadable_aside(self) -> None:
    """Otherwise an unreadable folder would count as one of the newest, and block saving its step again."""
    if not self._unreadable:
      return
    self.wait()
    for step in sorted(self._unreadable):
      target = self._workdir / "unreadable" / f"{step}-{time.time_ns()}"
      target.parent.mkdir(exist_ok=True)
      (self._folder / str(step)).rename(target)
      _log.warning("moved the unreadable checkpoint of step %d to %s", step, target)
    self._unreadable.clear()
    self._orbax.reload()


def _crc32(record: Mapping[str, Any]) -> int:
  return zlib.crc32(json.dumps(record, sort_keys=True).encode())


def _first_line(error: BaseException) -> str:
  return (str(error).strip().splitlines() or [""])[0][:300]


def _check_same_tree(path: pathlib.Path, differing: Sequence[str]) -> None:
  if not differing:
    return
  head = f"checkpoint {path} holds another model or optimizer; leaf: in the checkpoint -> requested"
  lines = [f"  {line}" for line in differing[:_SHOWN_LEAVES]]
  if len(differing) > _SHOWN_LEAVES:
    lines.append(f"  and {len(differing) - _SHOWN_LEAVES} more")
  cure = "Use the config that checkpoint was written with, or another --workdir."
  raise CheckpointMismatchError("\n".join([head, *lines, cure]))
