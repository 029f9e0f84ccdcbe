"""The numbers and tables of an evaluation, and of a comparison of two. docs/evaluation.md defines the numbers."""

import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rspo_jax.evaluation import estimators
from rspo_jax.evaluation.completion_log import Completions

Estimates = dict[str, np.ndarray]  # measure, such as "avg" or "pass@8" -> a number for each problem, [N]
Table = tuple[list[str], list[list[str]]]  # column heads, and rows of as many cells


def estimates(sampled: Completions, greedy: Completions | None, ks: Sequence[int] = ()) -> Estimates:
  """The measures of a benchmark for each problem.

  Args:
    sampled: n completions of every problem. greedy: one of every problem, or None.
    ks: the k of pass@k and maj@k; () means the powers of two up to n, and n.
  """
  success, answers = sampled.success_by_problem, sampled.answers_by_problem
  ks = tuple(ks) or estimators.powers_of_two(sampled.samples)
  measures = {"avg": estimators.avg_at_k(success)}
  if greedy is not None:
    measures["greedy"] = estimators.avg_at_k(greedy.success_by_problem)
  measures |= {f"pass@{k}": estimators.pass_at_k(success, k) for k in ks}
  if any(map(any, answers)):  # maj@k is undefined for a reward that extracts no answers
    measures |= {f"maj@{k}": estimators.maj_at_k(answers, success, k) for k in ks}
  return measures


def summarize(
  benchmarks: Mapping[str, tuple[str, Estimates]], *, level: float, resamples: int, seed: int
) -> dict[str, dict[str, Any]]:
  """Means with bootstrap intervals, of benchmarks and of the groups they are averaged in.

  A group has the measures that all its benchmarks have; a group of one benchmark is left out. The same resamples serve
  benchmarks and groups: the problems of each benchmark are resampled independently.

  Args:
    benchmarks: name -> (group, its measures, or differences of them).
    level, resamples: of the percentile bootstrap over problems. seed: of its random numbers.
  Returns:
    {"benchmarks": {name: {measure: {"value", "low", "high"}}}, "groups": {group: likewise, and "of": its benchmarks}};
    low and high are None if a benchmark has a single problem.
  """
  members: dict[str, list[str]] = {}
  for name, (group, _) in benchmarks.items():
    members.setdefault(group, []).append(name)
  replicates = {
    name: {
      measure: estimators.bootstrap(values, resamples=resamples, seed=(seed, zlib.crc32(name.encode())))
      for measure, values in measures.items()
      if len(values) > 1
    }
    for name, (_, measures) in benchmarks.items()
  }

  def entry(value: float, replicate: np.ndarray | None) -> dict[str, float | None]:
    low, high = (None, None) if replicate is None else estimators.interval(replicate, level)
    return {"value": float(value), "low": low, "high": high}

  def group_entry(measure: str, names: Sequence[str]) -> dict[str, float | None]:
    values = [benchmarks[name][1][measure].mean() for name in names]
    resampled = [replicates[name].get(measure) for name in names]
    complete = all(replicate is not None for replicate in resampled)
    return entry(estimators.macro_average(values), estimators.macro_average(resampled) if complete else None)

  return {
    "benchmarks": {
      name: {measure: entry(values.mean(), replicates[name].get(measure)) for measure, values in measures.items()}
      for name, (_, measures) in benchmarks.items()
    },
    "groups": {
      group: {"of": names}
      | {
        measure: group_entry(measure, names)
        for measure in benchmarks[names[0]][1]
        if all(measure in benchmarks[name][1] for name in names)
      }
      for group, names in members.items()
      if len(names) > 1
    },
  }


def describe(sampled: Completions, greedy: Completions | None) -> dict[str, Any]:
  """Counts and shares of a benchmark's completions, for `results.json`."""
  scores = sampled.scores
  of_greedy = {} if greedy is None else {"greedy_finished": float(greedy.finished.mean())}
  return {
    "problems": len(sampled.texts) // sampled.samples,
    "samples": sampled.samples,
    "format": float(scores.format.mean()),
    "finished": float(sampled.finished.mean()),
    **of_greedy,
    "tokens": float(sampled.tokens.mean()),
    "why": dict(Counter(scores.reason).most_common()),
  }


def group_name(group: str, summary: Mapping[str, Any]) -> str:
  """The label of a group's average in tables and figures."""
  return f"{group}, mean of {len(summary['of'])}"


