"""The table of BENCHMARKS.md: `python -m benchmarks.run [--only sampling,train_step,...]` (`make bench`).

Everything that is timed runs in worker processes that take turns; this process only asks and prints.
"""

import argparse
import contextlib
import datetime
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any, NamedTuple

from benchmarks import ours, peers
from benchmarks.timing import Paired, Timing, by_turns, paired
from benchmarks.workers import Worker, report


class Row(NamedTuple):
  what: str
  found: str
  wanted: str = ""
  note: str = ""


class Effort(NamedTuple):
  """repeats: pairs that count. attempts: pairs run at most while waiting for undisturbed ones."""

  repeats: int
  attempts: int


def _pair(first: Worker, second: Worker, effort: Effort) -> Paired:
  return paired(first, second, warmup=2, repeats=effort.repeats, attempts=effort.attempts)


def _ratios(pair: Paired) -> str:
  """How many times faster ours (the first) is, by the clock and in CPU time."""
  slow, fast = (1 / ratio for ratio in reversed(pair.quartiles()))
  return f"{1 / pair.ratio():.2f}x ({slow:.2f} to {fast:.2f}); CPU time {1 / pair.ratio('cpu'):.2f}x"


def _disturbed(*timings: Timing) -> str:
  most = max(run.disturbance for timing in timings for run in timing.runs)
  note = f"others had at most {most:.0%} of the machine"
  return f"NOT A FAIR RUN: {note}" if most > 0.15 else note


def _against_transformers(case: str, wanted: str, effort: Effort) -> Iterator[Row]:
  """Ours by turns with transformers twice: in its fastest setting with threads that spin while they wait for each
  other, and in its fastest one with threads that sleep. The better of the two is the opponent."""
  likely = peers.likely_settings(case)
  waits = [
    peers.trial(case, [{**setting, "wait": wait} for setting in likely], warmup=3) for wait in ("active", "passive")
  ]
  with contextlib.ExitStack() as stack:
    mine = stack.enter_context(Worker(f"benchmarks.ours:{case}", {}))
    theirs = [stack.enter_context(peers.start(case, setting)) for setting in waits]
    first, *others = by_turns((mine, *theirs), warmup=2, repeats=effort.repeats, attempts=effort.attempts)
    best = min(range(len(others)), key=lambda which: others[which].median())
    memories = [worker.peak_memory() for worker in (mine, theirs[best])]
  pair, name = Paired(first, others[best]), case.replace("_", " ")
  yield Row(f"{name}, ours", first.rate(mine.tokens), "", f"peak memory {memories[0]:.0f} MiB")
  note = f"{peers.name_of(waits[best])}; peak memory {memories[1]:.0f} MiB"
  yield Row(f"{name}, transformers' best", others[best].rate(mine.tokens), "", note)
  other = f"{peers.name_of(waits[1 - best])}: {others[1 - best].rate(mine.tokens)}"
  yield Row(f"{name}, ours over transformers", _ratios(pair), wanted, f"{_disturbed(first, *others)}; {other}")
  if "trace_bytes_per_entry" in mine.facts:
    bytes_each = f"{mine.facts['trace_bytes_per_entry']:.2f} bytes"
    yield Row("routing trace, per (token, layer, expert) entry", bytes_each, "at most 3", "index uint8 + float16")


def sampling(effort: Effort) -> Iterator[Row]:
  yield from _against_transformers("sampling", "at least 2.0x, goal 2.5x", effort)


def train_step(effort: Effort) -> Iterator[Row]:
  yield from _against_transformers("train_step", "at least 1.0x, goal 1.25x", effort)


def scoring(effort: Effort) -> Iterator[Row]:
  yield from _against_transformers("scoring", "", effort)


def peak(effort: Effort) -> Iterator[Row]:
  """Share of the matrix-product peak, the peak measured by turns with the work itself."""
  with Worker("benchmarks.ours:matmul", {}) as matmul:
    for number, case in enumerate(("sampling", "scoring", "train_step")):
      with Worker(f"benchmarks.ours:{case}", {}) as mine:
        pair = _pair(mine, matmul, effort)
        top = matmul.facts["flops"] / pair.second.median() / 1e9
        if number == 0:
          yield Row("matrix-product peak, float32, all cores", f"{top:.0f} GFLOP/s", "", _disturbed(*pair))
        share = mine.facts["flops"] / matmul.facts["flops"] / pair.ratio()
        yield Row(f"{case.replace('_', ' ')}, share of peak", f"{share:.0%}", "", f"peak beside it {top:.0f} GFLOP/s")


