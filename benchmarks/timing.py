"""How things are timed here: warm-up, repeats, wall and CPU seconds, and two things compared by turns in one run.

Other work on the machine moves every figure by tens of percent from minute to minute, so a comparison is only made
between things that took turns (A B A B ...), and is reported as a ratio with the spread of the single pairs.
"""

import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple


class Run(NamedTuple):
  """One repeat. wall: seconds on the clock. cpu: seconds of all the process's threads together. foreign: CPU seconds
  that all others took meanwhile, other guests of the host included (Linux; 0 elsewhere)."""

  wall: float
  cpu: float
  foreign: float

  @property
  def disturbance(self) -> float:
    """Share of the machine that others had, 0 to 1."""
    return self.foreign / (self.wall * (os.cpu_count() or 1))


def _busy() -> float | None:
  """CPU seconds the whole machine has been busy or was not given, or None where the kernel does not tell."""
  try:
    with open("/proc/stat") as stat:
      user, nice, system, _, _, irq, softirq, steal = (int(x) for x in stat.readline().split()[1:9])
  except OSError:
    return None
  return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


class Timing(NamedTuple):
  """All repeats of one thing, in the order they ran."""

  runs: tuple[Run, ...]

  def median(self, field: str = "wall") -> float:
    return statistics.median(getattr(run, field) for run in self.runs)

  def best(self, field: str = "wall") -> float:
    return min(getattr(run, field) for run in self.runs)

  def worst(self, field: str = "wall") -> float:
    return max(getattr(run, field) for run in self.runs)

  def rate(self, tokens: int) -> str:
    """Tokens per second: the median repeat, then the slowest and the fastest."""
    slow, fast = tokens / self.worst(), tokens / self.best()
    return f"{tokens / self.median():.0f} tok/s ({slow:.0f} to {fast:.0f})"


class Paired(NamedTuple):
  """Two things that took turns; repeat i of one ran right beside repeat i of the other."""

  first: Timing
  second: Timing

  def ratio(self, field: str = "wall") -> float:
    """How many times longer the first takes: ratio of the medians."""
    return self.first.median(field) / self.second.median(field)

  def quartiles(self, field: str = "wall") -> tuple[float, float]:
    """Lower and upper quartile of the ratio within each pair."""
    runs = zip(self.first.runs, self.second.runs, strict=True)
    ratios = sorted(getattr(a, field) / getattr(b, field) for a, b in runs)
    if len(ratios) < 2:
      return ratios[0], ratios[0]
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return low, high


def block(value: Any) -> Any:
  """Waits for every JAX array in `value`; leaves a process that never imported JAX alone."""
  jax = sys.modules.get("jax")
  return jax.block_until_ready(value) if jax is not None else value


def clocked(call: Callable[[], Any]) -> Callable[[], Run]:
  """A callable that runs `call` to its end, device work included, and says how long that took."""

  def run() -> Run:
    busy, wall, cpu = _busy(), time.perf_counter(), time.process_time()
    block(call())
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    # The kernel counts in ticks of 10 ms, so a quiet machine can come out a tick below zero.
    return Run(wall, cpu, 0.0 if busy is None else max(0.0, _busy() - busy - cpu))

  return run


def measure(run: Callable[[], Run], *, warmup: int = 1, repeats: int = 5) -> Timing:
  """Runs something `warmup` times unrecorded, then `repeats` times. `run` is a `clocked` callable or a worker."""
  for _ in range(warmup):
    run()
  return Timing(tuple(run() for _ in range(repeats)))


def by_turns(
  calls: Sequence[Callable[[], Run]],
  *,
  warmup: int = 1,
  repeats: int = 5,
  attempts: int | None = None,
  quiet: float = 0.05,
  pause: float = 0.2,
) -> tuple[Timing, ...]:
  """Runs several things in rounds, every round in another order so that none always runs on the warmest cache.

  Args:
    calls: `clocked` callables or workers.
    repeats: rounds wanted. attempts: rounds run at most, at least `repeats` (the default).
    quiet: a round counts as undisturbed if others had at most this share of the machine in each of its repeats.
    pause: seconds of rest before every repeat: OpenMP threads keep spinning for a while after their work is done,
      and would spin into the next one's turn.
  Returns:
    A `Timing` for each call, of the `repeats` least disturbed rounds, in the order they ran. Choosing by what others
    did, never by the result, favours nobody.
  """
  for call in calls:
    for _ in range(warmup):
      call()
  rounds: list[list[Run]] = []
  for number in range(max(repeats, attempts or 0)):
    runs: dict[int, Run] = {}
    for turn in range(len(calls)):
      which = (turn + number) % len(calls)
      time.sleep(pause)
      runs[which] = calls[which]()
    rounds.append([runs[which] for which in range(len(calls))])
    if sum(_disturbance(runs) <= quiet for runs in rounds) >= repeats:
      break
  worst_kept = sorted(map(_disturbance, rounds))[repeats - 1]
  kept = [runs for runs in rounds if _disturbance(runs) <= worst_kept][:repeats]
  return tuple(Timing(runs) for runs in zip(*kept, strict=True))


def paired(first: Callable[[], Run], second: Callable[[], Run], **options: Any) -> Paired:
  """Two things by turns; options as in `by_turns`."""
  return Paired(*by_turns((first, second), **options))


def _disturbance(runs: Sequence[Run]) -> float:
  return max(run.disturbance for run in runs)


def matmul_work(size: int = 2048) -> tuple[Callable[[], Any], int]:
  """(a callable, its floating-point operations): float32 products [size, size], one on every JAX device at once.

  With a single CPU device XLA spreads the one product over all cores; with one device per core each core does its own.
  """
  import jax
  import jax.numpy as jnp

  product = jax.jit(lambda a, b: jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST))
  operands = [
    tuple(jax.device_put(jax.random.normal(jax.random.key(side), (size, size)), device) for side in (0, 1))
    for device in jax.local_devices()
  ]
  return lambda: [product(a, b) for a, b in operands], 2 * size**3 * len(operands)


def matmul_peak(size: int = 2048, repeats: int = 7) -> float:
  """GFLOP/s of float32 matrix products through XLA on all cores.

  The fastest of the repeats: a peak is what the machine can do when left alone.
  """
  call, work = matmul_work(size)
  return work / measure(clocked(call), warmup=2, repeats=repeats).best() / 1e9


def peak_memory() -> float:
  """MiB: the largest resident size this process has had so far."""
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
