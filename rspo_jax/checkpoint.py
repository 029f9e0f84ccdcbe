"""F3: checkpoints that survive a kill at any moment, and the claim a run lays on its workdir.

Layout of a workdir: `config.json` (the claim), `checkpoints/<step>/` (one Orbax checkpoint each). Orbax writes a step
under a temporary name and renames it when it is whole, so whatever carries a plain step number is complete.
"""

import json
import logging
import math
import os
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

_log = logging.getLogger(__name__)
_POLICIES = ocp.training.preservation_policies


class CheckpointError(RuntimeError):
  """No checkpoint of the workdir can be read. The message names the step folders and the cure."""


class CheckpointMismatchError(ValueError):
  """The checkpoint holds another tree than the one asked for. The message names the leaves that differ."""


class Restored(NamedTuple):
  """state: as the abstract state asked for; meta: the dict given to `save`; step: the step it was saved at."""

  state: Any
  meta: dict[str, Any]
  step: int


class Checkpoints:
  """The checkpoints of one workdir: asynchronous saves, the last `keep` and the best one by a metric kept.

  Args:
    workdir: the folder of the run; steps go to `workdir/checkpoints`.
    keep: how many of the newest steps stay, >= 1. The best step by `best_metric` stays beside them.
    best_metric: the key of `save(metrics=...)` that ranks the steps, the larger the better; the newest of equals wins.
    read_only: for looking at a run that another process may be writing. Never deletes, and `save` raises.
  Raises:
    ValueError: keep < 1; read_only with no checkpoints to read.

  All processes of a multi-process run make the same calls in the same order. Use it as a context manager, or `close` it.
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
    self._folder = pathlib.Path(workdir).absolute() / "checkpoints"
    if read_only and not self._folder.is_dir():
      raise ValueError(f"no checkpoints at {self._folder}. Name the --workdir of a run that has saved one.")
    self._best_metric = best_metric
    self._read_only = read_only
    self._unreadable: set[int] = set()
    best = _POLICIES.BestN(
      get_metric_fn=lambda metrics: _rank(metrics, best_metric), n=1, keep_checkpoints_without_metrics=False
    )
    self._orbax = ocp.training.Checkpointer(
      self._folder,
      preservation_policy=_POLICIES.AnyPreservationPolicy([_POLICIES.LatestN(keep), best]),
      cleanup_tmp_directories=not read_only,  # what a killed save left behind
    )

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def steps(self) -> list[int]:
    """The complete steps on disk, oldest first."""
    return [c.step for c in self._orbax.checkpoints if c.step not in self._unreadable]

  def latest_step(self) -> int | None:
    """The newest complete step, None when there is none."""
    return max(self.steps(), default=None)

  def best_step(self) -> int | None:
    """The step with the largest `best_metric`, the newest of equals; None when no step carries the metric."""
    ranked = [
      (_rank(c.metrics, self._best_metric), c.step)
      for c in self._orbax.checkpoints
      if c.step not in self._unreadable
    ]
    rank, step = max(ranked, default=(-math.inf, None))
    return step if rank > -math.inf else None

  def save(
    self, step: int, state: Any, meta: Mapping[str, Any], metrics: Mapping[str, float] | None = None
  ) -> bool:
    """Starts saving and returns once the arrays are copied to the host: `state` may be donated right after.

    Args:
      step: updates taken so far over the whole run; rises from save to save.
      state: a pytree of jax arrays (any sharding).
      meta: what else continues the run, JSON-able: phase, data position, seed, config hash.
      metrics: host scalars by name; `best_metric` among them enters the step into the contest for the best.
    Returns:
      False when this very step is already on disk (nothing is written), else True.
    Raises:
      ValueError: a step older than the newest on disk, a read-only folder, meta that JSON cannot hold.
    """
    if self._read_only:
      raise ValueError(f"{self._folder} was opened read-only; open it with read_only=False to save.")
    newest = self.latest_step()
    if newest is not None and step <= newest:
      if step == newest:
        return False
      raise ValueError(
        f"step {step} is older than the newest checkpoint {self._folder / str(newest)}. Steps rise over the whole "
        "run (all phases); continue from `restore`, or use a fresh --workdir."
      )
    self._move_unreadable_aside()
    record = {"meta": _plain_json(meta), "leaves": _describe(state, fingerprints(state))}
    self._orbax.save_checkpointables_async(
      step,
      {"state": state},
      force=True,
      metrics={k: float(v) for k, v in metrics.items()} if metrics else None,
      custom_metadata=record,
    )
    return True

  def restore(self, abstract_state: Any) -> Restored | None:
    """The newest complete checkpoint, laid out as asked; None when the workdir has none.

    A checkpoint that cannot be read is tried twice, then a warning names its folder and the step before it is taken
    (with several processes it is an error instead, because they must all agree on the step). `save` later moves the
    unreadable folder to `checkpoints/unreadable-<step>`.

    Args:
      abstract_state: a pytree of `jax.ShapeDtypeStruct` with shardings (see `abstract`), or of arrays.
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
    """One step, for instance `best_step()`. Arguments and errors as `restore`; nothing is fallen back to."""
    path = self._folder / str(step)
    if step not in self.steps():
      raise ValueError(f"no checkpoint at {path}; the steps there are {self.steps()}.")
    wanted = abstract(abstract_state)
    for attempt in (1, 2):
      try:
        return self._load(step, wanted)
      except CheckpointMismatchError:
        raise
      except Exception as error:
        _log.warning("loading %s failed (attempt %d of 2)", path, attempt, exc_info=True)
        failure = error
    raise CheckpointError(
      f"checkpoint {path} cannot be read ({type(failure).__name__}: {_first_line(failure)}). Move that folder out of "
      "`checkpoints` to continue from the step before it."
    ) from failure

  def wait(self) -> None:
    """Blocks until the last save is on disk; raises what went wrong in it."""
    self._orbax.wait()

  def close(self) -> None:
    """Waits, then frees the threads."""
    self._orbax.close()

  def _load(self, step: int, wanted: Any) -> Restored:
    record = self._orbax.checkpointables_metadata(step).custom_metadata
    saved = record["leaves"]
    _check_same_tree(self._folder / str(step), saved, _describe(wanted))
    state = self._orbax.load_checkpointables(step, {"state": wanted})["state"]
    found = _describe(state, fingerprints(state))
    damaged = [name for name in saved if saved[name] != found[name]]
    if damaged:
      raise OSError(f"damaged data in {', '.join(damaged)}")
    return Restored(state, record["meta"], step)

  def _move_unreadable_aside(self) -> None:
    if not self._unreadable:
      return
    for step in sorted(self._unreadable):
      path = self._folder / str(step)
      aside = path.with_name(f"unreadable-{step}")
      path.rename(aside)
      _log.warning("moved %s to %s", path, aside)
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
      raise ValueError(
        f"leaf {jax.tree_util.keystr(path)} ({leaf}) has no sharding; give jax.ShapeDtypeStruct one."
      )
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

  return jax.tree_util.tree_map_with_path(describe, state)


