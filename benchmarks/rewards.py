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
Kind = Callable[[random.Random], tuple[str, list[str]]]  # a gold answer and its completions


def _whole(rng: random.Random) -> tuple[str, list[str]]:
  gold = rng.randrange(100_000)
  return str(gold), [f"So she pays {gold + number} dollars." for number in range(SAMPLES)]


def _short(a: int, b: int) -> tuple[tuple[str, str], ...]:
  return (
    (rf"\frac{{{a}}}{{{b}}}", r"Thus $x = \boxed{{\dfrac{{{}}}{{{}}}}}$."),
    (f"{a}.{b}", r"It takes \boxed{{{}.{}\text{{ hours}}}}."),
    (rf"{a}.{b}\%", r"\boxed{{{}.{}\%}}"),
    (f"{a},{b:03d}", "#### {},{:03d}.00"),
  )


def _simple(a: int, b: int) -> tuple[tuple[str, str], ...]:
  return (
    (rf"{a}\sqrt{{{b}}}", r"\boxed{{{} \sqrt{{{}}}}}"),
    (rf"\frac{{{a}\pi}}{{{b}}}", r"\boxed{{\frac{{{} \pi}}{{{}}}}}"),
    (rf"{a}.{b:03d}^\circ", r"\boxed{{{}.{:03d}^{{\circ}}}}"),
    (f"x={a}.{b}", r"\boxed{{x = {}.{}}}"),
  )


def _formula(a: int, b: int) -> tuple[tuple[str, str], ...]:
  return (
    (f"{a}, {b}", r"\boxed{{{}, {}}}"),
    (f"({a}, {b})", r"\boxed{{\left({},{}\right)}}"),
    (f"[{a}, {b})", r"\boxed{{[{},{})}}"),
    (f"x^2 + {a}x - {b}", r"\boxed{{x^2+{}x-{}}}"),
  )


def _from_templates(templates: Callable[[int, int], tuple[tuple[str, str], ...]], low: int, high: int) -> Kind:
  """A kind of groups: one of the (gold, template of the completions) for a in [1, 1000) and b in [low, high)."""

  def group(rng):
    a, b = rng.randrange(1, 1000), rng.randrange(low, high)
    gold, answer = rng.choice(templates(a, b))
    return gold, [answer.format(a + number, b) for number in range(SAMPLES)]

  return group


def _cpu() -> float:
  """CPU seconds of this process and of workers that have ended."""
  usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
  return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def rate(kind: Kind, workers: int) -> str:
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
    (_from_templates(_short, 2, 1000), "fractions, decimals, percents, thousands"),
    (_from_templates(_simple, 2, 1000), "roots, multiples of pi, degrees, x = a"),
    (_from_templates(_formula, 1000, 2000), "lists, tuples, intervals, polynomials"),
  ):
    print(f"| {description} | {rate(kind, 1)} | {rate(kind, 2)} |", flush=True)


if __name__ == "__main__":
  main()