def shift(effort: Effort) -> Iterator[Row]:
  found = report("benchmarks.ours:shift_cost", {"rounds": 8 * effort.repeats})
  for name, what, wanted in (
    ("shift", "GMPO step with router shift over without, CPU time", "within 1 %"),
    ("control", "the step without it over itself, CPU time", ""),
  ):
    low, middle, high = statistics.quantiles(found[name], n=4)
    note = f"quartiles {low - 1:+.1%} to {high - 1:+.1%}, {len(found[name])} rounds"
    yield Row(what, f"{middle - 1:+.2%}", wanted, note)


def strategies(effort: Effort) -> Iterator[Row]:
  found = report("benchmarks.ours:strategy_cost", {"rounds": 4 * effort.repeats})
  for kind, wanted in (("step", "within 3 %"), ("probe", "")):
    for name, ratios in found[kind].items():
      low, middle, high = statistics.quantiles([cpu for cpu, _ in ratios], n=4)
      note = f"quartiles {low - 1:+.1%} to {high - 1:+.1%}, {len(ratios)} rounds"
      what = f"{name}, CPU time over the plain GRPO step"
      shown = f"{middle - 1:+.1%}" if kind == "step" else f"{middle:.2f} steps"
      yield Row(what, shown, wanted, note)


def rollouts(effort: Effort) -> Iterator[Row]:
  found = report("benchmarks.rollouts:rollout_speed", {"rounds": max(3, effort.repeats // 2)})
  cpu, wall = (statistics.median(column) for column in zip(*found["ratio"], strict=True))
  spread = [ratio for _, ratio in found["ratio"]]
  ours = found["tokens"] / statistics.median(seconds for _, seconds in found["seconds"])
  yield Row("rollouts with a long tail, continuous batching", f"{ours:.0f} tok/s", "", f"{found['tokens']} tokens")
  what = f"{wall:.2f}x ({min(spread):.2f} to {max(spread):.2f}); CPU time {cpu:.2f}x"
  note = f"{found['same']:.1%} of completions are equal"
  yield Row("rollouts, continuous over batch-synchronous", what, "at least 2x", note)
  carried = found["carried"]
  what = f"{statistics.median(carried):.2f}x ({min(carried):.2f} to {max(carried):.2f})"
  yield Row("rollouts, partial ones carried over, over continuous", what, "", "tokens/s; a quarter more under way")


def bandwidth(effort: Effort) -> Iterator[Row]:
  found = report("benchmarks.bandwidth:decode_speed", {"rounds": effort.repeats})
  yield Row("memory, read by all cores", f"{found['read'] / 1e9:.1f} GB/s")
  for row in found["rows"]:
    note = f"{row['bytes'] / 1e6:.0f} MB a step, {row['experts']:.0f} of 32 experts a layer"
    what = f"decode, 108M parameters, {row['rows']} rows, cache {row['cache']}, share of memory bandwidth"
    yield Row(what, f"{row['share']:.0%}", "", f"{row['tokens_per_second']:.0f} tok/s; {note}")


def compilation(effort: Effort) -> Iterator[Row]:
  del effort  # a compile is seconds of one thread: once is enough
  for case in ("sampling", "train_step"):
    cold, warm = ours.cold_and_warm(report, case)
    name = case.replace("_", " ")
    for kind, found, wanted in (("cold", cold, ""), ("with the persistent cache", warm, "0 programs compiled")):
      note = f"{found['compiled']} programs compiled; all ready after {found['ready']:.1f} s"
      yield Row(f"compile {name}, {kind}", f"{found['compile']:.1f} s", wanted, note)


SECTIONS: dict[str, Callable[[Effort], Iterator[Row]]] = {
  "sampling": sampling,
  "train_step": train_step,
  "scoring": scoring,
  "rollouts": rollouts,
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
  found = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
  return found.stdout.strip() or "no revision"


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--only", default=",".join(SECTIONS), help=f"comma-separated: {','.join(SECTIONS)}")
  parser.add_argument("--repeats", type=int, default=9, help="pairs of repeats that count")
  parser.add_argument("--attempts", type=int, default=27, help="pairs run at most, waiting for undisturbed ones")
  options = parser.parse_args()
  wanted = options.only.split(",")
  if unknown := sorted(set(wanted) - set(SECTIONS)):
    parser.error(f"--only names {', '.join(unknown)}; the sections are {', '.join(SECTIONS)}.")
  print(f"{_machine()}\n{datetime.date.today()}, revision {_revision()}, load {os.getloadavg()[0]:.1f} at the start\n")
  print("| what | measured | wanted | |\n|---|---|---|---|", flush=True)
  for name in wanted:
    print(f"... {name}", file=sys.stderr, flush=True)
    for row in SECTIONS[name](Effort(options.repeats, options.attempts)):
      print(f"| {' | '.join(map(_cell, row))} |", flush=True)


def _cell(value: Any) -> str:
  return str(value).replace("|", "/")


if __name__ == "__main__":
  main()