@jax.jit
def _fingerprint_leaves(leaves: list[jax.Array]) -> jax.Array:
  def one(x: jax.Array) -> jax.Array:
    if x.dtype == jnp.bool_:
      bits = x.astype(jnp.uint32)
    else:
      words = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
      bits = jax.lax.bitcast_convert_type(x, words).astype(jnp.uint32)
    # Odd weights: a flipped bit always shows. Different ones: so do two values that changed places.
    weight = jnp.ones((), jnp.uint32)
    for axis in range(bits.ndim):
      weight = weight + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * jnp.uint32(
        (0x9E3779B0, 0x85EBCA76, 0xC2B2AE3C, 0x27D4EB2E)[axis % 4]
      )
    return jnp.sum(bits * weight, dtype=jnp.uint32)

  return jnp.stack([one(x) for x in leaves])


def fingerprints(state: Any) -> list[int]:
  """A 32-bit fingerprint of every leaf's bits, in the order of `jax.tree.leaves`.

  Integer sums, so it does not depend on how the arrays are sharded: two runs agree if and (but for 1 in 2^32) only if
  their states are bitwise equal. Leaves are arrays of any dtype but complex and typed keys.
  """
  leaves = jax.tree.leaves(state)
  return [int(x) for x in jax.device_get(_fingerprint_leaves(leaves))] if leaves else []


