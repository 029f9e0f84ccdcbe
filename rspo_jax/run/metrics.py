"""The documented metric names, and the files that metrics are written to.

A run writes `metrics.jsonl`, one JSON object per line: phase, step, time (seconds since 1970), then metrics by name.
This file is the record of the run: after a restart it continues as if the run had not been interrupted. TensorBoard
events are derived from it, one TensorBoard run per phase.
"""

import json
import logging
import math
import os
import pathlib
import re
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from tensorboardX import FileWriter
from tensorboardX.proto.summary_pb2 import Summary

from rspo_jax.run.workdir import write_text_atomic

_log = logging.getLogger(__name__)

METRICS: dict[str, str] = {
  "reward/mean": "Mean reward of the sampled completions.",
  "reward/std": "Standard deviation of the reward over the sampled completions.",
  "reward/success": "Share of the sampled completions that solve their problem, 0 to 1.",
  "reward/format": "Share of the sampled completions in the format that the reward requires, 0 to 1.",
  "groups/zero_variance": "Share of the groups in which all completions have the same reward, 0 to 1.",
  "policy/entropy": "Mean entropy of the next-token distribution at temperature 1 over the completion tokens, nats.",
  "policy/log_prob": "Mean log-probability of the completion tokens at temperature 1, nats.",
  "groups/sampled": "Groups scored for this step divided by groups trained on; above 1 with dynamic sampling.",
  "groups/carried": "Share of the groups of a step whose sampling started in an earlier step, 0 to 1.",
  "staleness/mean": "RL steps between sampling a token and training on it, mean over tokens.",
  "staleness/max": "RL steps between sampling a token and training on it, largest.",
  "reward/overlong": "Mean overlong penalty in the reward, <= 0.",
  "curriculum/unseen": "Share of the training problems that were never sampled, 0 to 1.",
  "curriculum/below": "Share of the training problems whose success rate is below the band of the curriculum, 0 to 1.",
  "curriculum/in_band": "Share of the training problems whose success rate is in the band, 0 to 1.",
  "curriculum/above": "Share of the training problems whose success rate is above the band, 0 to 1.",
  "curriculum/skipped": "Problems skipped while the last batch was selected.",
  "curriculum/retried": "Problems of the last batch that are outside the band and were due for a retry.",
  "curriculum/filled": "Problems of the last batch that are outside the band, used because too few are inside it.",
  "length/mean": "Mean length of the completions, tokens.",
  "length/max": "Longest completion, tokens.",
  "length/truncated": "Share of the completions truncated at the length limit, 0 to 1.",
  "ratio/p1": "1st percentile of the token importance ratio (new over old policy).",
  "ratio/p50": "Median of the token importance ratio.",
  "ratio/p99": "99th percentile of the token importance ratio.",
  "ratio/max": "Largest token importance ratio.",
  "ratio/tail": "Share of the tokens whose importance ratio is above 2 or below 1/2, 0 to 1.",
  "ratio/chi_square": "Chi-square divergence of the new from the old policy: mean of (ratio - 1)^2 over tokens.",
  "ratio/ess": "Effective sample size of the token importance ratios, as a share of the tokens, 0 to 1.",
  "clip/low": "Share of the tokens whose objective term is clipped at the lower bound, 0 to 1.",
  "clip/high": "Share of the tokens whose objective term is clipped at the upper bound, 0 to 1.",
  "clip/effective": "Share of the tokens whose gradient is zero because of clipping, 0 to 1.",
  "kl/approx": "KL from the old to the new policy, k3 estimate, mean over tokens, nats.",
  "kl/reference": "KL from the policy to the reference, estimator as configured, mean over tokens, nats.",
  "mismatch/weight_mean": "Mean weight that corrects the mismatch between sampler and trainer; 1 is no mismatch.",
  "mismatch/dropped": "Share of the tokens whose mismatch weight is 0, 0 to 1.",
  "shift/gamma_mean": "Mean router-shift weight gamma over tokens, after the floor, in (0, 1].",
  "shift/gamma_p10": "10th percentile of gamma, after the floor.",
  "shift/gamma_p50": "Median of gamma, after the floor.",
  "shift/floor_fraction": "Share of the tokens whose gamma is at the floor, 0 to 1.",
  "shift/drift": "Mean router drift over tokens, in the unit of the deviation (nats for the paper's deviation).",
  "shift/layer_drift": "Router drift of each mixture-of-experts layer, first to last, in the unit of the deviation.",
  "shift/ratio_correlation": "Correlation over tokens between router drift and |log importance ratio|, -1 to 1.",
  "shift/floor": "Floor of gamma at this step (it may follow a schedule), in (0, 1].",
  "router/overlap": "Mean share of the old top-k experts that are also in the new top-k, 0 to 1.",
  "router/layer_overlap": "router/overlap of each mixture-of-experts layer, first to last.",
  "router/entropy": "Mean entropy of the router probabilities over tokens and layers, nats.",
  "router/layer_entropy": "Router entropy of each mixture-of-experts layer, first to last, nats.",
  "router/load_max_over_mean": "Tokens of the busiest expert over the mean, averaged over layers; 1 is balanced.",
  "router/dead_fraction": "Share of the experts that received no token, over all layers, 0 to 1.",
  "loss/objective": "The maximised value: the policy objective with its entropy, KL and balance terms.",
  "loss/load_balance": "Auxiliary load-balance loss before its coefficient; equal to experts_per_token if balanced.",
  "loss/router_z": "Router z-loss before its coefficient, nats^2.",
  "loss/warm_start": "Supervised cross-entropy of the warm start, mean over target tokens, nats.",
  "grad/norm": "Global norm of the gradient before clipping.",
  "noise/router": "Gradient noise-to-signal ratio of the routers: variance of a minibatch gradient / its squared norm.",
  "noise/experts": "Gradient noise-to-signal ratio of the experts.",
  "noise/attention": "Gradient noise-to-signal ratio of attention.",
  "noise/embedding": "Gradient noise-to-signal ratio of the embedding and the output matrix.",
  "noise/rest": "Gradient noise-to-signal ratio of all other parameters (norms, dense layers).",
  "noise/all": "Gradient noise-to-signal ratio of all parameters together.",
  "replay/log_ratio_square": "Mean squared log importance ratio after the step's updates, nats^2.",
  "replay/experts_share": "Share of log_ratio_square removed by replaying the old experts; may be < 0.",
  "replay/gates_share": "Share of log_ratio_square removed by replaying the old experts and gates; may be < 0.",
  "updates/skipped": "Updates skipped so far because the gradient was not finite (cumulative).",
  "optimizer/learning_rate": "Learning rate of the last update.",
  "speed/sample_tokens_per_second": "Completion tokens sampled per second.",
  "speed/score_tokens_per_second": "Tokens scored per second.",
  "speed/train_tokens_per_second": "Tokens trained on per second.",
  "seconds/sample": "Wall time of sampling in this step, seconds.",
  "seconds/reward": "Wall time of the rewards in this step, seconds.",
  "seconds/score": "Wall time of scoring in this step, seconds.",
  "seconds/train": "Wall time of the updates in this step, seconds.",
  "seconds/diagnostics": "Wall time of the expensive diagnostics in this step, seconds.",
  "seconds/step": "Wall time of the whole step, seconds.",
  "eval/success": "Held-out success of sampled completions (avg@k), unweighted mean of benchmarks, 0 to 1.",
  "eval/greedy_success": "Held-out success of the greedy completion, 0 to 1.",
  "eval/format": "Share of the sampled held-out completions in the required format, 0 to 1.",
  "memory/peak_bytes": "Peak memory so far of the fullest local device, bytes; absent if not reported.",
}

