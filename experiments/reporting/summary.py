"""The summary of a run in numbers, `summary.json`, from the files in its workdir."""

import math
import platform
import re
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.config import EvaluationConfig, ExperimentConfig
from experiments.reporting.answers import SIDES, read_answers
from experiments.setup.build import make_policy
from rspo_jax.run.metrics import read_metrics

METRIC_OF = {"success": "eval/success", "greedy_success": "eval/greedy_success", "format": "eval/format"}


def summarize(
  workdir: Path, config: ExperimentConfig, seconds: Mapping[str, float], held_out_problems: int
) -> dict[str, Any]:
  """The summary of a run; every number is finite, and None if it was not measured.

  Args:
    seconds: wall time per phase, over all starts of the run. held_out_problems: size of the held-out split.
  Returns:
    JSON-able. `before` is the evaluation at RL step 0, `after` the newest one of a later step.
  """
  rows = read_rows(workdir)
  answers = {side: read_answers(workdir, side) for side in SIDES}
  evaluations = [row for row in rows if row["phase"] == "rl" and "eval/success" in row]
  first = next((row for row in evaluations if row["step"] == 0), None)
  last = next((row for row in reversed(evaluations) if row["step"] > 0), None)
  before, after = _evaluation(first, answers["before"]), _evaluation(last, answers["after"])
  done = {phase: max((r["step"] for r in rows if r["phase"] == phase), default=0) for phase in ("warm_start", "rl")}
  prompts = {line["prompt"] for side in SIDES for line in answers[side]}
  evaluated = min(config.evaluation.problems or held_out_problems, held_out_problems)
  skipped = next((row["updates/skipped"] for row in reversed(rows) if "updates/skipped" in row), None)
  devices = jax.devices()
  return {
    "objective": _objective_name(config),
    "data": config.data.name,
    "seed": config.seed,
    "before": before,
    "after": after,
    "gain": _gain(before, after),
    "held_out": {
      "distinct_problems": len(prompts) or evaluated,
      "samples_per_problem": _samples(config.evaluation),
      "temperature": _temperature(config),
      "in_data_set": held_out_problems,
    },
    "warm_start": {
      "steps": done["warm_start"],
      "of": config.warm_start.steps,
      "wrong_fraction": config.warm_start.wrong_fraction,
    },
    "rl": {
      "steps": done["rl"],
      "of": config.steps,
      "prompts": config.collector.prompts,
      "samples_per_prompt": config.sampling.samples_per_prompt,
    },
    "updates_skipped": _finite(skipped),
    "parameters": _parameter_count(config),
    "seconds": {phase: round(float(s), 1) for phase, s in seconds.items()}
    | {"total": round(float(sum(seconds.values())), 1)},
    "device": {"platform": devices[0].platform, "kind": devices[0].device_kind, "count": len(devices)},
    "versions": {"rspo_jax": metadata.version("rspo_jax"), "jax": jax.__version__, "python": platform.python_version()},
  }


def read_rows(workdir: Path) -> list[dict[str, Any]]:
  """The rows of the run's `metrics.jsonl`, [] if it is absent."""
  path = Path(workdir) / "metrics.jsonl"
  return read_metrics(path) if path.exists() else []


def _evaluation(row: Mapping[str, Any] | None, answers: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
  """The evaluation of a row of metrics.

  The standard error of its success over problems is computed from the answers, if their mean success is that of the
  row; otherwise the answers are those of another evaluation, and it is None.
  """
  if row is None:
    return None
  measures = {"step": row["step"]} | {key: _finite(row.get(metric)) for key, metric in METRIC_OF.items()}
  per_problem = [float(np.mean(answer["success"])) for answer in answers]
  success = measures["success"]
  matches = per_problem and success is not None and abs(np.mean(per_problem) - success) < 1e-6
  error = float(np.std(per_problem, ddof=1)) / math.sqrt(len(per_problem)) if matches and len(per_problem) > 1 else None
  benchmarks = {name[1]: _finite(row[key]) for key in row if (name := re.fullmatch("eval/(.+)/avg", key))}
  return measures | {"success_standard_error": error} | ({"benchmarks": benchmarks} if benchmarks else {})


def _gain(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> float | None:
  known = before and after and before["success"] is not None and after["success"] is not None
  return after["success"] - before["success"] if known else None


def _finite(value: Any) -> float | None:
  return value if value is not None and math.isfinite(value) else None


def _samples(evaluation: EvaluationConfig) -> int | str:
  """Number of completions per problem; "8-64" if benchmarks differ."""
  samples = {evaluation.of(benchmark).samples for benchmark in evaluation.benchmarks.values()} or {evaluation.samples}
  return min(samples) if len(samples) == 1 else f"{min(samples)}-{max(samples)}"


def _temperature(config: ExperimentConfig) -> float | None:
  """Temperature of the sampled completions; None if benchmarks differ."""
  evaluation = config.evaluation
  settings = [evaluation.of(benchmark) for benchmark in evaluation.benchmarks.values()] or [evaluation]
  temperatures = {config.sampling.temperature if s.temperature is None else s.temperature for s in settings}
  return temperatures.pop() if len(temperatures) == 1 else None


def _objective_name(config: ExperimentConfig) -> str:
  name = config.objective.name
  if config.shift is None:
    return name.upper()
  return "RSPO (GMPO + router shift)" if name == "gmpo" else f"{name.upper()} + router shift"


def _parameter_count(config: ExperimentConfig) -> int:
  shapes = jax.eval_shape(make_policy(config).init, jax.random.key(0))
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
