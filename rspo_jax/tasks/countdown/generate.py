"""Makes Countdown problems with demonstrations, right and deliberately wrong.

Problems come from random expressions, so each is solvable by construction. The expressions are drawn and evaluated
many at a time in numpy, each value a pair of int64 (numerator, denominator) that is never reduced. That is exact as
long as nothing overflows; `CountdownSpec` refuses ranges that could.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from rspo_jax.tasks.countdown.problem import OPERATORS, Problem, Term, apply, canonical_operators, join

_CHUNK = 65536  # expressions drawn at a time
_DRY = 2**20  # expressions drawn without meeting a new problem before the universe counts as exhausted
_TRIES = 64  # wrong expressions tried before a problem counts as one without any


@dataclasses.dataclass(frozen=True)
class CountdownSpec:
  """Which problems to make.

  Attributes:
    numbers: how many numbers a problem has, 2 to 6.
    low, high: smallest and largest number, 1 <= low <= high.
    target_low, target_high: smallest and largest target, >= 1.
    operators: some of '+-*/'. A lone '+' or '*' is refused: every expression would be right.
    train, test: how many problems of each split, all distinct up to the order of their numbers.
    seed: the same spec gives the same problems in every process.
  Raises:
    ValueError: a field out of range, or numbers so large that int64 arithmetic would not be exact.
  """

  numbers: int = 3
  low: int = 1
  high: int = 20
  target_low: int = 1
  target_high: int = 100
  operators: str = OPERATORS
  train: int = 15_000
  test: int = 1_000
  seed: int = 0

  def __post_init__(self):
    object.__setattr__(self, "operators", canonical_operators(self.operators))
    if self.operators in ("+", "*"):
      raise ValueError(
        f"operators is {self.operators!r}: every expression over the numbers is right. Add another operator."
      )
    if not 2 <= self.numbers <= 6:
      raise ValueError(f"numbers is {self.numbers}; want 2 to 6 numbers in a problem.")
    for name in ("", "target_"):
      low, high = getattr(self, f"{name}low"), getattr(self, f"{name}high")
      if not 1 <= low <= high:
        raise ValueError(f"{name}low is {low} and {name}high is {high}; want 1 <= {name}low <= {name}high.")
    for name, least in (("train", 1), ("test", 1), ("seed", 0)):
      if getattr(self, name) < least:
        raise ValueError(f"{name} is {getattr(self, name)}; want {least} or more.")
    if self.high**self.numbers * 2**self.numbers >= 2**63 or self.target_high >= 2**31:
      raise ValueError(
        f"{self.numbers} numbers up to {self.high} with targets up to {self.target_high} are too large to compute "
        "with exactly in 64 bits. Lower high, numbers or target_high."
      )


class Worked(NamedTuple):
  """A problem, an expression that solves it, and one over the same numbers that does not."""

  problem: Problem
  right: str
  wrong: str


def make_problems(spec: CountdownSpec) -> dict[str, list[Worked]]:
  """{'train': spec.train problems, 'test': spec.test problems}, no two of which have the same `Problem.key`.

  A problem with many solutions is likelier to be drawn than one with few. Left out are the few problems whose every
  expression has the same value, as 2 and 2 with + and *.

  Raises:
    ValueError: fewer distinct problems were found than asked for; says how many and what to widen.
  """
  count = spec.train + spec.test
  rng = np.random.default_rng(spec.seed)
  seen: set[tuple] = set()
  made: list[Worked] = []
  draws, newest = 0, 0
  rows = min(_CHUNK, 1024 + 4 * count)
  while len(made) < count:
    if draws - newest > max(_DRY, draws // 2):
      raise ValueError(
        f"Found only {len(made)} distinct Countdown problems in {draws} random expressions; train + test asks "
        f"for {count}. Ask for fewer, or widen numbers ({spec.numbers}), low..high ({spec.low}..{spec.high}), "
        f"target_low..target_high ({spec.target_low}..{spec.target_high}) or operators ({spec.operators!r})."
      )
    fresh = _draw_solved(rng, rows, spec, seen)
    wrong = _wrong(rng, [problem for problem, _ in fresh], spec.operators)
    made.extend(Worked(*solved, text) for solved, text in zip(fresh, wrong, strict=True) if text)
    draws += rows
    newest = draws if fresh else newest
  # What is drawn first is easier than what is drawn last: without the permutation the splits would differ.
  order = rng.permutation(count)
  return {
    "test": [made[i] for i in order[: spec.test]],
    "train": [made[i] for i in order[spec.test :]],
  }


def solutions(problem: Problem, operators: str = OPERATORS) -> list[str]:
  """Every right expression without needless parentheses, sorted. Milliseconds for 3 numbers, seconds for 6."""
  target = Fraction(problem.target)
  everything = (1 << len(problem.numbers)) - 1
  # ways[chosen][value]: how the chosen numbers (a bit mask) can reach a value, by their last operation.
  ways: dict[int, dict[Fraction, list]] = {1 << i: {Fraction(number): []} for i, number in enumerate(problem.numbers)}
  for chosen in range(1, everything + 1):
    if chosen in ways:
      continue
    reached = ways[chosen] = {}
    for left, right in _halves(chosen):
      for a, b, operator in itertools.product(ways[left], ways[right], operators):
        value = apply(operator, a, b)
        if value is not None and (chosen != everything or value == target):
          reached.setdefault(value, []).append((operator, left, a, right, b))

  def derive(chosen: int, value: Fraction) -> Iterator[Term]:
    if chosen.bit_count() == 1:
      yield Term(str(value), 3)
    for operator, left, a, right, b in ways[chosen].get(value, ()):
      for first, second in itertools.product(derive(left, a), derive(right, b)):
        yield join(operator, first, second)

  return sorted({term.text for term in derive(everything, target)})


def demonstration(problem: Problem, rng: np.random.Generator, operators: str = OPERATORS) -> str:
  """One of `solutions`, each as likely. ValueError if there is none."""
  right = solutions(problem, operators)
  if not right:
    raise ValueError(f"{problem} cannot be solved with {operators!r}.")
  return right[rng.integers(len(right))]


def wrong_demonstration(problem: Problem, rng: np.random.Generator, operators: str = OPERATORS) -> str:
  """A valid expression over the right numbers with a wrong value, for warm starts that are noisy on purpose.

  Raises:
    ValueError: none was found, as for numbers 2 and 2 with target 4 and operators + and *.
  """
  (text,) = _wrong(rng, [problem], operators)
  if not text:
    raise ValueError(f"Every expression over {problem.numbers} with {operators!r} seems to equal {problem.target}.")
  return text


def _halves(chosen):
  """Every ordered way to part a bit mask into two that are not empty."""
  left = (chosen - 1) & chosen
  while left:
    yield left, chosen ^ left
    left = (left - 1) & chosen


def _draw_solved(rng, rows, spec, seen):
  """[(problem, expression that solves it)] from `rows` random expressions, but none whose key was seen before."""
  leaves = rng.integers(spec.low, spec.high + 1, size=(rows, spec.numbers))
  merges, numerator, denominator = _random_expressions(rng, leaves, spec.operators)
  defined = denominator != 0
  target, rest = np.divmod(numerator, np.where(defined, denominator, 1))
  fits = defined & (rest == 0) & (target >= spec.target_low) & (target <= spec.target_high)
  leaves, target, merges = leaves[fits], target[fits], merges[fits]
  fresh = []
  for row, key in enumerate(np.column_stack([np.sort(leaves, axis=1), target]).tolist()):
    if (key := tuple(key)) not in seen:
      seen.add(key)
      problem = Problem(tuple(leaves[row].tolist()), key[-1])
      fresh.append((problem, _text(problem.numbers, merges[row].tolist())))
  return fresh


def _wrong(rng, problems: Sequence[Problem], operators: str) -> list[str]:
  """Per problem, all of them equally many numbers, a valid expression with another value; '' if none was found."""
  texts = [""] * len(problems)
  left = np.arange(len(problems))
  leaves = np.array([problem.numbers for problem in problems], np.int64)
  targets = np.array([problem.target for problem in problems], np.int64)
  for _ in range(_TRIES):
    if not left.size:
      break
    merges, numerator, denominator = _random_expressions(rng, leaves[left], operators)
    # Should the product wrap around, a wrong expression may pass for a right one and be drawn again: no harm done.
    wrong = (denominator != 0) & (numerator != targets[left] * denominator)
    for index, steps in zip(left[wrong], merges[wrong].tolist(), strict=True):
      texts[index] = _text(problems[index].numbers, steps)
    left = left[~wrong]
  return texts


def _random_expressions(rng, leaves, operators):
  """Joins two random parts of each row until one is left.

  Args:
    leaves: [N, n] int64.
  Returns:
    merges [N, n - 1, 3]: positions of the left and the right part, and the operator's index in OPERATORS, for `_text`;
    numerator [N]; denominator [N], 0 where something was divided by zero.
  """
  count, size = leaves.shape
  row = np.arange(count)
  choice = np.array([OPERATORS.index(operator) for operator in operators])
  numerator, denominator = leaves.copy(), np.ones_like(leaves)
  merges = np.empty((count, size - 1, 3), np.int64)
  for step, parts in enumerate(range(size, 1, -1)):
    i = rng.integers(parts, size=count)
    j = rng.integers(parts - 1, size=count)
    j += j >= i
    operator = choice[rng.integers(len(choice), size=count)]
    a, b, c, d = numerator[row, i], denominator[row, i], numerator[row, j], denominator[row, j]
    # A division by zero, or by something undefined (0 / 0), leaves a denominator of 0; every operation keeps that.
    numerator[row, i] = np.choose(operator, [a * d + b * c, a * d - b * c, a * c, np.where(c == 0, 0, a * d)])
    denominator[row, i] = np.choose(operator, [b * d, b * d, b * d, b * c])
    numerator[row, j], denominator[row, j] = numerator[:, parts - 1], denominator[:, parts - 1]
    merges[:, step] = np.stack([i, j, operator], axis=1)
  return merges, numerator[row, i], denominator[row, i]


def _text(numbers, merges):
  """The expression that `merges` of one row stand for."""
  terms = [Term(str(number), 3) for number in numbers]
  for i, j, operator in merges:
    terms[i] = join(OPERATORS[operator], terms[i], terms[j])
    terms[j] = terms[-1]
    terms.pop()
  return terms[0].text
