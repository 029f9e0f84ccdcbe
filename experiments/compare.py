"""Evaluations compared problem by problem: differences with paired intervals. docs/evaluation.md.

    python -m experiments.compare evaluations/before evaluations/after --workdir=evaluations/compared

The first is what the others are compared with. Each is the workdir of `experiments.evaluate`. Only problems that both
have count. With --workdir, compare.json, compare.md and compare.png are written there.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.reporting import evaluation_plots
from experiments.reporting.progress import table
from rspo_jax.evaluation.completion_log import Completions, completions_of, read_lines
from rspo_jax.evaluation.estimators import powers_of_two
from rspo_jax.evaluation.summary import Estimates, estimates, group_name, markdown, percent, summarize
from rspo_jax.run.workdir import dump_json_atomic, write_text_atomic

Problem = tuple[int, str]  # its number in the benchmark, and the digest of its gold answer
Found = dict[str, dict[Problem, list[dict[str, Any]]]]  # mode -> problem -> the lines of its completions


class Pair(NamedTuple):
  """Two runs on the problems of a benchmark that both have.

  Attributes:
    old, new: measure -> a number for each problem, [N]. left_out: problems that only one of them has.
  """

  group: str
  old: Estimates
  new: Estimates
  left_out: int

  @property
  def difference(self) -> Estimates:
    return {measure: self.new[measure] - self.old[measure] for measure in self.old if measure in self.new}


def read_run(workdir: str | Path) -> dict[str, tuple[str, Found]]:
  """Benchmark -> (its group, what was drawn of it), without problems that have fewer completions than others.

  Raises:
    ValueError: no evaluation, or one that has not finished.
  """
  workdir = Path(workdir)
  path = workdir / "results.json"
  if not path.exists():
    raise ValueError(f"{path} is absent; want the workdir of an evaluation that has finished (experiments.evaluate).")
  told = json.loads(path.read_text(encoding="utf-8"))["benchmarks"]
  return {
    name: (of["group"], {mode: _by_problem(workdir, name, mode) for mode in ("sampled", "greedy")})
    for name, of in told.items()
  }


def _by_problem(workdir: Path, name: str, mode: str) -> dict[Problem, list[dict[str, Any]]]:
  found: dict[Problem, list[dict[str, Any]]] = {}
  for line in read_lines(workdir / "completions" / f"{name}.{mode}.jsonl"):
    found.setdefault((line["problem"], line["gold"]), []).append(line)
  most = max(map(len, found.values()), default=0)
  return {problem: lines for problem, lines in found.items() if len(lines) == most}


def pair(old: tuple[str, Found], new: tuple[str, Found]) -> Pair | None:
  """None where they have no problem in common."""
  (group, before), (_, after) = old, new
  shared = sorted(before["sampled"].keys() & after["sampled"].keys())
  if not shared:
    return None
  sampled = [_select(found["sampled"], shared) for found in (before, after)]
  greedy = [_select(found["greedy"], shared) for found in (before, after)]
  ks = powers_of_two(min(of.samples for of in sampled))
  measures = [estimates(*both, ks) for both in zip(sampled, greedy, strict=True)]
  return Pair(group, *measures, len(before["sampled"].keys() | after["sampled"].keys()) - len(shared))


def _select(found: Mapping[Problem, list[dict[str, Any]]], shared: Sequence[Problem]) -> Completions | None:
  if not all(problem in found for problem in shared):
    return None
  return completions_of([line for problem in shared for line in found[problem]])


def compare(
  old: str | Path, new: str | Path, *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> dict[str, Any]:
  """The differences new - old of two evaluations.

  Args:
    level, resamples, seed: of the paired bootstrap over problems.
  Returns:
    JSON-able, as `results.summarize`; a benchmark also has "problems", "left_out", and "old" and "new" by measure.
  Raises:
    ValueError: nothing in common.
  """
  before, after = read_run(old), read_run(new)
  pairs = {name: pair(before[name], after[name]) for name in before if name in after}
  pairs = {name: found for name, found in pairs.items() if found is not None}
  if not pairs:
    raise ValueError(
      f"{old} has {', '.join(before)} and {new} has {', '.join(after)}: no problem that both have. Evaluate them on "
      "the same benchmarks."
    )
  differences = {name: (found.group, found.difference) for name, found in pairs.items()}
  summary = summarize(differences, level=level, resamples=resamples, seed=seed)
  for name, found in pairs.items():
    measures = summary["benchmarks"][name]
    sides = {side: {m: float(getattr(found, side)[m].mean()) for m in measures} for side in ("old", "new")}
    count = len(found.old["avg"])
    summary["benchmarks"][name] = {"problems": count, "left_out": found.left_out, **sides, "difference": measures}
  for found in summary["groups"].values():
    for side in ("old", "new"):
      found[side] = float(np.mean([getattr(pairs[name], side)["avg"].mean() for name in found["of"]]))
  only = sorted((set(before) ^ set(after)) | (set(before) & set(after)) - set(pairs))
  return {"old": str(old), "new": str(new), "level": level, "not_compared": only, **summary}


def table_rows(found: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
  """Heads and rows of a comparison's table, in percent and percentage points."""
  rows = []
  for name, of in found["benchmarks"].items():
    shared = f"{of['problems']}" + (f" ({of['left_out']} left out)" if of["left_out"] else "")
    rows.append([name, shared, *_cells(of["old"]["avg"], of["new"]["avg"], of["difference"])])
  for group, of in found["groups"].items():
    rows.append([group_name(group, of), "", *_cells(of["old"], of["new"], of)])
  return ["", "problems", "avg@n before", "after", "change", "change of greedy"], rows


