"""F3: the documented metric names, and the files they are written to.

A run's metrics are `metrics.jsonl` (one JSON object a line: phase, step, time, then metrics) and TensorBoard events
(one TensorBoard run per phase). The jsonl file is the record: after a restart it continues as if never interrupted.
"""

import json
import logging
import math
import os
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from tensorboardX import SummaryWriter

from rspo_jax.checkpoint import write_text_atomic

_log = logging.getLogger(__name__)

METRICS: dict[str, str] = {
  "reward/mean": "Mean reward of the sampled completions.",
  "reward/std": "Standard deviation of the reward over the sampled completions.",
  "reward/success": "Share of the sampled completions that solve their problem, 0 to 1.",
  "reward/format": "Share of the sampled completions in the form the reward asks for, 0 to 1.",
  "groups/zero_variance": "Share of the groups whose completions all got the same reward (no advantage), 0 to 1.",
  "policy/entropy": "Mean entropy of the next-token distribution over completion tokens, temperature 1, nats.",
  "policy/log_prob": "Mean log-probability of the completion tokens at temperature 1, nats.",
  "length/mean": "Mean length of the completions, tokens.",
  "length/max": "Longest completion, tokens.",
  "length/truncated": "Share of the completions cut off at the length limit, 0 to 1.",
  "ratio/p1": "1st percentile of the token importance ratio (new over old policy).",
  "ratio/p50": "Median of the token importance ratio.",
  "ratio/p99": "99th percentile of the token importance ratio.",
  "ratio/max": "Largest token importance ratio.",
  "ratio/ess": "Effective sample size of the token importance ratios, as a share of the tokens, 0 to 1.",
  "clip/low": "Share of the terms clipped at the lower bound, 0 to 1.",
  "clip/high": "Share of the terms clipped at the upper bound, 0 to 1.",
  "kl/approx": "KL from the old to the new policy, k3 estimate, mean over tokens, nats.",
  "shift/gamma_mean": "Mean router-shift weight gamma over tokens, after the floor, in (0, 1].",
  "shift/gamma_p10": "10th percentile of gamma, after the floor.",
  "shift/floor_fraction": "Share of the tokens whose gamma sits at the floor, 0 to 1.",
  "shift/drift": "Mean router drift (absolute change of the old experts' router log-probs), nats.",
  "shift/layer_drift": "Router drift of each mixture-of-experts layer, first to last, nats.",
  "router/overlap": "Mean share of the old top-k experts that are in the new top-k, 0 to 1.",
  "router/load_max_over_mean": "Tokens of the busiest expert over the mean of all, the worst layer; 1 is balanced.",
  "router/dead_fraction": "Share of the experts that got no token, over all layers, 0 to 1.",
  "loss/objective": "The policy objective that is being maximised.",
  "loss/warm_start": "Supervised cross-entropy of the warm start, mean over target tokens, nats.",
  "grad/norm": "Global norm of the gradient before clipping.",
  "updates/skipped": "Updates skipped so far because the gradient was not finite (cumulative).",
  "optimizer/learning_rate": "Learning rate of the last update.",
  "speed/sample_tokens_per_second": "Completion tokens sampled per second.",
  "speed/score_tokens_per_second": "Tokens scored per second.",
  "speed/train_tokens_per_second": "Tokens trained on per second.",
  "seconds/sample": "Wall time of sampling in this step, seconds.",
  "seconds/reward": "Wall time of the rewards in this step, seconds.",
  "seconds/score": "Wall time of scoring in this step, seconds.",
  "seconds/train": "Wall time of the updates in this step, seconds.",
  "seconds/step": "Wall time of the whole step, seconds.",
  "eval/success": "Held-out success at temperature 1, mean over problems and samples (avg@k), 0 to 1.",
  "eval/greedy_success": "Held-out success of the greedy completion, 0 to 1.",
  "eval/format": "Share of the held-out completions (temperature 1) in the asked form, 0 to 1.",
  "memory/peak_bytes": "Largest device memory in use so far, the fullest local device, bytes; where known.",
}

TIMING_PREFIXES = ("seconds/", "speed/", "memory/")
_HEAD = ("phase", "step", "time")


def deterministic(row: Mapping[str, Any]) -> dict[str, Any]:
  """A row without what a clock or the machine decides (`time`, `seconds/`, `speed/`, `memory/`): two runs of the same
  command agree on the rest to the last bit."""
  return {k: v for k, v in row.items() if k != "time" and not k.startswith(TIMING_PREFIXES)}


