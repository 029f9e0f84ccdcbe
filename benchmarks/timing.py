"""Timing of calls: warm-up, repeats, wall and CPU seconds, and calls that alternate within one run.

Other processes on the machine change every figure by tens of percent from minute to minute. So only calls that
alternate (A B A B ...) are compared, and the result is a ratio with the spread over the pairs.
"""

import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple


class Run(NamedTuple):
  """One repeat.

  Attributes:
    wall: seconds. cpu: CPU seconds, the sum over the threads of the process.
    foreign: CPU seconds used by other processes in the meantime, and by other guests of the host (Linux; 0 elsewhere).
  """

  wall: float
  cpu: float
  foreign: float

  @property
  def disturbance(self) -> float:
    """Share of the machine used by others, 0 to 1."""
    return self.foreign / (self.wall * (os.cpu_count() or 1))


def _busy() -> float | None:
  """CPU seconds since boot that the machine was busy or taken by other guests; None if the kernel does not tell."""
  try:
    with open("/proc/stat") as stat:
      user, nice, system, _, _, irq, softirq, steal = (int(x) for x in stat.readline().split()[1:9])
  except OSError:
    return None
  return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


class Timing(NamedTuple):
  """All repeats of one call, in the order they ran."""

  runs: tuple[Run, ...]

  def median(self, field: str = "wall") -> float:
    return statistics.median(getattr(run, field) for run in self.runs)

  def best(self, field: str = "wall") -> float:
    return min(getattr(run, field) for run in self.runs)

  def worst(self, field: str = "wall") -> float:
    return max(getattr(run, field) for run in self.runs)

  def rate(self, tokens: int) -> str:
    """Tokens per second as text: the median repeat, and in brackets the slowest and the fastest."""
    slow, fast = tokens / self.worst(), tokens / self.best()
    return f"{tokens / self.median():.0f} tok/s ({slow:.0f} to {fast:.0f})"


class Paired(NamedTuple):
  """Two alternating calls; repeat i of one ran next to repeat i of the other."""

  first: Timing
  second: Timing

  def ratio(self, field: str = "wall") -> float:
    """Time of the first relative to the second: the ratio of the medians."""
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
  """Waits for every JAX array in `value`; does nothing in a process that has not imported JAX."""
  jax = sys.modules.get("jax")
  return jax.block_until_ready(value) if jax is not None else value


def clocked(call: Callable[[], Any]) -> Callable[[], Run]:
  """A callable that runs `call`, waits for its device work, and returns the time it took."""

  def run() -> Run:
    busy, wall, cpu = _busy(), time.perf_counter(), time.process_time()
    block(call())
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    # The kernel counts in ticks of 10 ms, so the difference can be slightly negative on a quiet machine.
    return Run(wall, cpu, 0.0 if busy is None else max(0.0, _busy() - busy - cpu))

  return run


def measure(run: Callable[[], Run], *, warmup: int = 1, repeats: int = 5) -> Timing:
  """`repeats` runs after `warmup` runs that are not recorded. run: a `clocked` callable or a worker."""
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
  """Runs several calls in rounds, in rotating order, so that no call always follows the same one.

  Args:
    calls: `clocked` callables or workers.
    repeats: number of undisturbed rounds to collect. attempts: maximal number of rounds; at least `repeats`, the
      default.
    quiet: a round is undisturbed if others used at most this share of the machine in each of its repeats.
    pause: seconds before every repeat: OpenMP threads continue to spin for a while after their work is done, and would
      disturb the next call.
  Returns:
    A `Timing` for each call, of the `repeats` least disturbed rounds, in the order they ran. The selection depends only
    on the load by other processes, so it favours no call.
  """
  for call in calls:
    for _ in range(warmup):
      call()
  rounds: list[list[Run]] = []
  for number in range(max(repeats, attempts or 0)):
    runs: dict[int, Run] = {}
    for turn in range(len(calls)):
      index = (turn + number) % len(calls)
      time.sleep(pause)
      runs[index] = calls[index]()
    rounds.append([runs[index] for index in range(len(calls))])
    if sum(_disturbance(runs) <= quiet for runs in rounds) >= repeats:
      break
  limit = sorted(map(_disturbance, rounds))[repeats - 1]
  selected = [runs for runs in rounds if _disturbance(runs) <= limit][:repeats]
  return tuple(Timing(runs) for runs in zip(*selected, strict=True))


def paired(first: Callable[[], Run], second: Callable[[], Run], **options: Any) -> Paired:
  """Two calls, alternating; options as in `by_turns`."""
  return Paired(*by_turns((first, second), **options))


def _disturbance(runs: Sequence[Run]) -> float:
  return max(run.disturbance for run in runs)


def matmul_work(size: int = 2048) -> tuple[Callable[[], Any], int]:
  """(a callable, its floating-point operations): one float32 product [size, size] on every JAX device in parallel.

  With a single CPU device XLA distributes the product over all cores; with one device per core every core computes one.
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
  """GFLOP/s of float32 matrix products through XLA on all cores, of the fastest (least disturbed) repeat."""
  call, work = matmul_work(size)
  return work / measure(clocked(call), warmup=2, repeats=repeats).best() / 1e9


def peak_memory() -> float:
  """MiB: the largest resident size of this process so far."""
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