def _cells(old: float, new: float, difference: Mapping[str, Any]) -> list[str]:
  greedy = percent(difference["greedy"], signed=True) if "greedy" in difference else "-"
  return [f"{100 * old:.1f}", f"{100 * new:.1f}", percent(difference["avg"], signed=True), greedy]


def draw(compared: Sequence[Mapping[str, Any]]) -> bytes:
  """The picture of comparisons with one first run, a PNG."""
  runs = {}
  for found in compared:
    of_groups = {group_name(group, of): of["avg"] for group, of in found["groups"].items()}
    runs[found["new"]] = {name: of["difference"]["avg"] for name, of in found["benchmarks"].items()} | of_groups
  names = list(dict.fromkeys(name for run in runs.values() for name in run))
  return evaluation_plots.draw_differences(names, runs, compared[0]["old"])


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(prog="python -m experiments.compare", description=__doc__.split("\n")[0][4:])
  parser.add_argument("first", help="workdir of an evaluation")
  parser.add_argument("others", nargs="+", help="workdirs that are compared with it")
  parser.add_argument("--workdir", help="folder for the comparison's files")
  parser.add_argument("--level", type=float, default=0.95, help="of the intervals")
  parser.add_argument("--resamples", type=int, default=10_000, help="of the bootstrap")
  return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
  compared = [compare(args.first, other, level=args.level, resamples=args.resamples) for other in args.others]
  text = []
  for found in compared:
    title = f"{found['old']} -> {found['new']}"
    table(title, *table_rows(found))
    notes = [f"Percent and percentage points; {found['level']:.0%} intervals, paired bootstrap over the same problems."]
    if found["not_compared"]:
      notes.append(f"Not compared, for only one has problems of it: {', '.join(found['not_compared'])}.")
    print("\n".join(notes))
    text += [f"# {title}\n\n", markdown(*table_rows(found)), "\n", "\n\n".join(notes), "\n\n"]
  if args.workdir:
    folder = Path(args.workdir)
    folder.mkdir(parents=True, exist_ok=True)
    dump_json_atomic(folder / "compare.json", compared)
    write_text_atomic(folder / "compare.md", "".join(text))
    (folder / "compare.png").write_bytes(draw(compared))
    print(f"Comparison: {folder / 'compare.md'}, {folder / 'compare.png'}")


if __name__ == "__main__":
  try:
    run(parse())
  except ValueError as error:
    sys.exit(f"error: {error}")