class MetricsWriter:
  """Appends to `workdir/metrics.jsonl` and `workdir/tensorboard/<phase>`. Only process 0 writes.

  Args:
    workdir: exists.
    tensorboard: False leaves out the TensorBoard events.
  """

  def __init__(self, workdir: str | os.PathLike, *, tensorboard: bool = True):
    self._path = pathlib.Path(workdir) / "metrics.jsonl"
    self._events = pathlib.Path(workdir) / "tensorboard" if tensorboard else None
    self._writes = jax.process_index() == 0
    self._file = None
    self._boards: dict[str, SummaryWriter] = {}
    self._purge_after: tuple[str, int] | None = None

  def __enter__(self) -> "MetricsWriter":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def write(self, phase: str, step: int, values: Mapping[str, Any]) -> dict[str, Any]:
    """Writes one row, flushed before it returns.

    Args:
      phase: "warm_start", "rl", ... step: within that phase; rows come in the order of the run.
      values: names of `METRICS` -> scalar or vector: numbers, numpy or jax arrays (fetched in one transfer).
    Returns:
      The same values as plain floats, ints and lists, in every process.
    Raises:
      ValueError: a name that is not in `METRICS`.
    """
    unknown = sorted(set(values) - METRICS.keys())
    if unknown:
      raise ValueError(
        f"unknown metric {', '.join(unknown)}; the names are the keys of rspo_jax.metrics.METRICS."
      )
    plain = {name: np.asarray(value).tolist() for name, value in jax.device_get(dict(values)).items()}
    if self._writes:
      now = time.time()
      row = {"phase": phase, "step": int(step), "time": now} | {k: _encode(v) for k, v in plain.items()}
      if self._file is None:
        self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115
      self._file.write(json.dumps(row, allow_nan=False) + "\n")
      self._file.flush()
      self._write_events(phase, int(step), plain, now)
    return plain

  def truncate(self, phase: str, step: int) -> None:
    """Drops what was written after `step` of `phase`: call it with what was restored, before the first `write`.

    Rows of phases that began earlier stay whole, rows of later phases go, and so does a line that a kill cut in half.
    Without a restored checkpoint, `truncate("", -1)` drops everything.
    """
    self.close()
    self._purge_after = (phase, step)
    if not self._writes or not self._path.exists():
      return
    rows = [(line, row) for _, line, row in _lines(self._path) if row is not None]
    phases = list(dict.fromkeys(row["phase"] for _, row in rows))
    now = phases.index(phase) if phase in phases else len(phases) if phase else -1
    kept = []
    for line, row in rows:
      age = phases.index(row["phase"])
      if age < now or (age == now and row["step"] <= step):
        kept.append(line + "\n")
    write_text_atomic(self._path, "".join(kept))

  def close(self) -> None:
    """Closes the files; `write` opens them again."""
    if self._file is not None:
      self._file.close()
      self._file = None
    for board in self._boards.values():
      board.close()
    self._boards.clear()

  def _write_events(self, phase: str, step: int, plain: Mapping[str, Any], now: float) -> None:
    if self._events is None:
      return
    if phase not in self._boards:
      purge = None
      if self._purge_after is not None:
        purge = self._purge_after[1] + 1 if self._purge_after[0] == phase else 0
      self._boards[phase] = SummaryWriter(str(self._events / phase), purge_step=purge)
    board = self._boards[phase]
    for name, value in plain.items():
      flat = np.ravel(np.asarray(value, np.float64))
      for index, item in enumerate(flat):
        tag = name if np.ndim(value) == 0 else f"{name}/{index:02d}"
        board.add_scalar(tag, item, global_step=step, walltime=now)


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
  """The rows of a `metrics.jsonl`, in order; NaN and infinities come back as floats.

  A line that is no JSON object (cut off by a kill) is skipped, with a warning that names its number.
  """
  path = pathlib.Path(path)
  rows = []
  for number, _, row in _lines(path):
    if row is None:
      _log.warning("%s, line %d: not a metrics row, skipped", path, number)
    else:
      rows.append({k: v if k in _HEAD else _decode(v) for k, v in row.items()})
  return rows


def _lines(path: pathlib.Path) -> list[tuple[int, str, dict[str, Any] | None]]:
  """(line number, line, row or None where the line is no row) of every non-empty line."""
  out = []
  with open(path, encoding="utf-8", errors="replace") as file:
    for number, raw in enumerate(file, start=1):
      line = raw.rstrip("\n")
      if not line.strip():
        continue
      try:
        row = json.loads(line)
        whole = isinstance(row["phase"], str) and isinstance(row["step"], int) and raw.endswith("\n")
      except (ValueError, TypeError, KeyError):
        whole = False
      out.append((number, line, row if whole else None))
  return out


def _encode(value: Any) -> Any:
  if isinstance(value, list):
    return [_encode(v) for v in value]
  if isinstance(value, float) and not math.isfinite(value):
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
  return value


def _decode(value: Any) -> Any:
  if isinstance(value, list):
    return [_decode(v) for v in value]
  return float(value) if isinstance(value, str) else value
