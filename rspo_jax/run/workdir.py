"""Claiming and locking the workdir of a run, and writing its files atomically."""

import fcntl
import json
import logging
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import IO, Any

import jax

from rspo_jax.files import read_json

_log = logging.getLogger(__name__)
_ABSENT = object()


def claim_workdir(
  workdir: str | os.PathLike, config: Mapping[str, Any], free_keys: Sequence[str] = ("workdir",)
) -> None:
  """Binds a workdir to a config: writes `config.json` the first time, and refuses another config later.

  Call it before anything else writes to the workdir. Only process 0 writes; the other processes compare if they can see
  the file.

  Args:
    workdir: created if missing.
    config: nested, JSON-able.
    free_keys: dotted keys (each with everything below it) that may change between starts; `config.json` then gets the
      new value.
  Raises:
    ValueError: the workdir cannot be created, is a file, or holds results without a config, an unreadable
      `config.json`, or another config; then the differing keys are listed one per line with old and new value.
  """
  workdir = pathlib.Path(workdir)
  path = workdir / "config.json"
  new = to_plain_json(config)
  if not path.exists():
    _start_workdir(workdir, new)
    return
  old_flat, new_flat = _flatten(_read_config(path)), _flatten(new)
  keys = sorted(old_flat.keys() | new_flat.keys())
  differing = [key for key in keys if old_flat.get(key, _ABSENT) != new_flat.get(key, _ABSENT)]
  refused = [key for key in differing if not _is_free(key, free_keys)]
  if refused:
    head = f"{workdir} belongs to a run with another config; key: its value -> yours"
    lines = [f"  {key}: {_show(old_flat, key)} -> {_show(new_flat, key)}" for key in refused]
    cure = "Choose another --workdir, or give these keys their old values to continue that run."
    raise ValueError("\n".join([head, *lines, cure]))
  if differing and jax.process_index() == 0:
    dump_json_atomic(path, new)


def lock_workdir(workdir: pathlib.Path) -> IO[str]:
  """Locks `workdir/.lock` until the returned file is closed.

  It is a record lock: child processes do not inherit it, and a kill releases it.

  Raises:
    ValueError: another process holds the lock.
  """
  workdir.mkdir(parents=True, exist_ok=True)
  file = open(workdir / ".lock", "w")  # noqa: SIM115
  try:
    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except (BlockingIOError, PermissionError) as error:
    file.close()
    raise ValueError(
      f"another process is writing to {workdir}. Wait for it or stop it, or choose another --workdir."
    ) from error
  except OSError:
    _log.info("%s is on a file system without locks, so a second run on it cannot be detected", workdir)
  return file


def dump_json_atomic(path: str | os.PathLike, value: Any) -> None:
  """Writes JSON atomically: after a kill, and for concurrent readers, the file is the old one or the new one.

  Numpy and jax scalars and arrays become numbers and lists.

  Raises:
    ValueError: NaN or infinity, which JSON cannot represent. TypeError: a value of any other type.
  """
  text = json.dumps(value, indent=2, allow_nan=False, default=_from_array) + "\n"
  write_text_atomic(pathlib.Path(path), text)


def write_text_atomic(path: pathlib.Path, text: str) -> None:
  """As `dump_json_atomic`, for text. For one writer at a time, because the temporary file has a fixed name."""
  temporary = path.with_name(f".{path.name}.tmp")
  with open(temporary, "w", encoding="utf-8") as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
  os.replace(temporary, path)


def to_plain_json(value: Any) -> Any:
  """A value as JSON reads it back: tuples become lists, numpy and jax values become numbers and lists.

  Raises:
    ValueError: a value that JSON cannot represent, such as NaN and infinity.
  """
  try:
    return json.loads(json.dumps(value, allow_nan=False, default=_from_array))
  except (TypeError, ValueError) as error:
    raise ValueError(
      f"cannot be kept as JSON: {error}. Use str, int, finite float, bool, None, lists and dicts."
    ) from error


def _start_workdir(workdir: pathlib.Path, config: Any) -> None:
  if any((workdir / name).exists() for name in ("checkpoints", "metrics.jsonl")):
    raise ValueError(
      f"{workdir} holds results of a run but no config.json, so it is unknown whether they belong to this run. "
      "Choose another --workdir."
    )
  if jax.process_index() != 0:
    return
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    dump_json_atomic(workdir / "config.json", config)
  except OSError as error:
    raise ValueError(
      f"--workdir {workdir} cannot be used ({error}); want a folder that is writable or can be created."
    ) from error


def _read_config(path: pathlib.Path) -> dict[str, Any]:
  cure = "Choose another --workdir."
  try:
    return read_json(path, cure=cure)
  except OSError as error:
    raise ValueError(f"{path} cannot be read ({error}). {cure}") from error


def _is_free(key: str, free_keys: Sequence[str]) -> bool:
  return any(key == free or key.startswith(f"{free}.") for free in free_keys)


def _show(flat: Mapping[str, Any], key: str) -> str:
  return json.dumps(flat[key]) if key in flat else "(absent)"


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  flat = {}
  for key, value in config.items():
    if isinstance(value, dict) and value:
      flat |= _flatten(value, f"{prefix}{key}.")
    else:
      flat[f"{prefix}{key}"] = value
  return flat


def _from_array(value: Any) -> Any:
  if hasattr(value, "tolist"):
    return value.tolist()
  raise TypeError(f"{value!r} is a {type(value).__name__}")
