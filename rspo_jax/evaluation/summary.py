"""An evaluation in numbers and tables, from its completions. docs/evaluation.md says what each number is."""

import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rspo_jax.evaluation import estimators
from rspo_jax.evaluation.completion_log import Completions

Estimates = dict[str, np.ndarray]  # measure, such as "avg" or "pass@8" -> a number for each problem, [N]


def estimates(sampled: Completions, greedy: Completions | None, ks: Sequence[int] = ()) -> Estimates:
  """The measures of a benchmark, problem by problem.

  Args:
    ks: of pass@k and maj@k; () is the powers of two up to the number of samples, and that number.
  """
  success, answers = sampled.success_by_problem, sampled.answers_by_problem
  ks = tuple(ks) or estimators.powers_of_two(sampled.samples)
  found = {"avg": estimators.avg_at_k(success)}
  if greedy is not None:
    found["greedy"] = estimators.avg_at_k(greedy.success_by_problem)
  found |= {f"pass@{k}": estimators.pass_at_k(success, k) for k in ks}
  if any(map(any, answers)):  # a reward that gives no answers has no majorities either
    found |= {f"maj@{k}": estimators.maj_at_k(answers, success, k) for k in ks}
  return found


def summarize(
  benchmarks: Mapping[str, tuple[str, Estimates]], *, level: float, resamples: int, seed: int
) -> dict[str, dict[str, Any]]:
  """Values with intervals of benchmarks and of the groups they are averaged in.

  A group has the measures that all its benchmarks have, and is there if it has more than one benchmark. Groups and
  benchmarks are resampled alike: the problems of every benchmark for themselves.

  Args:
    benchmarks: name -> (group, its measures, or differences of them).
    level, resamples: of the percentile bootstrap over problems. seed: of its draws.
  Returns:
    {"benchmarks": {name: {measure: {"value", "low", "high"}}}, "groups": {group: likewise, and "of": its benchmarks}};
    low and high are None where a benchmark has a single problem.
  """
  members: dict[str, list[str]] = {}
  for name, (group, _) in benchmarks.items():
    members.setdefault(group, []).append(name)
  replicates = {
    name: {
      measure: estimators.bootstrap(values, resamples=resamples, seed=(seed, zlib.crc32(name.encode())))
      for measure, values in found.items()
      if len(values) > 1
    }
    for name, (_, found) in benchmarks.items()
  }

  def entry(value: float, replicate: np.ndarray | None) -> dict[str, float | None]:
    low, high = (None, None) if replicate is None else estimators.interval(replicate, level)
    return {"value": float(value), "low": low, "high": high}

  def group_entry(measure: str, names: Sequence[str]) -> dict[str, float | None]:
    values = [benchmarks[name][1][measure].mean() for name in names]
    drawn = [replicates[name].get(measure) for name in names]
    together = None if any(one is None for one in drawn) else estimators.macro_average(drawn)
    return entry(estimators.macro_average(values), together)

  return {
    "benchmarks": {
      name: {measure: entry(values.mean(), replicates[name].get(measure)) for measure, values in found.items()}
      for name, (_, found) in benchmarks.items()
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
  """What else is told of a benchmark: counts and shares."""
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


def group_name(group: str, found: Mapping[str, Any]) -> str:
  """How the average of a group is called."""
  return f"{group}, mean of {len(found['of'])}"


def table_rows(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
  """The main table, in percent: heads and rows of text; averages of groups come last.

  pass@n and maj@n are those of the largest k that is there; a cell says which k that is where it is not n.
  """
  kinds = ("avg", "greedy", "pass", "maj")
  rows = []
  for name, found in results["benchmarks"].items():
    cells = {kind: _cell(found["measures"], kind, found["samples"]) for kind in kinds}
    others = f"{100 * found['finished']:.0f}", f"{found['tokens']:.0f}"
    rows.append((name, f"{found['problems']}", f"{found['samples']}", cells, others))
  for group, found in results["groups"].items():
    samples = {results["benchmarks"][name]["samples"] for name in found["of"]}
    n = samples.pop() if len(samples) == 1 else None
    rows.append((group_name(group, found), "", "", {kind: _cell(found, kind, n) for kind in kinds}, ("", "")))
  shown = [kind for kind in kinds if any(cells[kind] != "-" for *_, cells, _ in rows)]
  heads = ["", "problems", "n", *("greedy" if kind == "greedy" else f"{kind}@n" for kind in shown), "ended", "tokens"]
  return heads, [[*head, *(cells[kind] for kind in shown), *others] for *head, cells, others in rows]


def k_of(measure: str) -> int:
  """8 of "pass@8"."""
  return int(measure.partition("@")[2])


def _cell(measures: Mapping[str, Any], kind: str, n: int | None = None) -> str:
  if kind in measures:
    return percent(measures[kind])
  k = max((k_of(measure) for measure in measures if measure.startswith(f"{kind}@")), default=None)
  if k is None:
    return "-"
  return percent(measures[f"{kind}@{k}"]) + ("" if k == n else f" @{k}")


def percent(entry: Mapping[str, float | None], *, signed: bool = False) -> str:
  """76.4 (71.0 to 81.3), or with signs: a value and its interval, in percent."""
  form = "+.1f" if signed else ".1f"
  low, high = entry["low"], entry["high"]
  spread = "" if low is None else f" ({100 * low:{form}} to {100 * high:{form}})"
  return f"{100 * entry['value']:{form}}{spread}"


def curve_rows(results: Mapping[str, Any], kind: str) -> tuple[list[str], list[list[str]]]:
  """pass@k or maj@k for every k, in percent; kind: "pass" or "maj"."""
  named = {name: found["measures"] for name, found in results["benchmarks"].items()}
  named |= {group_name(group, found): found for group, found in results["groups"].items()}
  ks = sorted({k_of(measure) for found in named.values() for measure in found if measure.startswith(f"{kind}@")})
  rows = []
  for name, found in named.items():
    cells = [f"{100 * found[f'{kind}@{k}']['value']:.1f}" if f"{kind}@{k}" in found else "-" for k in ks]
    if any(cell != "-" for cell in cells):
      rows.append([name, *cells])
  return [f"{kind}@", *map(str, ks)], rows


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """A table in Markdown, numbers flush right."""
  lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
  return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def write_up(results: Mapping[str, Any]) -> str:
  """`results.md`."""
  checkpoint, bootstrap = results["checkpoint"], results["bootstrap"]
  at = "" if checkpoint["step"] is None else f", step {checkpoint['step']}"
  parts = [f"# {checkpoint['folder']}{at}\n\n", markdown(*table_rows(results)), "\n", f"{note(results)}\n"]
  for kind, what in (
    ("pass", "At least one of k is right (unbiased)"),
    ("maj", "The most frequent answer of k is right"),
  ):
    heads, rows = curve_rows(results, kind)
    if rows:
      parts += [f"\n{what}, percent:\n\n", markdown(heads, rows)]
  level, resamples = f"{bootstrap['level']:.0%}", f"{bootstrap['resamples']:,}"
  parts.append(f"\nIntervals: {level}, percentile bootstrap over problems, {resamples} resamples.\n")
  return "".join(parts)


def note(results: Mapping[str, Any]) -> str:
  """How the completions of the table were drawn, a line."""
  how = sorted({found["sampling"] for found in results["benchmarks"].values()})
  return f"Percent (interval). {'; '.join(how)}. ended: by a stop token, percent; tokens: mean length."
