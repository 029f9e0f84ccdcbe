"""The claim a run lays on its workdir, and files that are never met half written."""

import fcntl
import json
import logging
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import IO, Any

import jax

_log = logging.getLogger(__name__)
_ABSENT = object()


def claim_workdir(
  workdir: str | os.PathLike, config: Mapping[str, Any], free_keys: Sequence[str] = ("workdir",)
) -> None:
  """Makes the workdir this run's: writes `config.json` the first time, later refuses another config.

  Call it before anything else writes to the workdir. Only process 0 writes; the others compare where they can
  see the file.

  Args:
    workdir: made if missing.
    config: nested, JSON-able.
    free_keys: dotted keys (each with everything below it) that may change between starts; `config.json` then
      gets the new value.
  Raises:
    ValueError: the workdir cannot be made or is a file, holds results without a config, a broken
      `config.json`, or another config: the differing keys are listed one per line, old and new value.
  """
  workdir = pathlib.Path(workdir)
  path = workdir / "config.json"
  new = to_plain_json(config)
  if not path.exists():
    _start_workdir(workdir, new)
    return
  try:
    old = json.loads(path.read_text(encoding="utf-8"))
    old_flat = _flatten(old)
  except (ValueError, AttributeError, OSError) as error:
    raise ValueError(f"{path} cannot be read as a config ({error}). Choose another --workdir.") from error
  new_flat = _flatten(new)
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
  """Holds `workdir/.lock` until closed. A record lock: children do not inherit it, a kill frees it.

  Raises:
    ValueError: another process holds it.
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
    _log.info("%s is on a file system without locks; nothing guards it from a second run", workdir)
  return file


def dump_json_atomic(path: str | os.PathLike, value: Any) -> None:
  """Writes JSON so that a reader, or a kill, meets the old file or the new one, never half of one.

  Numpy and jax scalars and arrays become numbers and lists.

  Raises:
    ValueError: NaN or infinity, which JSON has not. TypeError: what JSON cannot hold.
  """
  text = json.dumps(value, indent=2, allow_nan=False, default=_from_array) + "\n"
  write_text_atomic(pathlib.Path(path), text)


def write_text_atomic(path: pathlib.Path, text: str) -> None:
  """As `dump_json_atomic`, for text. One writer at a time: the temporary file has a fixed name."""
  temporary = path.with_name(f".{path.name}.tmp")
  with open(temporary, "w", encoding="utf-8") as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
  os.replace(temporary, path)


def to_plain_json(value: Any) -> Any:
  """What JSON makes of it: tuples become lists, numpy and jax values numbers and lists.

  Raises:
    ValueError: something JSON cannot hold, NaN and infinity among it.
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
      f"{workdir} holds results of a run but no config.json, so nothing tells whether they are this run's. "
      "Choose another --workdir."
    )
  if jax.process_index() != 0:
    return
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    dump_json_atomic(workdir / "config.json", config)
  except OSError as error:
    raise ValueError(
      f"--workdir {workdir} cannot be used ({error}); want a folder that is writable or can be made."
    ) from error


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
