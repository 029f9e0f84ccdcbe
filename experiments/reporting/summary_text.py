"""The summary of a run as text: the table of the evaluation before and after RL, and its notes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.reporting.progress import Progress

_LABEL_OF = {"success": "success", "greedy_success": "greedy success", "format": "answers in the asked form"}


def print_summary(progress: Progress, summary: Mapping[str, Any], workdir: Path) -> None:
  """Prints the table of the evaluation before and after RL, and the path of the report."""
  held_out = summary["held_out"]
  progress.table(
    f"{summary['objective']}: {held_out['distinct_problems']} held-out problems, {held_out['samples_per_problem']} "
    "samples each",
    ("", "before RL", "after RL", "change"),
    [(row["name"], row["before"], row["after"], row["change"]) for row in before_after_rows(summary)],
  )
  if note := warm_start_note(summary["warm_start"]):
    progress.print(note)
  progress.print(f"{summary['seconds']['total']:.0f} s in all. Report: {Path(workdir) / 'report.html'}")


def before_after_rows(summary: Mapping[str, Any]) -> list[dict[str, str]]:
  """The rows of the before/after table as text, with the keys name, before, after, change."""
  before, after = summary["before"] or {}, summary["after"] or {}
  temperature = sampling_temperature(summary)

  def row(name: str, old: float | None, new: float | None) -> dict[str, str]:
    old_text, new_text = ("-" if value is None else f"{value:.3f}" for value in (old, new))
    return {"name": name, "before": old_text, "after": new_text, "change": _change(old, new)}

  rows = [row(label, before.get(key), after.get(key)) for key, label in _LABEL_OF.items()]
  if temperature is not None:
    rows[0]["name"] += f" at T={temperature:g}"
  old, new = (side.get("benchmarks", {}) for side in (before, after))
  return rows + [row(f"success on {name}", old.get(name), new.get(name)) for name in {**old, **new}]


def sampling_temperature(summary: Mapping[str, Any]) -> float | None:
  """Of the held-out completions; None if benchmarks differ. A summary written before it was recorded means 1."""
  return summary["held_out"].get("temperature", 1.0)


def warm_start_note(warm_start: Mapping[str, Any]) -> str:
  """What the policy before RL was trained on; '' without a warm start. warm_start: as in the summary."""
  if not warm_start["of"]:
    return ""
  note = f"'Before' is the policy after {warm_start['steps']} supervised steps on generated demonstrations."
  if not warm_start["wrong_fraction"]:
    return note
  return (
    f"{note} With probability {warm_start['wrong_fraction']:.0%} a demonstration was deliberately wrong (well-formed, "
    "wrong result), so that RL has something to repair."
  )


def _change(before: float | None, after: float | None) -> str:
  if before is None or after is None:
    return "-"
  return f"{after - before:+.3f}" + (f" ({after / before:.1f}x)" if before > 0 else "")
