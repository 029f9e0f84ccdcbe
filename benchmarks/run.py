"""Prints the table of BENCHMARKS.md: `python -m benchmarks.run [--only sampling,train_step,...]` (`make bench`).

Everything that is timed runs in worker processes; this process sends requests and prints. Our side has the default
settings, except where the name of a row says otherwise.
"""

import argparse
import contextlib
import datetime
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from typing import Any, NamedTuple

from benchmarks import peers
from benchmarks.compilation import cold_and_warm
from benchmarks.timing import Paired, Run, Timing, by_turns, paired
from benchmarks.workers import Worker, report


class Row(NamedTuple):
  """A row of the table."""

  name: str
  measured: str
  target: str = ""
  note: str = ""


class Effort(NamedTuple):
  """repeats: undisturbed pairs to collect. attempts: maximal number of pairs."""

  repeats: int
  attempts: int


def _pair(first: Worker, second: Worker, effort: Effort) -> Paired:
  return paired(first, second, warmup=2, repeats=effort.repeats, attempts=effort.attempts)


def _ratios(pair: Paired) -> str:
  """Speed of ours (the first) relative to the second, in wall-clock and in CPU time."""
  slow, fast = (1 / ratio for ratio in reversed(pair.quartiles()))
  return f"{1 / pair.ratio():.2f}x ({slow:.2f} to {fast:.2f}); CPU time {1 / pair.ratio('cpu'):.2f}x"


def _load(*disturbances: float) -> str:
  """Text about the share of the machine that other processes used, the largest of the repeats."""
  note = f"others used at most {max(disturbances):.0%} of the machine"
  return f"NOT A FAIR RUN: {note}" if max(disturbances) > 0.15 else note


def _disturbances(*timings: Timing) -> list[float]:
  return [run.disturbance for timing in timings for run in timing.runs]


def _change(ratios: Sequence[float]) -> tuple[float, str]:
  """The median of ratios minus 1, and their quartiles as text."""
  low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
  return median - 1, f"quartiles {low - 1:+.1%} to {high - 1:+.1%}, {len(ratios)} rounds"


def _against_transformers(case: str, target: str, effort: Effort) -> Iterator[Row]:
  """Ours alternating with transformers in two settings: the fastest with OpenMP threads that spin while they wait, and
  the fastest with threads that sleep. The faster of the two is reported as transformers' best."""
  likely = peers.likely_settings(case)
  waits = [
    peers.trial(case, [{**setting, "wait": wait} for setting in likely], warmup=3, repeats=min(5, effort.repeats))
    for wait in ("active", "passive")
  ]
  with contextlib.ExitStack() as stack:
    ours = stack.enter_context(Worker(f"benchmarks.ours:{case}", {}))
    workers = [stack.enter_context(peers.start(case, setting)) for setting in waits]
    timing, *timings = by_turns((ours, *workers), warmup=2, repeats=effort.repeats, attempts=effort.attempts)
    best = min(range(len(timings)), key=lambda index: timings[index].median())
    memories = [worker.peak_memory() for worker in (ours, workers[best])]
  pair, name = Paired(timing, timings[best]), case.replace("_", " ")
  yield Row(f"{name}, ours", timing.rate(ours.tokens), "", f"peak memory {memories[0]:.0f} MiB")
  note = f"{peers.name_of(waits[best])}; peak memory {memories[1]:.0f} MiB"
  yield Row(f"{name}, transformers' best", timings[best].rate(ours.tokens), "", note)
  note = f"{_load(*_disturbances(timing, *timings))}; {peers.name_of(waits[1 - best])}: "
  note += timings[1 - best].rate(ours.tokens)
  yield Row(f"{name}, ours over transformers", _ratios(pair), target, note)
  if "trace_bytes_per_entry" in ours.facts:
    bytes_each = f"{ours.facts['trace_bytes_per_entry']:.2f} bytes"
    yield Row("routing trace, per (token, layer, expert) entry", bytes_each, "at most 3", "index uint8 + float16")


def sampling(effort: Effort) -> Iterator[Row]:
  yield from _against_transformers("sampling", "at least 2.0x, goal 2.5x", effort)


def train_step(effort: Effort) -> Iterator[Row]:
  yield from _against_transformers("train_step", "at least 1.0x, goal 1.25x", effort)


def scoring(effort: Effort) -> Iterator[Row]:
  yield from _against_transformers("scoring", "", effort)


def peak(effort: Effort) -> Iterator[Row]:
  """Share of the matrix-product peak, which is measured alternating with the work."""
  with Worker("benchmarks.ours:matmul", {}) as matmul:
    for number, case in enumerate(("sampling", "scoring", "train_step")):
      with Worker(f"benchmarks.ours:{case}", {}) as ours:
        pair = _pair(ours, matmul, effort)
        top = matmul.facts["flops"] / pair.second.median() / 1e9
        if number == 0:
          yield Row("matrix-product peak, float32, all cores", f"{top:.0f} GFLOP/s", "", _load(*_disturbances(*pair)))
        share = ours.facts["flops"] / matmul.facts["flops"] / pair.ratio()
        yield Row(
          f"{case.replace('_', ' ')}, share of peak", f"{share:.0%}", "", f"peak in the same run {top:.0f} GFLOP/s"
        )


def shift(effort: Effort) -> Iterator[Row]:
  ratios = report("benchmarks.strategies:shift_cost", {"rounds": 8 * effort.repeats})
  for kind, name, target in (
    ("shift", "GMPO step with router shift over without, CPU time", "within 1 %"),
    ("control", "the step without it over itself, CPU time", ""),
  ):
    change, note = _change(ratios[kind])
    yield Row(name, f"{change:+.2%}", target, note)


