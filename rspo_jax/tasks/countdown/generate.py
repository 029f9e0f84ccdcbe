"""Generates Countdown problems with demonstrations: a solution, and an expression that is deliberately wrong.

Problems are generated from random expressions, so each one is solvable by construction. Expressions are sampled and
evaluated in numpy batches, with values as unreduced int64 fractions (numerator, denominator). This is exact unless
int64 overflows; `CountdownSpec` refuses ranges that could overflow.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from rspo_jax.tasks.countdown.problem import OPERATORS, Problem, Term, apply, canonical_operators, join

_BATCH = 65536  # largest number of expressions sampled together
_PATIENCE = 2**20  # expressions sampled without a new problem before generation gives up
_TRIES = 64  # expressions sampled per problem to find a wrong one


@dataclasses.dataclass(frozen=True)
class CountdownSpec:
  """Specification of the problems to generate.

  Attributes:
    numbers: count of numbers in a problem, 2 to 6.
    low, high: smallest and largest number, 1 <= low <= high.
    target_low, target_high: smallest and largest target, >= 1.
    operators: a subset of '+-*/'. A single '+' or '*' is refused, because every expression would be correct.
    train, test: number of problems of each split, all distinct up to the order of their numbers.
    seed: random seed, >= 0. Equal specs give equal problems in every process.
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
        f"operators is {self.operators!r}: every expression over the numbers is correct. Add another operator."
      )
    if not 2 <= self.numbers <= 6:
      raise ValueError(f"numbers is {self.numbers}; want 2 to 6 numbers in a problem.")
    for name in ("", "target_"):
      low, high = getattr(self, f"{name}low"), getattr(self, f"{name}high")
      if not 1 <= low <= high:
        raise ValueError(f"{name}low is {low} and {name}high is {high}; want 1 <= {name}low <= {name}high.")
    for name, minimum in (("train", 1), ("test", 1), ("seed", 0)):
      if getattr(self, name) < minimum:
        raise ValueError(f"{name} is {getattr(self, name)}; want {minimum} or more.")
    if self.high**self.numbers * 2**self.numbers >= 2**63 or self.target_high >= 2**31:
      raise ValueError(
        f"{self.numbers} numbers up to {self.high} with targets up to {self.target_high} are too large for exact "
        "arithmetic in 64 bits. Lower high, numbers or target_high."
      )


class SolvedProblem(NamedTuple):
  """A problem, an expression that solves it, and a valid expression over the same numbers that does not."""

  problem: Problem
  solution: str
  wrong_answer: str