# Names with a variable part.
PATTERNS: dict[str, str] = {
  "eval/<benchmark>/avg": "Success of the sampled completions of a benchmark, mean over problems and samples, 0 to 1.",
  "eval/<benchmark>/greedy": "Success of the greedy completions of a benchmark, 0 to 1.",
  "reward/reason/<reason>": "Share of the completions for which the reward reported this reason, 0 to 1.",
}

TIMING_PREFIXES = ("seconds/", "speed/", "memory/")
_HEAD = ("phase", "step", "time")
_PATTERN = re.compile("|".join(re.sub("<.*?>", r"[\\w-]+", pattern) for pattern in PATTERNS))


def is_known(name: str) -> bool:
  """Whether a metric name is in `METRICS` or matches one of `PATTERNS`."""
  return name in METRICS or _PATTERN.fullmatch(name) is not None


def deterministic(row: Mapping[str, Any]) -> dict[str, Any]:
  """The row without `time` and the metrics of `TIMING_PREFIXES`, which depend on the clock or the machine.

  The remaining values are bitwise equal in two runs of one command on one machine.
  """
  return {k: v for k, v in row.items() if k != "time" and not k.startswith(TIMING_PREFIXES)}


class MetricsWriter:
  """Appends to `workdir/metrics.jsonl` and to TensorBoard events in `workdir/tensorboard/<phase>`.

  Only process 0 writes; the workdir must exist. Use it as a context manager, or call `close`.
  """

  def __init__(self, workdir: str | os.PathLike):
    self._path = pathlib.Path(workdir) / "metrics.jsonl"
    self._events = pathlib.Path(workdir) / "tensorboard"
    self._is_writer = jax.process_index() == 0
    self._file = None
    self._boards: dict[str, FileWriter] = {}

  def __enter__(self) -> "MetricsWriter":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def write(self, phase: str, step: int, values: Mapping[str, Any]) -> dict[str, Any]:
    """Writes one row, flushed before it returns.

    Args:
      phase: "warm_start", "rl", ...
      step: step within that phase. Rows are written in the order of the run; a step may have several.
      values: name -> scalar or vector, as numbers, numpy or jax arrays (fetched in one transfer). Names are those of
        `METRICS` or match `PATTERNS`.
    Returns:
      The same values as plain floats, ints and lists, in every process.
    Raises:
      ValueError: an unknown name, or a value that is not a number or a vector of numbers.
    """
    unknown = sorted(name for name in values if not is_known(name))
    if unknown:
      raise ValueError(
        f"unknown metric {', '.join(unknown)}; want names of rspo_jax.run.metrics.METRICS (add a new one there)."
      )
    plain = {name: _plain(name, value) for name, value in jax.device_get(dict(values)).items()}
    if self._is_writer:
      row = {"phase": phase, "step": int(step), "time": time.time()} | plain
      if self._file is None:
        self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115
      self._file.write(json.dumps({k: _encode(v) for k, v in row.items()}, allow_nan=False) + "\n")
      self._file.flush()
      self._write_events(row)
    return plain

  def truncate(self, phase: str, step: int) -> None:
    """Goes back to the state at a checkpoint: removes the rows written after `step` of `phase`.

    Call it before the first `write` with the restored phase and step, or with ("", 0) if nothing was restored. Rows of
    phases that started before `phase` are kept; rows of phases that started after it are removed, and so is a line that
    a kill left incomplete. The TensorBoard events are written again from the kept rows.
    """
    self.close()
    if not self._is_writer:
      return
    rows = _rows(self._path) if self._path.exists() else []
    order = list(dict.fromkeys(row["phase"] for _, row in rows))
    current = order.index(phase) if phase in order else len(order) if phase else -1
    kept = [
      (line, row)
      for line, row in rows
      if order.index(row["phase"]) < current or (row["phase"] == phase and row["step"] <= step)
    ]
    if self._path.exists():
      write_text_atomic(self._path, "".join(f"{line}\n" for line, _ in kept))
    for old in self._events.glob("*/events.out.tfevents.*"):
      old.unlink()
    for _, row in kept:
      self._write_events(_decode_row(row))

  def close(self) -> None:
    """Closes the files; `write` opens them again."""
    if self._file is not None:
      self._file.close()
      self._file = None
    for board in self._boards.values():
      board.close()
    self._boards.clear()

  def _write_events(self, row: Mapping[str, Any]) -> None:
    phase = row["phase"]
    if phase not in self._boards:
      self._boards[phase] = FileWriter(str(self._events / phase), flush_secs=10)
    summary = Summary()
    for name, value in row.items():
      if name in _HEAD:
        continue
      items = {f"{name}/{i:02d}": v for i, v in enumerate(value)} if isinstance(value, list) else {name: value}
      for tag, item in items.items():
        if math.isfinite(item):  # TensorBoard plots only finite values; metrics.jsonl has all
          summary.value.add(tag=tag, simple_value=item)
    # One event for the whole row: an event per value, as SummaryWriter writes them, takes ten times as long.
    self._boards[phase].add_summary(summary, row["step"], row["time"])


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
  """The rows of a `metrics.jsonl`, in order; NaN and infinities are restored as floats.

  A line that is not a complete row (a kill may leave one) is skipped, with a warning that names its number.
  """
  return [_decode_row(row) for _, row in _rows(pathlib.Path(path))]


def _rows(path: pathlib.Path) -> list[tuple[str, dict[str, Any]]]:
  """(line, row as written) of every complete row."""
  rows = []
  with open(path, encoding="utf-8", errors="replace") as file:
    for number, line in enumerate(file, start=1):
      try:
        row = json.loads(line)
        complete = isinstance(row["phase"], str) and isinstance(row["step"], int) and line.endswith("\n")
      except (ValueError, TypeError, KeyError):
        complete = False
      if complete:
        rows.append((line.rstrip("\n"), row))
      else:
        _log.warning("%s, line %d: not a complete row of metrics, skipped", path, number)
  return rows


def _plain(name: str, value: Any) -> Any:
  array = np.asarray(value)
  if array.ndim > 1 or not (np.issubdtype(array.dtype, np.number) or array.dtype in (bool, jax.numpy.bfloat16)):
    raise ValueError(f"metric {name} is {array.dtype}{list(array.shape)}; want a number or a vector of numbers.")
  if array.dtype == jax.numpy.bfloat16:
    array = array.astype(np.float32)
  return array.tolist()


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


def _decode_row(row: Mapping[str, Any]) -> dict[str, Any]:
  return {name: value if name in _HEAD else _decode(value) for name, value in row.items()}