def measures_by_name(results: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
  """Label of a benchmark or group -> its measures; groups come last. results: `results.json`."""
  measures = {name: benchmark["measures"] for name, benchmark in results["benchmarks"].items()}
  return measures | {group_name(name, group): group for name, group in results["groups"].items()}


def table_rows(results: Mapping[str, Any]) -> Table:
  """The main table of an evaluation, in percent; averages of groups come last.

  The columns pass@n and maj@n show the largest k that was estimated; if it is not n, the cell names it.
  """
  kinds = ("avg", "greedy", "pass", "maj")
  rows = []
  for name, benchmark in results["benchmarks"].items():
    cells = {kind: _cell(benchmark["measures"], kind, benchmark["samples"]) for kind in kinds}
    lengths = f"{100 * benchmark['finished']:.0f}", f"{benchmark['tokens']:.0f}"
    rows.append((name, f"{benchmark['problems']}", f"{benchmark['samples']}", cells, lengths))
  for name, group in results["groups"].items():
    samples = {results["benchmarks"][member]["samples"] for member in group["of"]}
    n = samples.pop() if len(samples) == 1 else None
    rows.append((group_name(name, group), "", "", {kind: _cell(group, kind, n) for kind in kinds}, ("", "")))
  shown = [kind for kind in kinds if any(cells[kind] != "-" for *_, cells, _ in rows)]
  heads = ["", "problems", "n", *("greedy" if kind == "greedy" else f"{kind}@n" for kind in shown), "ended", "tokens"]
  return heads, [[*head, *(cells[kind] for kind in shown), *lengths] for *head, cells, lengths in rows]


def curve_rows(results: Mapping[str, Any], kind: str) -> Table:
  """The table of pass@k or maj@k for every k, in percent; kind: "pass" or "maj"."""
  by_name = measures_by_name(results)
  ks = sorted(
    {k_of(measure) for measures in by_name.values() for measure in measures if measure.startswith(f"{kind}@")}
  )
  rows = []
  for name, measures in by_name.items():
    cells = [f"{100 * measures[f'{kind}@{k}']['value']:.1f}" if f"{kind}@{k}" in measures else "-" for k in ks]
    if any(cell != "-" for cell in cells):
      rows.append([name, *cells])
  return [f"{kind}@", *map(str, ks)], rows


def comparison_rows(comparison: Mapping[str, Any]) -> Table:
  """The table of a comparison (`experiments.compare`), in percent and percentage points."""

  def cells(old: float, new: float, difference: Mapping[str, Any]) -> list[str]:
    greedy = percent(difference["greedy"], signed=True) if "greedy" in difference else "-"
    return [f"{100 * old:.1f}", f"{100 * new:.1f}", percent(difference["avg"], signed=True), greedy]

  rows = []
  for name, benchmark in comparison["benchmarks"].items():
    left_out = f" ({benchmark['left_out']} left out)" if benchmark["left_out"] else ""
    averages = benchmark["old"]["avg"], benchmark["new"]["avg"]
    rows.append([name, f"{benchmark['problems']}{left_out}", *cells(*averages, benchmark["difference"])])
  for name, group in comparison["groups"].items():
    rows.append([group_name(name, group), "", *cells(group["old"], group["new"], group)])
  return ["", "problems", "avg@n before", "after", "change", "change of greedy"], rows


def comparison_notes(comparison: Mapping[str, Any]) -> list[str]:
  """The explanations below the table of a comparison, one sentence each."""
  level = f"{comparison['level']:.0%}"
  notes = [f"Percent and percentage points; {level} intervals, paired bootstrap over the same problems."]
  if comparison["not_compared"]:
    notes.append(f"Not compared, because no problem is in both: {', '.join(comparison['not_compared'])}.")
  return notes


def k_of(measure: str) -> int:
  """8 for "pass@8"."""
  return int(measure.partition("@")[2])


def _cell(measures: Mapping[str, Any], kind: str, n: int | None = None) -> str:
  if kind in measures:
    return percent(measures[kind])
  k = max((k_of(measure) for measure in measures if measure.startswith(f"{kind}@")), default=None)
  if k is None:
    return "-"
  return percent(measures[f"{kind}@{k}"]) + ("" if k == n else f" @{k}")


def percent(entry: Mapping[str, float | None], *, signed: bool = False) -> str:
  """A value and its interval in percent, "76.4 (71.0 to 81.3)"; with `signed`, all with their sign."""
  form = "+.1f" if signed else ".1f"
  low, high = entry["low"], entry["high"]
  spread = "" if low is None else f" ({100 * low:{form}} to {100 * high:{form}})"
  return f"{100 * entry['value']:{form}}{spread}"


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """A table in Markdown; all columns but the first are aligned right."""
  lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
  return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def section(title: str, table: Table, notes: Sequence[str]) -> str:
  """A Markdown section: a title, a table, and a paragraph for each note."""
  return f"# {title}\n\n{markdown(*table)}\n" + "\n\n".join(notes) + "\n"


def write_up(results: Mapping[str, Any]) -> str:
  """The text of `results.md`, from `results.json`."""
  checkpoint, bootstrap = results["checkpoint"], results["bootstrap"]
  step = "" if checkpoint["step"] is None else f", step {checkpoint['step']}"
  parts = [section(f"{checkpoint['folder']}{step}", table_rows(results), [note(results)])]
  for kind, meaning in (
    ("pass", "At least one of k completions is correct (unbiased)"),
    ("maj", "The most frequent answer of k completions is correct"),
  ):
    heads, rows = curve_rows(results, kind)
    if rows:
      parts += [f"\n{meaning}, percent:\n\n", markdown(heads, rows)]
  level, resamples = f"{bootstrap['level']:.0%}", f"{bootstrap['resamples']:,}"
  parts.append(f"\nIntervals: {level}, percentile bootstrap over problems, {resamples} resamples.\n")
  return "".join(parts)


def note(results: Mapping[str, Any]) -> str:
  """One line on how the completions of the table were sampled."""
  sampling = sorted({benchmark["sampling"] for benchmark in results["benchmarks"].values()})
  return f"Percent (interval). {'; '.join(sampling)}. ended: by a stop token, percent; tokens: mean length."
