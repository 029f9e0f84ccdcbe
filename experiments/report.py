"""What a run leaves behind for people: sampled answers, the summary, and `report.html` with its pictures.

    python -m experiments.report --workdir=runs/countdown_tiny

makes the report of a workdir anew, or that of a run that is still going.
"""

import base64
import json
import math
import platform
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jinja2
import ml_collections
import numpy as np
from absl import app, flags, logging

from experiments.config import EvaluationConfig, ExperimentConfig
from experiments.reporting import plots
from experiments.reporting.progress import Progress
from experiments.setup.config_flags import read_config
from models.policy import build_policy
from rspo_jax.data.examples import Example
from rspo_jax.evaluation.completion_log import Completions
from rspo_jax.run.metrics import METRICS, read_metrics
from rspo_jax.run.workdir import write_text_atomic

_SHOWN_PROBLEMS = 12
_SHOWN_CHARACTERS = 600  # of one prompt or answer
_MEASURES = (
  # key, its metric, how it is called
  ("success", "eval/success", "success"),
  ("greedy_success", "eval/greedy_success", "greedy success"),
  ("format", "eval/format", "answers in the asked form"),
)


def write_answers(path: Path, benchmarks: Iterable[tuple[Sequence[Example], Completions]]) -> None:
  """Writes one JSON line per evaluated problem: prompt, answers, success, reward (k of each). Process 0 only.

  Args:
    benchmarks: problems and their completions. The evaluated problems come first; those beyond them are ignored.
  """
  if jax.process_index() != 0:
    return
  lines = []
  for examples, completions in benchmarks:
    k, scores = completions.samples, completions.scores
    for number, example in enumerate(examples[: len(completions.texts) // k]):
      rows = slice(number * k, (number + 1) * k)
      line = {
        "prompt": example.prompt,
        "answers": list(completions.texts[rows]),
        "success": scores.success[rows].tolist(),
        "reward": [round(reward, 6) for reward in scores.reward[rows].tolist()],
      }
      lines.append(json.dumps(line, allow_nan=False) + "\n")
  write_text_atomic(Path(path), "".join(lines))


def summarize(
  workdir: Path, config: ExperimentConfig, seconds: Mapping[str, float], held_out_problems: int
) -> dict[str, Any]:
  """The run in numbers, from what it wrote to the workdir; every number is finite, None where there is none.

  Args:
    seconds: wall time per phase, over all starts of the run. held_out_problems: size of the held-out split.
  Returns:
    JSON-able. `before` is the evaluation at RL step 0, `after` the newest one of a later step.
  """
  rows = _read_rows(workdir)
  evaluations = [row for row in rows if row["phase"] == "rl" and "eval/success" in row]
  first = next((row for row in evaluations if row["step"] == 0), None)
  last = next((row for row in reversed(evaluations) if row["step"] > 0), None)
  before = _evaluation(first, _read_answers(workdir, "before"))
  after = _evaluation(last, _read_answers(workdir, "after"))
  done = {phase: max((r["step"] for r in rows if r["phase"] == phase), default=0) for phase in ("warm_start", "rl")}
  prompts = {answer["prompt"] for which in ("before", "after") for answer in _read_answers(workdir, which)}
  wanted = min(config.evaluation.problems or held_out_problems, held_out_problems)
  devices = jax.devices()
  return {
    "objective": _objective_name(config),
    "data": config.data.name,
    "seed": config.seed,
    "before": before,
    "after": after,
    "gain": _gain(before, after),
    "held_out": {
      "distinct_problems": len(prompts) or wanted,
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
      "of": config.rl.steps,
      "prompts": config.rl.prompts,
      "samples_per_prompt": config.rl.samples_per_prompt,
    },
    "updates_skipped": _finite(next((r["updates/skipped"] for r in reversed(rows) if "updates/skipped" in r), None)),
    "parameters": _parameter_count(config),
    "seconds": {phase: round(float(s), 1) for phase, s in seconds.items()}
    | {"total": round(float(sum(seconds.values())), 1)},
    "device": {"platform": devices[0].platform, "kind": devices[0].device_kind, "count": len(devices)},
    "versions": {"rspo_jax": metadata.version("rspo_jax"), "jax": jax.__version__, "python": platform.python_version()},
  }


def print_summary(progress: Progress, summary: Mapping[str, Any], workdir: Path) -> None:
  """Prints the before/after table and where the report is."""
  held_out = summary["held_out"]
  progress.table(
    f"{summary['objective']}: {held_out['distinct_problems']} held-out problems, {held_out['samples_per_problem']} "
    "samples each",
    ("", "before RL", "after RL", "change"),
    [(row["name"], row["before"], row["after"], row["change"]) for row in _before_after(summary)],
  )
  if note := _warm_start_note(summary["warm_start"]):
    progress.print(note)
  progress.print(f"{summary['seconds']['total']:.0f} s in all. Report: {Path(workdir) / 'report.html'}")


def write_report(workdir: Path, summary: Mapping[str, Any]) -> None:
  """Writes `plots/*.png` and `report.html`, one file that needs nothing else. Process 0 only."""
  if jax.process_index() != 0:
    return
  workdir = Path(workdir)
  drawn = plots.draw(_read_rows(workdir))
  (workdir / "plots").mkdir(exist_ok=True)
  for name, picture in drawn.items():
    (workdir / "plots" / f"{name}.png").write_bytes(picture)
  environment = jinja2.Environment(
    loader=jinja2.PackageLoader("experiments", "reporting"), autoescape=True, undefined=jinja2.StrictUndefined,
    trim_blocks=True, lstrip_blocks=True,
  )  # fmt: skip
  html = environment.get_template("report.html.jinja").render(
    summary=summary,
    temperature=summary["held_out"].get("temperature", 1.0),
    table=_before_after(summary),
    warm_start_note=_warm_start_note(summary["warm_start"]),
    panels=[(panel, base64.b64encode(drawn[panel.name]).decode()) for panel in plots.PANELS if panel.name in drawn],
    absent=[panel.title for panel in plots.PANELS if panel.name not in drawn],
    answers=_shown_answers(workdir),
    config=_config_text(workdir),
    glossary=METRICS,
  )
  write_text_atomic(workdir / "report.html", html)


def _read_rows(workdir: Path) -> list[dict[str, Any]]:
  path = Path(workdir) / "metrics.jsonl"
  return read_metrics(path) if path.exists() else []


def _read_answers(workdir: Path, which: str) -> list[dict[str, Any]]:
  path = Path(workdir) / f"answers_{which}.jsonl"
  return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def _finite(value: Any) -> float | None:
  return value if value is not None and math.isfinite(value) else None


def _samples(evaluation: EvaluationConfig) -> int | str:
  """How many completions a problem gets; "8-64" where benchmarks differ."""
  found = {evaluation.of(benchmark).samples for benchmark in evaluation.benchmarks.values()} or {evaluation.samples}
  return min(found) if len(found) == 1 else f"{min(found)}-{max(found)}"


def _temperature(config: ExperimentConfig) -> float | None:
  """Of the sampled completions; None where benchmarks differ."""
  evaluation = config.evaluation
  settings = [evaluation.of(benchmark) for benchmark in evaluation.benchmarks.values()] or [evaluation]
  found = {config.sampling.temperature if s.temperature is None else s.temperature for s in settings}
  return found.pop() if len(found) == 1 else None


def _gain(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> float | None:
  known = before and after and before["success"] is not None and after["success"] is not None
  return after["success"] - before["success"] if known else None


def _evaluation(row: Mapping[str, Any] | None, answers: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
  """The evaluation of a row, with the standard error of its success over problems where the answers are its own."""
  if row is None:
    return None
  found = {"step": row["step"]} | {key: _finite(row.get(metric)) for key, metric, _ in _MEASURES}
  per_problem = [float(np.mean(answer["success"])) for answer in answers]
  matches = per_problem and found["success"] is not None and abs(np.mean(per_problem) - found["success"]) < 1e-6
  error = float(np.std(per_problem, ddof=1)) / math.sqrt(len(per_problem)) if matches and len(per_problem) > 1 else None
  benchmarks = {name[1]: _finite(row[key]) for key in row if (name := re.fullmatch("eval/(.+)/avg", key))}
  return found | {"success_standard_error": error} | ({"benchmarks": benchmarks} if benchmarks else {})


def _objective_name(config: ExperimentConfig) -> str:
  name = config.objective.name
  if not config.router.shift:
    return name.upper()
  return "RSPO (GMPO + router shift)" if name == "gmpo" else f"{name.upper()} + router shift"


def _parameter_count(config: ExperimentConfig) -> int:
  shapes = jax.eval_shape(build_policy(config.model).init, jax.random.key(0))
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def _before_after(summary: Mapping[str, Any]) -> list[dict[str, str]]:
  """Rows of the before/after table: name, before, after, change, as text."""
  before, after = summary["before"] or {}, summary["after"] or {}
  temperature = summary["held_out"].get("temperature", 1.0)

  def row(name, old, new):
    old_text, new_text = ("-" if value is None else f"{value:.3f}" for value in (old, new))
    return {"name": name, "before": old_text, "after": new_text, "change": _change(old, new)}

  rows = [row(name, before.get(key), after.get(key)) for key, _, name in _MEASURES]
  if temperature is not None:
    rows[0]["name"] += f" at T={temperature:g}"
  old, new = (side.get("benchmarks", {}) for side in (before, after))
  return rows + [row(f"success on {name}", old.get(name), new.get(name)) for name in {**old, **new}]


def _change(before: float | None, after: float | None) -> str:
  if before is None or after is None:
    return "-"
  return f"{after - before:+.3f}" + (f" ({after / before:.1f}x)" if before > 0 else "")


def _warm_start_note(warm_start: Mapping[str, Any]) -> str:
  if not warm_start["of"]:
    return ""
  note = f"'Before' is the policy after {warm_start['steps']} supervised steps on generated demonstrations."
  if not warm_start["wrong_fraction"]:
    return note
  return (
    f"{note} With probability {warm_start['wrong_fraction']:.0%} a demonstration was deliberately wrong (well-formed, "
    "wrong result), so that RL has something to repair."
  )


def _shown_answers(workdir: Path) -> list[dict[str, Any]]:
  """The first problems, with their answers before and after; equal answers are drawn together."""
  sides = {which: _read_answers(workdir, which)[:_SHOWN_PROBLEMS] for which in ("before", "after")}
  count = max(len(side) for side in sides.values())
  shown = []
  for number in range(count):
    row = {which: _grouped(side[number]) if number < len(side) else None for which, side in sides.items()}
    source = next(side[number] for side in sides.values() if number < len(side))
    shown.append(row | {"prompt": _cut(source["prompt"])})
  return shown


def _grouped(line: Mapping[str, Any]) -> dict[str, Any]:
  counts = Counter(zip(line["answers"], line["success"], line["reward"], strict=True))
  return {
    "right": sum(line["success"]),
    "of": len(line["answers"]),
    "answers": [
      {"text": _cut(text), "right": right, "reward": reward, "times": times}
      for (text, right, reward), times in counts.items()
    ],
  }


def _cut(text: str) -> str:
  return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + " …"


def _config_text(workdir: Path) -> str:
  path = workdir / "config.json"
  return path.read_text(encoding="utf-8") if path.exists() else ""


def _rebuild(argv: Sequence[str]) -> None:
  del argv
  workdir = Path(flags.FLAGS.workdir)
  if (workdir / "summary.json").exists():
    summary = json.loads((workdir / "summary.json").read_text(encoding="utf-8"))
  elif (workdir / "config.json").exists():
    config = read_config(ml_collections.ConfigDict(json.loads(_config_text(workdir))))
    seconds = Counter()
    for row in _read_rows(workdir):
      seconds[row["phase"]] += row.get("seconds/step", 0.0)
    # The devices of this process say nothing about those of the run.
    summary = summarize(workdir, config, seconds, len(_read_answers(workdir, "before"))) | {"device": None}
  else:
    raise app.UsageError(f"{workdir} has neither summary.json nor config.json; want the workdir of a run.")
  write_report(workdir, summary)
  print(workdir / "report.html")


if __name__ == "__main__":
  flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
  logging.set_verbosity(logging.WARNING)
  app.run(_rebuild)
