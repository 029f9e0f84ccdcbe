"""Compares evaluations problem by problem: differences with paired intervals. docs/evaluation.md.

    python -m experiments.compare evaluations/before evaluations/after --workdir=evaluations/compared

The first evaluation is the baseline of the others. Each argument is the workdir of `experiments.evaluate`. Only
problems that are in both evaluations count. With --workdir, compare.json, compare.md and compare.png are written there.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.reporting import evaluation_plots
from experiments.reporting.progress import table
from rspo_jax.evaluation.completion_log import Completions, completions_of, log_path, read_lines
from rspo_jax.evaluation.estimators import powers_of_two
from rspo_jax.evaluation.summary import (
  Estimates,
  comparison_notes,
  comparison_rows,
  estimates,
  group_name,
  section,
  summarize,
)
from rspo_jax.files import read_json
from rspo_jax.run.workdir import dump_json_atomic, write_text_atomic

Problem = tuple[int, str]  # its index in the benchmark, and the digest of its gold answer
Lines = dict[str, dict[Problem, list[dict[str, Any]]]]  # mode -> problem -> the log lines of its completions


class Pair(NamedTuple):
  """The estimates of two evaluations on the problems of a benchmark that are in both.

  Attributes:
    group: of the benchmark. old, new: measure -> a number for each problem, [N].
    left_out: number of problems that are in only one of them.
  """

  group: str
  old: Estimates
  new: Estimates
  left_out: int

  @property
  def difference(self) -> Estimates:
    return {measure: self.new[measure] - self.old[measure] for measure in self.old if measure in self.new}


def read_evaluation(workdir: str | Path) -> dict[str, tuple[str, Lines]]:
  """Benchmark -> (its group, its completions), without problems that have fewer completions than the others.

  Raises:
    ValueError: the workdir has no finished evaluation.
  """
  results = read_json(
    Path(workdir) / "results.json", cure="Pass the workdir of a finished evaluation (experiments.evaluate)."
  )
  return {
    name: (benchmark["group"], {mode: _by_problem(workdir, name, mode) for mode in ("sampled", "greedy")})
    for name, benchmark in results["benchmarks"].items()
  }


def _by_problem(workdir: str | Path, name: str, mode: str) -> dict[Problem, list[dict[str, Any]]]:
  by_problem: dict[Problem, list[dict[str, Any]]] = {}
  for line in read_lines(log_path(workdir, name, mode)):
    by_problem.setdefault((line["problem"], line["gold"]), []).append(line)
  most = max(map(len, by_problem.values()), default=0)
  return {problem: lines for problem, lines in by_problem.items() if len(lines) == most}


def pair(old: tuple[str, Lines], new: tuple[str, Lines]) -> Pair | None:
  """The estimates of two evaluations on their shared problems; None if they share no problem."""
  (group, before), (_, after) = old, new
  shared = sorted(before["sampled"].keys() & after["sampled"].keys())
  if not shared:
    return None
  sampled = [_select(lines["sampled"], shared) for lines in (before, after)]
  greedy = [_select(lines["greedy"], shared) for lines in (before, after)]
  ks = powers_of_two(min(completions.samples for completions in sampled))
  measures = [estimates(*both, ks) for both in zip(sampled, greedy, strict=True)]
  return Pair(group, *measures, len(before["sampled"].keys() | after["sampled"].keys()) - len(shared))


def _select(by_problem: Mapping[Problem, list[dict[str, Any]]], shared: Sequence[Problem]) -> Completions | None:
  if not all(problem in by_problem for problem in shared):
    return None
  return completions_of([line for problem in shared for line in by_problem[problem]])


def compare(
  old: str | Path, new: str | Path, *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> dict[str, Any]:
  """The differences new - old of two evaluations.

  Args:
    old, new: their workdirs.
    level, resamples, seed: of the paired bootstrap over problems.
  Returns:
    JSON-able, as `summary.summarize` gives it; a benchmark has "problems", "left_out", the means "old" and "new" by
    measure, and its "difference".
  Raises:
    ValueError: no shared problem, or a workdir without a finished evaluation.
  """
  before, after = read_evaluation(old), read_evaluation(new)
  pairs = {name: pair(before[name], after[name]) for name in before if name in after}
  pairs = {name: both for name, both in pairs.items() if both is not None}
  if not pairs:
    raise ValueError(
      f"{old} has {', '.join(before)} and {new} has {', '.join(after)}: they share no problem. Evaluate them on the "
      "same benchmarks."
    )
  differences = {name: (both.group, both.difference) for name, both in pairs.items()}
  summary = summarize(differences, level=level, resamples=resamples, seed=seed)
  for name, both in pairs.items():
    measures = summary["benchmarks"][name]
    means = {side: {m: float(getattr(both, side)[m].mean()) for m in measures} for side in ("old", "new")}
    count = len(both.old["avg"])
    summary["benchmarks"][name] = {"problems": count, "left_out": both.left_out, **means, "difference": measures}
  for group in summary["groups"].values():
    for side in ("old", "new"):
      group[side] = float(np.mean([getattr(pairs[name], side)["avg"].mean() for name in group["of"]]))
  not_compared = sorted((set(before) ^ set(after)) | (set(before) & set(after)) - set(pairs))
  return {"old": str(old), "new": str(new), "level": level, "not_compared": not_compared, **summary}


def draw(comparisons: Sequence[Mapping[str, Any]]) -> bytes:
  """The figure of comparisons with one baseline, a PNG."""
  runs = {}
  for comparison in comparisons:
    of_benchmarks = {name: benchmark["difference"]["avg"] for name, benchmark in comparison["benchmarks"].items()}
    of_groups = {group_name(name, group): group["avg"] for name, group in comparison["groups"].items()}
    runs[comparison["new"]] = of_benchmarks | of_groups
  names = list(dict.fromkeys(name for run in runs.values() for name in run))
  return evaluation_plots.draw_differences(names, runs, comparisons[0]["old"])


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(prog="python -m experiments.compare", description=__doc__.split("\n")[0])
  parser.add_argument("first", help="workdir of the evaluation that is the baseline")
  parser.add_argument("others", nargs="+", help="workdirs of the evaluations to compare with it")
  parser.add_argument("--workdir", help="folder for the files of the comparison")
  parser.add_argument("--level", type=float, default=0.95, help="level of the intervals, in (0, 1)")
  parser.add_argument("--resamples", type=int, default=10_000, help="number of bootstrap resamples")
  return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
  comparisons = [compare(args.first, other, level=args.level, resamples=args.resamples) for other in args.others]
  sections = []
  for comparison in comparisons:
    title = f"{comparison['old']} -> {comparison['new']}"
    rows, notes = comparison_rows(comparison), comparison_notes(comparison)
    table(title, *rows)
    print("\n".join(notes))
    sections.append(section(title, rows, notes))
  if args.workdir:
    folder = Path(args.workdir)
    folder.mkdir(parents=True, exist_ok=True)
    dump_json_atomic(folder / "compare.json", comparisons)
    write_text_atomic(folder / "compare.md", "\n".join(sections))
    (folder / "compare.png").write_bytes(draw(comparisons))
    print(f"Comparison: {folder / 'compare.md'}, {folder / 'compare.png'}")


if __name__ == "__main__":
  try:
    run(parse())
  except ValueError as error:
    sys.exit(f"error: {error}")