def strategies(effort: Effort) -> Iterator[Row]:
  results = report("benchmarks.strategies:strategy_cost", {"rounds": 4 * effort.repeats})
  for kind, target in (("step", "within 3 %"), ("probe", "")):
    for name, ratios in results[kind].items():
      change, note = _change([cpu for cpu, _ in ratios])
      measured = f"{change:+.1%}" if kind == "step" else f"{1 + change:.2f} steps"
      yield Row(f"{name}, CPU time over the plain GRPO step", measured, target, note)


def meshes(effort: Effort) -> Iterator[Row]:
  settings = {"rounds": effort.repeats, "attempts": effort.attempts}
  for name, runs in report("benchmarks.meshes:mesh_speed", settings).items():
    data, expert = (Timing(tuple(Run(**pair[side]) for pair in runs)) for side in (0, 1))
    pair = Paired(expert, data)
    parts = []
    for field in ("wall", "cpu"):
      low, high = pair.quartiles(field)
      parts.append(f"{'CPU ' if field == 'cpu' else ''}time {pair.ratio(field):.2f} ({low:.2f} to {high:.2f})")
    note = f"data: {data.median():.3f} s; {_load(*_disturbances(data, expert))}"
    yield Row(f"{name}, mesh expert over mesh data", "; ".join(parts), "", note)


def rollouts(effort: Effort) -> Iterator[Row]:
  results = report("benchmarks.rollouts:rollout_speed", {"rounds": max(3, effort.repeats // 2)})
  cpu, wall = (statistics.median(column) for column in zip(*results["ratio"], strict=True))
  walls = [ratio for _, ratio in results["ratio"]]
  rate = f"{results['tokens_per_second']:.0f} tok/s"
  yield Row("rollouts with a long tail, continuous batching", rate, "", f"{results['tokens']} tokens")
  measured = f"{wall:.2f}x ({min(walls):.2f} to {max(walls):.2f}); CPU time {cpu:.2f}x"
  note = f"{results['equal']:.1%} of completions are equal"
  yield Row("rollouts, continuous over batch-synchronous", measured, "at least 2x", note)
  partial = results["partial"]
  measured = f"{statistics.median(partial):.2f}x ({min(partial):.2f} to {max(partial):.2f})"
  yield Row("rollouts, partial over continuous", measured, "", "tokens/s; a quarter more completions in progress")


def bandwidth(effort: Effort) -> Iterator[Row]:
  results = report("benchmarks.bandwidth:decode_speed", {"rounds": effort.repeats})
  yield Row("memory bandwidth, all cores reading", f"{results['read'] / 1e9:.1f} GB/s")
  for row in results["rows"]:
    note = f"{row['bytes'] / 1e6:.0f} MB per step, {row['experts']:.0f} of 32 experts per layer"
    name = f"decode, 108M parameters, {row['rows']} rows, cache {row['cache']}, mesh {row['mesh']}"
    yield Row(
      f"{name}, share of memory bandwidth", f"{row['share']:.0%}", "", f"{row['tokens_per_second']:.0f} tok/s; {note}"
    )


def compilation(effort: Effort) -> Iterator[Row]:
  del effort  # compilation takes seconds of one thread and is measured once
  for case in ("sampling", "train_step"):
    cold, warm = cold_and_warm(case)
    name = case.replace("_", " ")
    for kind, seconds, target in (("cold", cold, ""), ("with the persistent cache", warm, "0 programs compiled")):
      note = f"{seconds['compiled']} programs compiled; all ready after {seconds['ready']:.1f} s"
      yield Row(f"compile {name}, {kind}", f"{seconds['compile']:.1f} s", target, note)


SECTIONS: dict[str, Callable[[Effort], Iterator[Row]]] = {
  "sampling": sampling,
  "train_step": train_step,
  "scoring": scoring,
  "rollouts": rollouts,
  "meshes": meshes,
  "peak": peak,
  "bandwidth": bandwidth,
  "shift": shift,
  "strategies": strategies,
  "compilation": compilation,
}


def _machine() -> str:
  try:
    with open("/proc/cpuinfo") as info:
      model = next(line.split(":", 1)[1].strip() for line in info if line.startswith("model name"))
  except (OSError, StopIteration):
    model = platform.processor() or platform.machine()
  versions = ", ".join(f"{name} {_version(name)}" for name in ("jax", "flax", "torch", "transformers"))
  return f"{len(os.sched_getaffinity(0))} cores of {model}; Python {platform.python_version()}, {versions}"


def _version(package: str) -> str:
  try:
    return metadata.version(package)
  except metadata.PackageNotFoundError:
    return "absent"


def _revision() -> str:
  described = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
  return described.stdout.strip() or "unknown"


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--only", default=",".join(SECTIONS), help=f"comma-separated: {','.join(SECTIONS)}")
  parser.add_argument("--repeats", type=int, default=9, help="undisturbed rounds to collect, at least 2")
  parser.add_argument("--attempts", type=int, default=27, help="maximal number of rounds")
  options = parser.parse_args()
  sections = options.only.split(",")
  if unknown := sorted(set(sections) - set(SECTIONS)):
    parser.error(f"--only names {', '.join(unknown)}; the sections are {', '.join(SECTIONS)}.")
  print(f"{_machine()}\n{datetime.date.today()}, revision {_revision()}, load {os.getloadavg()[0]:.1f} at the start\n")
  print("| benchmark | measured | target | |\n|---|---|---|---|", flush=True)
  for name in sections:
    print(f"... {name}", file=sys.stderr, flush=True)
    for row in SECTIONS[name](Effort(options.repeats, options.attempts)):
      print(f"| {' | '.join(map(_cell, row))} |", flush=True)


def _cell(value: Any) -> str:
  return str(value).replace("|", "/")


if __name__ == "__main__":
  main()