def claim_workdir(
  workdir: str | os.PathLike, config: Mapping[str, Any], free_keys: Sequence[str] = ("workdir",)
) -> None:
  """Makes the workdir this run's: writes `config.json` the first time, later refuses another config.

  Args:
    workdir: made if missing.
    config: nested, JSON-able.
    free_keys: dotted keys (each with everything below it) that may change between starts; `config.json` then gets the
      new value.
  Raises:
    ValueError: the workdir is no folder, holds results without a config, a broken `config.json`, or another config;
      the differing keys are listed one per line with the old and the new value.
  Only process 0 writes; the others compare where they can see the file.
  """
  workdir = pathlib.Path(workdir)
  if workdir.exists() and not workdir.is_dir():
    raise ValueError(f"--workdir {workdir} is a file; want a folder (it is made if missing).")
  new = _plain_json(config)
  path = workdir / "config.json"
  if not path.exists():
    if any((workdir / name).exists() for name in ("checkpoints", "metrics.jsonl")):
      raise ValueError(
        f"{workdir} holds results of a run but no config.json, so nothing tells whether they are this run's. "
        "Choose another --workdir."
      )
    if jax.process_index() == 0:
      workdir.mkdir(parents=True, exist_ok=True)
      dump_json_atomic(path, new)
    return
  try:
    old = json.loads(path.read_text())
    old_flat = _flatten(old)
  except (ValueError, AttributeError, OSError) as error:
    raise ValueError(f"{path} cannot be read as a config ({error}). Choose another --workdir.") from error
  new_flat = _flatten(new)
  differing = [
    key
    for key in sorted(old_flat.keys() | new_flat.keys())
    if old_flat.get(key, _Absent) != new_flat.get(key, _Absent)
  ]
  refused = [
    key for key in differing if not any(key == free or key.startswith(f"{free}.") for free in free_keys)
  ]
  if refused:
    lines = [f"  {key}: {_show(old_flat, key)} -> {_show(new_flat, key)}" for key in refused]
    raise ValueError(
      "\n".join(
        [
          f"{workdir} belongs to a run with another config; key: its value -> yours",
          *lines,
          "Choose another --workdir, or give these keys their old values to continue that run.",
        ]
      )
    )
  if differing and jax.process_index() == 0:
    dump_json_atomic(path, new)


def dump_json_atomic(path: str | os.PathLike, value: Any) -> None:
  """Writes JSON so that a reader (or a kill) meets the old file or the new one, never half of one.

  Numpy and jax scalars and arrays become numbers and lists. ValueError for NaN or infinity, which JSON has not.
  """
  path = pathlib.Path(path)
  text = json.dumps(value, indent=2, allow_nan=False, default=_to_plain) + "\n"
  write_text_atomic(path, text)


def write_text_atomic(path: pathlib.Path, text: str) -> None:
  """`dump_json_atomic` for text."""
  handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
  try:
    with os.fdopen(handle, "w", encoding="utf-8") as file:
      file.write(text)
      file.flush()
      os.fsync(file.fileno())
    os.chmod(temporary, 0o644)  # mkstemp makes it private
    os.replace(temporary, path)
  except BaseException:
    os.unlink(temporary)
    raise


class _Absent:
  """Marks a key one of two configs does not have."""


def _show(flat: Mapping[str, Any], key: str) -> str:
  return json.dumps(flat[key]) if key in flat else "(absent)"


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  flat = {}
  for key, value in config.items():
    if isinstance(value, dict) and value:
      flat.update(_flatten(value, f"{prefix}{key}."))
    else:
      flat[f"{prefix}{key}"] = value
  return flat


def _to_plain(value: Any) -> Any:
  if hasattr(value, "tolist"):
    return value.tolist()
  raise TypeError(f"{value!r} ({type(value).__name__}) cannot be written as JSON")


def _plain_json(value: Any) -> Any:
  """What JSON makes of it: tuples become lists, numpy scalars numbers."""
  try:
    return json.loads(json.dumps(value, allow_nan=False, default=_to_plain))
  except (TypeError, ValueError) as error:
    raise ValueError(
      f"cannot be kept as JSON: {error}. Use str, int, float, bool, None, lists and dicts."
    ) from error


def _rank(metrics: Mapping[str, Any] | None, name: str) -> float:
  value = float((metrics or {}).get(name, -math.inf))
  return -math.inf if math.isnan(value) else value


def _first_line(error: BaseException) -> str:
  return (str(error).strip().splitlines() or [""])[0][:300]


def _describe(state: Any, prints: Sequence[int] | None = None) -> dict[str, list[Any]]:
  """Leaf name -> [shape, dtype], with its fingerprint third where given."""
  flat, _ = jax.tree_util.tree_flatten_with_path(state)
  table = {jax.tree_util.keystr(path): [list(leaf.shape), str(leaf.dtype)] for path, leaf in flat}
  for name, value in zip(table, prints or (), strict=False):
    table[name].append(value)
  return table


def _check_same_tree(path: pathlib.Path, saved: dict[str, list[Any]], wanted: dict[str, list[Any]]) -> None:
  def show(entry: list[Any] | None) -> str:
    return "absent" if entry is None else f"{entry[1]}{tuple(entry[0])}"

  lines = [
    f"  {name}: {show(saved.get(name))} -> {show(wanted.get(name))}"
    for name in sorted(saved.keys() | wanted.keys())
    if (saved.get(name) or [None])[:2] != (wanted.get(name) or [None])[:2]
  ]
  if lines:
    shown = lines[:20] + ([f"  ... and {len(lines) - 20} more"] if len(lines) > 20 else [])
    raise CheckpointMismatchError(
      "\n".join(
        [
          f"checkpoint {path} holds another model or optimizer; leaf: in the checkpoint -> asked for",
          *shown,
          "Use the config this checkpoint was written with, or another --workdir.",
        ]
      )
    )
