"""The documented metric names, and the files they are written to.

A run writes `metrics.jsonl`, one JSON object a line: phase, step, time (seconds since 1970), then metrics by
name. It is the record: after a restart it goes on as if never interrupted. TensorBoard events are made from
it, one TensorBoard run per phase.
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
  "reward/format": "Share of the sampled completions in the form the reward asks for, 0 to 1.",
  "groups/zero_variance": "Share of the groups in which every completion got the same reward, 0 to 1.",
  "policy/entropy": "Mean entropy of the next token over the completions, temperature 1, nats.",
  "policy/log_prob": "Mean log-probability of the completion tokens at temperature 1, nats.",
  "groups/sampled": "Groups judged for this step over groups trained on; above 1 under dynamic sampling.",
  "groups/carried": "Share of the groups of a step that began in an earlier one, 0 to 1.",
  "staleness/mean": "RL steps between drawing a token and training on it, mean over tokens.",
  "staleness/max": "RL steps between drawing a token and training on it, largest.",
  "reward/overlong": "Mean overlong penalty in the reward, <= 0.",
  "curriculum/unseen": "Share of the training problems that were never sampled, 0 to 1.",
  "curriculum/below": "Share of the training problems solved too rarely for the curriculum's band, 0 to 1.",
  "curriculum/in_band": "Share of the training problems whose success rate is in the band, 0 to 1.",
  "curriculum/above": "Share of the training problems solved too often for the band, 0 to 1.",
  "curriculum/skipped": "Problems passed over for the last batch.",
  "curriculum/retried": "Problems of the last batch that were outside the band and are tried again after a while.",
  "curriculum/filled": "Problems of the last batch that are outside the band, for want of others.",
  "length/mean": "Mean length of the completions, tokens.",
  "length/max": "Longest completion, tokens.",
  "length/truncated": "Share of the completions cut off at the length limit, 0 to 1.",
  "ratio/p1": "1st percentile of the token importance ratio (new over old policy).",
  "ratio/p50": "Median of the token importance ratio.",
  "ratio/p99": "99th percentile of the token importance ratio.",
  "ratio/max": "Largest token importance ratio.",
  "ratio/tail": "Share of the tokens whose importance ratio is above 2 or below 1/2, 0 to 1.",
  "ratio/chi_square": "Chi-square divergence of the new from the old policy: mean of (ratio - 1)^2 over tokens.",
  "ratio/ess": "Effective sample size of the token importance ratios, as a share of the tokens, 0 to 1.",
  "clip/low": "Share of the tokens whose term is held at the lower bound, 0 to 1.",
  "clip/high": "Share of the tokens whose term is held at the upper bound, 0 to 1.",
  "clip/effective": "Share of the tokens that lost their gradient to a bound, 0 to 1.",
  "kl/approx": "KL from the old to the new policy, k3 estimate, mean over tokens, nats.",
  "kl/reference": "KL from the policy to the reference, the estimator of the config, mean over tokens, nats.",
  "mismatch/weight_mean": "Mean weight that corrects for a sampler that is not the trainer.",
  "mismatch/dropped": "Share of the tokens whose correction weight is 0, 0 to 1.",
  "shift/gamma_mean": "Mean router-shift weight gamma over tokens, after the floor, in (0, 1].",
  "shift/gamma_p10": "10th percentile of gamma, after the floor.",
  "shift/gamma_p50": "Median of gamma, after the floor.",
  "shift/floor_fraction": "Share of the tokens whose gamma sits at the floor, 0 to 1.",
  "shift/drift": "Mean router drift over tokens, in the unit of the deviation (nats for the paper's).",
  "shift/layer_drift": "Router drift of each mixture-of-experts layer, first to last, in the unit of the deviation.",
  "shift/ratio_correlation": "Correlation over tokens of router drift with |log importance ratio|, -1 to 1.",
  "shift/floor": "The floor of gamma in force (it may follow a schedule), in (0, 1].",
  "router/overlap": "Mean share of the old top-k experts that are in the new top-k, 0 to 1.",
  "router/layer_overlap": "The same share in each mixture-of-experts layer, first to last.",
  "router/entropy": "Mean entropy of the router over tokens and layers, nats.",
  "router/layer_entropy": "Router entropy of each mixture-of-experts layer, first to last, nats.",
  "router/load_max_over_mean": "Tokens of the busiest expert over the mean, averaged over layers; 1 is even.",
  "router/dead_fraction": "Share of the experts that got no token, over all layers, 0 to 1.",
  "loss/objective": "What is being maximised: the policy objective with its entropy, KL and balance terms.",
  "loss/load_balance": "Auxiliary load-balance loss before its coefficient; experts_per_token is even.",
  "loss/router_z": "Router z-loss before its coefficient, nats^2.",
  "loss/warm_start": "Supervised cross-entropy of the warm start, mean over target tokens, nats.",
  "grad/norm": "Global norm of the gradient before clipping.",
  "noise/router": "Gradient noise over signal of the routers: variance of a minibatch's gradient / its squared norm.",
  "noise/experts": "The same ratio for the experts.",
  "noise/attention": "The same ratio for attention.",
  "noise/embedding": "The same ratio for the embedding and the output matrix.",
  "noise/rest": "The same ratio for all other parameters (norms, dense layers).",
  "noise/all": "The same ratio for all parameters together.",
  "replay/log_ratio_square": "Mean squared log importance ratio after the step's updates, nats^2.",
  "replay/experts_share": "Share of it that pinning the old experts takes away: what routing explains (may be < 0).",
  "replay/gates_share": "Share of it that goes away when the old experts and their old gates are pinned.",
  "updates/skipped": "Updates skipped so far because the gradient was not finite (cumulative).",
  "optimizer/learning_rate": "Learning rate of the last update.",
  "speed/sample_tokens_per_second": "Completion tokens sampled per second.",
  "speed/score_tokens_per_second": "Tokens scored per second.",
  "speed/train_tokens_per_second": "Tokens trained on per second.",
  "seconds/sample": "Wall time of sampling in this step, seconds.",
  "seconds/reward": "Wall time of the rewards in this step, seconds.",
  "seconds/score": "Wall time of scoring in this step, seconds.",
  "seconds/train": "Wall time of the updates in this step, seconds.",
  "seconds/diagnostics": "Wall time of the costly diagnostics in this step, seconds.",
  "seconds/step": "Wall time of the whole step, seconds.",
  "eval/success": "Held-out success of sampled completions (avg@k), 0 to 1; unweighted mean of benchmarks.",
  "eval/greedy_success": "Held-out success of the greedy completion, 0 to 1.",
  "eval/format": "Share of the sampled held-out completions in the asked form, 0 to 1.",
  "memory/peak_bytes": "Largest device memory in use so far, the fullest local device, bytes; where known.",
}

# Names with a part that the config gives.
PATTERNS: dict[str, str] = {
  "eval/<benchmark>/avg": "Success of sampled completions of a benchmark, mean over problems and samples, 0 to 1.",
  "eval/<benchmark>/greedy": "Success of the greedy completions of a benchmark, 0 to 1.",
  "reward/reason/<reason>": "Share of the completions that the reward gave this reason for, 0 to 1.",
}

TIMING_PREFIXES = ("seconds/", "speed/", "memory/")
_HEAD = ("phase", "step", "time")
_PATTERN = re.compile("|".join(re.sub("<.*?>", r"[\\w-]+", pattern) for pattern in PATTERNS))


def is_known(name: str) -> bool:
  """Whether a metric is one of `METRICS` or fits one of `PATTERNS`."""
  return name in METRICS or _PATTERN.fullmatch(name) is not None


def deterministic(row: Mapping[str, Any]) -> dict[str, Any]:
  """The row without `time` and the `TIMING_PREFIXES`, which a clock or the machine decides.

  Two runs of one command on one machine agree on the rest to the last bit.
  """
  return {k: v for k, v in row.items() if k != "time" and not k.startswith(TIMING_PREFIXES)}


class MetricsWriter:
  """Appends to `workdir/metrics.jsonl` and to TensorBoard events in `workdir/tensorboard/<phase>`.

  Only process 0 writes; the folder of the run must exist. A context manager; else `close` it.
  """

  def __init__(self, workdir: str | os.PathLike):
    self._path = pathlib.Path(workdir) / "metrics.jsonl"
    self._events = pathlib.Path(workdir) / "tensorboard"
    self._writes = jax.process_index() == 0
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
      step: step within that phase. Rows come in the order of the run; a step may have several.
      values: names of `METRICS` or as in `PATTERNS` -> scalar or vector: numbers, numpy or jax arrays (fetched in one
        transfer).
    Returns:
      The same values as plain floats, ints and lists, in every process.
    Raises:
      ValueError: a name that is in neither of them, or a value that is no number.
    """
    unknown = sorted(name for name in values if not is_known(name))
    if unknown:
      raise ValueError(
        f"unknown metric {', '.join(unknown)}; want names of rspo_jax.run.metrics.METRICS (add a new one there)."
      )
    plain = {name: _plain(name, value) for name, value in jax.device_get(dict(values)).items()}
    if self._writes:
      row = {"phase": phase, "step": int(step), "time": time.time()} | plain
      if self._file is None:
        self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115
      self._file.write(json.dumps({k: _encode(v) for k, v in row.items()}, allow_nan=False) + "\n")
      self._file.flush()
      self._write_events(row)
    return plain

  def truncate(self, phase: str, step: int) -> None:
    """Goes back to where a checkpoint was: drops what was written after `step` of `phase`.

    Call it before the first `write` with what was restored, or with ("", 0) when nothing was. Rows of phases
    that began before `phase` stay, rows of phases that began after it go, and so does a line cut in half by a
    kill. The TensorBoard events are written anew from the rows that stay.
    """
    self.close()
    if not self._writes:
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
        if math.isfinite(item):  # TensorBoard draws no others; metrics.jsonl has them
          summary.value.add(tag=tag, simple_value=item)
    # One event for the row: an event for each value, as SummaryWriter makes them, takes ten times as long.
    self._boards[phase].add_summary(summary, row["step"], row["time"])


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
  """The rows of a `metrics.jsonl`, in order; NaN and infinities come back as floats.

  A line that is no whole row (cut in half by a kill) is skipped, with a warning that names its number.
  """
  return [_decode_row(row) for _, row in _rows(pathlib.Path(path))]


def _rows(path: pathlib.Path) -> list[tuple[str, dict[str, Any]]]:
  """(line, row as written) of every whole row."""
  out = []
  with open(path, encoding="utf-8", errors="replace") as file:
    for number, line in enumerate(file, start=1):
      try:
        row = json.loads(line)
        whole = isinstance(row["phase"], str) and isinstance(row["step"], int) and line.endswith("\n")
      except (ValueError, TypeError, KeyError):
        whole = False
      if whole:
        out.append((line.rstrip("\n"), row))
      else:
        _log.warning("%s, line %d: not a whole row of metrics, skipped", path, number)
  return out


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