def make_problems(spec: CountdownSpec) -> dict[str, list[SolvedProblem]]:
  """{'train': spec.train problems, 'test': spec.test problems}; all have different `Problem.key`.

  Problems with many solutions are more likely than those with few. Problems without a wrong expression are excluded,
  such as 2 and 2 with target 4 and operators + and *.

  Raises:
    ValueError: fewer distinct problems exist than requested; the message gives their number and the fields to widen.
  """
  count = spec.train + spec.test
  rng = np.random.default_rng(spec.seed)
  seen: set[tuple] = set()
  problems: list[SolvedProblem] = []
  samples, last_new = 0, 0  # expressions sampled in all, and up to the last new problem
  rows = min(_BATCH, 1024 + 4 * count)
  while len(problems) < count:
    if samples - last_new > max(_PATIENCE, samples // 2):
      raise ValueError(
        f"Found only {len(problems)} distinct Countdown problems in {samples} random expressions; want train + test = "
        f"{count}. Ask for fewer, or widen numbers ({spec.numbers}), low..high ({spec.low}..{spec.high}), "
        f"target_low..target_high ({spec.target_low}..{spec.target_high}) or operators ({spec.operators!r})."
      )
    new = _sample_solved(rng, rows, spec, seen)
    wrong = _wrong_answers(rng, [problem for problem, _ in new], spec.operators)
    problems.extend(SolvedProblem(*solved, text) for solved, text in zip(new, wrong, strict=True) if text)
    samples += rows
    last_new = samples if new else last_new
  # Problems sampled early have more solutions than later ones; the permutation makes the splits equally hard.
  order = rng.permutation(count)
  return {
    "test": [problems[i] for i in order[: spec.test]],
    "train": [problems[i] for i in order[spec.test :]],
  }


def solutions(problem: Problem, operators: str = OPERATORS) -> list[str]:
  """All expressions that solve the problem, without redundant parentheses, sorted.

  Takes milliseconds for 3 numbers, seconds for 6.
  """
  target = Fraction(problem.target)
  all_numbers = (1 << len(problem.numbers)) - 1
  # ways[subset][value]: the last operations by which a subset of the numbers (a bit mask) can reach a value.
  ways: dict[int, dict[Fraction, list]] = {1 << i: {Fraction(number): []} for i, number in enumerate(problem.numbers)}
  for subset in range(1, all_numbers + 1):
    if subset in ways:
      continue
    reached = ways[subset] = {}
    for left, right in _partitions(subset):
      for a, b, operator in itertools.product(ways[left], ways[right], operators):
        value = apply(operator, a, b)
        if value is not None and (subset != all_numbers or value == target):
          reached.setdefault(value, []).append((operator, left, a, right, b))

  def derive(subset: int, value: Fraction) -> Iterator[Term]:
    if subset.bit_count() == 1:
      yield Term(str(value), 3)
    for operator, left, a, right, b in ways[subset].get(value, ()):
      for first, second in itertools.product(derive(left, a), derive(right, b)):
        yield join(operator, first, second)

  return sorted({term.text for term in derive(all_numbers, target)})


def demonstration(problem: Problem, rng: np.random.Generator, operators: str = OPERATORS) -> str:
  """One of `solutions`, sampled uniformly. Raises ValueError if there is none."""
  texts = solutions(problem, operators)
  if not texts:
    raise ValueError(f"{problem} cannot be solved with {operators!r}.")
  return texts[rng.integers(len(texts))]


def wrong_demonstration(problem: Problem, rng: np.random.Generator, operators: str = OPERATORS) -> str:
  """A valid expression with another value than the target, for supervised warm starts with deliberate errors.

  Raises:
    ValueError: none was found, as for numbers 2 and 2 with target 4 and operators + and *.
  """
  (text,) = _wrong_answers(rng, [problem], operators)
  if not text:
    raise ValueError(f"Every expression over {problem.numbers} with {operators!r} seems to equal {problem.target}.")
  return text


def _partitions(subset):
  """All ordered partitions of a bit mask into two non-empty bit masks."""
  left = (subset - 1) & subset
  while left:
    yield left, subset ^ left
    left = (left - 1) & subset


def _sample_solved(rng, rows, spec, seen):
  """[(problem, solution)] from `rows` random expressions, for problems whose key is not in `seen`; adds the keys."""
  leaves = rng.integers(spec.low, spec.high + 1, size=(rows, spec.numbers))
  merges, numerator, denominator = _random_expressions(rng, leaves, spec.operators)
  defined = denominator != 0
  target, remainder = np.divmod(numerator, np.where(defined, denominator, 1))
  usable = defined & (remainder == 0) & (target >= spec.target_low) & (target <= spec.target_high)
  leaves, target, merges = leaves[usable], target[usable], merges[usable]
  new = []
  for row, key in enumerate(np.column_stack([np.sort(leaves, axis=1), target]).tolist()):
    if (key := tuple(key)) not in seen:
      seen.add(key)
      problem = Problem(tuple(leaves[row].tolist()), key[-1])
      new.append((problem, _text(problem.numbers, merges[row].tolist())))
  return new


def _wrong_answers(rng, problems: Sequence[Problem], operators: str) -> list[str]:
  """For each problem a valid expression with another value, '' if none was found. All have equally many numbers."""
  texts = [""] * len(problems)
  remaining = np.arange(len(problems))
  leaves = np.array([problem.numbers for problem in problems], np.int64)
  targets = np.array([problem.target for problem in problems], np.int64)
  for _ in range(_TRIES):
    if not remaining.size:
      break
    merges, numerator, denominator = _random_expressions(rng, leaves[remaining], operators)
    # If the product overflows, a wrong expression may be taken for a correct one; then another one is sampled.
    wrong = (denominator != 0) & (numerator != targets[remaining] * denominator)
    for index, steps in zip(remaining[wrong], merges[wrong].tolist(), strict=True):
      texts[index] = _text(problems[index].numbers, steps)
    remaining = remaining[~wrong]
  return texts


def _random_expressions(rng, leaves, operators):
  """Samples an expression for each row of numbers by joining two random parts until one is left.

  Args:
    leaves: [N, n] int64.
  Returns:
    merges [N, n - 1, 3]: positions of the left and the right part, and the operator's index in OPERATORS, for `_text`;
    numerator [N]; denominator [N], 0 for a division by zero.
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
    # A division by zero or by an undefined value gives denominator 0, which all later operations preserve.
    numerator[row, i] = np.choose(operator, [a * d + b * c, a * d - b * c, a * c, np.where(c == 0, 0, a * d)])
    denominator[row, i] = np.choose(operator, [b * d, b * d, b * d, b * c])
    numerator[row, j], denominator[row, j] = numerator[:, parts - 1], denominator[:, parts - 1]
    merges[:, step] = np.stack([i, j, operator], axis=1)
  return merges, numerator[row, i], denominator[row, i]


def _text(numbers, merges):
  """The expression described by one row of `merges`."""
  terms = [Term(str(number), 3) for number in numbers]
  for i, j, operator in merges:
    terms[i] = join(OPERATORS[operator], terms[i], terms[j])
    terms[j] = terms[-1]
    terms.pop()
  return terms[0].text
