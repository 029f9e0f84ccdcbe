"""Math rewards per second, `python -m benchmarks.rewards`: groups of samples with short answers, all of them different.

A repeated pair of gold answer and answer in a batch costs nothing, so no pair occurs twice here.
"""

import os
import random
import resource
import time
from collections.abc import Callable

from rspo_jax.rewards.math.reward import MathReward

PROMPTS = 500
SAMPLES = 8


def _whole(rng: random.Random) -> tuple[str, list[str]]:
  gold = rng.randrange(100_000)
  return str(gold), [f"So she pays {gold + number} dollars." for number in range(SAMPLES)]


def _short(rng: random.Random) -> tuple[str, list[str]]:
  a, b = rng.randrange(1, 1000), rng.randrange(2, 1000)
  gold, answer = rng.choice(
    (
      (rf"\frac{{{a}}}{{{b}}}", r"Thus $x = \boxed{{\dfrac{{{}}}{{{}}}}}$."),
      (f"{a}.{b}", r"It takes \boxed{{{}.{}\text{{ hours}}}}."),
      (rf"{a}.{b}\%", r"\boxed{{{}.{}\%}}"),
      (f"{a},{b:03d}", "#### {},{:03d}.00"),
    )
  )
  return gold, [answer.format(a + number, b) for number in range(SAMPLES)]


def _simple(rng: random.Random) -> tuple[str, list[str]]:
  a, b = rng.randrange(1, 1000), rng.randrange(2, 1000)
  gold, answer = rng.choice(
    (
      (rf"{a}\sqrt{{{b}}}", r"\boxed{{{} \sqrt{{{}}}}}"),
      (rf"\frac{{{a}\pi}}{{{b}}}", r"\boxed{{\frac{{{} \pi}}{{{}}}}}"),
      (rf"{a}.{b:03d}^\circ", r"\boxed{{{}.{:03d}^{{\circ}}}}"),
      (f"x={a}.{b}", r"\boxed{{x = {}.{}}}"),
    )
  )
  return gold, [answer.format(a + number, b) for number in range(SAMPLES)]


def _formula(rng: random.Random) -> tuple[str, list[str]]:
  a, b = rng.randrange(1, 1000), rng.randrange(1000, 2000)
  gold, answer = rng.choice(
    (
      (f"{a}, {b}", r"\boxed{{{}, {}}}"),
      (f"({a}, {b})", r"\boxed{{\left({},{}\right)}}"),
      (f"[{a}, {b})", r"\boxed{{[{},{})}}"),
      (f"x^2 + {a}x - {b}", r"\boxed{{x^2+{}x-{}}}"),
    )
  )
  return gold, [answer.format(a + number, b) for number in range(SAMPLES)]


def _cpu() -> float:
  """CPU seconds of this process and of workers that have ended."""
  usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
  return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def rate(kind: Callable[[random.Random], tuple[str, list[str]]], workers: int) -> str:
  """Completions per wall-clock second and CPU time of each, after the workers have scored a tenth of the batch."""
  rng = random.Random(0)
  groups = dict(kind(rng) for _ in range(PROMPTS))
  golds, texts = zip(*((gold, text) for gold, group in groups.items() for text in group), strict=True)
  warm = len(texts) // 10
  before = _cpu()
  with MathReward(workers=workers) as reward:
    reward.verdicts(texts[:warm], golds[:warm])
  starting, before = _cpu() - before, _cpu()
  with MathReward(workers=workers) as reward:
    reward.verdicts(texts[:warm], golds[:warm])
    begin = time.perf_counter()
    verdicts = reward.verdicts(texts[warm:], golds[warm:])
    seconds = time.perf_counter() - begin
  spent = _cpu() - before - starting
  assert {verdict.reason for verdict in verdicts} == {"right", "wrong"}
  return f"{len(verdicts) / seconds:,.0f} per second, {1000 * spent / len(verdicts):.2f} ms CPU each"


def main() -> None:
  print(f"load {os.getloadavg()[0]:.1f} at the start\n\n| answers | 1 worker | 2 workers |\n|---|---|---|")
  for kind, description in (
    (_whole, "whole numbers in a sentence"),
    (_short, "fractions, decimals, percents, thousands"),
    (_simple, "roots, multiples of pi, degrees, x = a"),
    (_formula, "lists, tuples, intervals, polynomials"),
  ):
    print(f"| {description} | {rate(kind, 1)} | {rate(kind, 2)} |", flush=True)


if __name__ == "__main__":
  main()
