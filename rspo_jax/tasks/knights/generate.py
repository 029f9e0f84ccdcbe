"""Generates distinct Knights and Knaves problems, each with a wrong answer.

The solution of a problem is sampled first, uniformly over all assignments of roles; then statements consistent with it
are sampled until it is the only consistent assignment. So all answers are equally likely, and a guess is correct with
probability 2^-people.
"""

import dataclasses
import itertools
import math
import random
from typing import NamedTuple

import numpy as np

from rspo_jax.tasks.knights.problem import (
  JOINING,
  LETTERS,
  MAX_DEPTH,
  OPERATORS,
  Problem,
  Roles,
  Statement,
  answer_text,
  canonical_operators,
  roles_from_index,
  solutions,
  truth_table,
)

_PATIENCE = 2**13  # candidates sampled without a new problem before generation gives up
_TRIES = 256  # candidates per solution before another one is sampled, since some solutions have few problems or none
_STATEMENT_TRIES = 32  # statements sampled for an islander before a candidate is rejected
_COUNT_SHARE = 0.25  # probability of a count among statements of depth 0, if counts are allowed


@dataclasses.dataclass(frozen=True)
class KnightsSpec:
  """Specification of the problems to generate; more people, depth and operators make them harder.

  Attributes:
    people: number of islanders, 2 to 8.
    depth: largest number of nested operators, 0 to 4; sampled from 0 to depth for each statement. A statement of depth
      0 says that an islander is a knight or a knave, or counts the knights.
    operators: a subset of '!&|>=#'; '!' negates statements deeper than 0, '#' counts knights.
    train, test: number of problems of each split, all distinct (see `key`) except for `namings`.
    namings: number of permutations of the names with which each training problem is included; the test split contains
      each problem once.
    seed: random seed, >= 0. Equal specs give equal problems in every process.
  Raises:
    ValueError: a field out of range, operators that cannot reach the depth, or depth 0 without '#', where no problem
      has a unique solution.
  """

  people: int = 3
  depth: int = 1
  operators: str = OPERATORS
  train: int = 4096
  test: int = 512
  namings: int = 1
  seed: int = 0

  def __post_init__(self):
    object.__setattr__(self, "operators", canonical_operators(self.operators))
    if not 2 <= self.people <= len(LETTERS):
      raise ValueError(f"people is {self.people}; want 2 to {len(LETTERS)} islanders.")
    if not 0 <= self.depth <= MAX_DEPTH // 2:
      raise ValueError(f"depth is {self.depth}; want 0 to {MAX_DEPTH // 2}.")
    if self.depth and not set(self.operators) & set(JOINING):
      raise ValueError(f"operators is {self.operators!r}; depth {self.depth} needs one of {JOINING!r}, or set depth=0.")
    if not self.depth and "#" not in self.operators:
      # 'B is a knight' means that speaker and B have the same role, 'B is a knave' that their roles differ. So the
      # complement of a consistent assignment is consistent too.
      raise ValueError("At depth 0 without '#' no problem has exactly one solution. Add '#', or raise depth.")
    if not 1 <= self.namings <= math.factorial(self.people):
      raise ValueError(f"namings is {self.namings}; {self.people} islanders have 1 to {math.factorial(self.people)}.")
    for name, minimum in (("train", 1), ("test", 1), ("seed", 0)):
      if getattr(self, name) < minimum:
        raise ValueError(f"{name} is {getattr(self, name)}; want {minimum} or more.")


class SolvedProblem(NamedTuple):
  """A problem, which contains its solution, and roles that do not solve it."""

  problem: Problem
  wrong_answer: Roles


def make_problems(spec: KnightsSpec) -> dict[str, list[SolvedProblem]]:
  """{'train': spec.train problems, 'test': spec.test problems}; only namings of one problem have the same `key`.

  Raises:
    ValueError: fewer distinct problems exist than requested; the message gives their number and the fields to widen.
  """
  count = -(-spec.train // spec.namings) + spec.test
  rng = random.Random(spec.seed)
  seen: set[bytes] = set()
  problems: list[SolvedProblem] = []
  samples, last_new = 0, 0  # candidates sampled in all, and up to the last new problem
  solution, tries = 0, 0
  while len(problems) < count:
    if samples - last_new > _PATIENCE:
      raise ValueError(
        f"Found only {len(problems)} distinct Knights and Knaves problems in {samples} random ones; train and test "
        f"need {count}. Ask for fewer, or raise people ({spec.people}), depth ({spec.depth}), the number of operators "
        f"({spec.operators!r}) or namings ({spec.namings})."
      )
    if not tries:
      solution, tries = rng.randrange(2**spec.people), _TRIES
    samples, tries = samples + 1, tries - 1
    problem = _sample_problem(rng, spec, solution)
    if problem is None or (problem_key := key(problem)) in seen:
      continue
    seen.add(problem_key)
    problems.append(SolvedProblem(problem, _wrong_roles(problem.solution, rng.randrange(2**spec.people - 1))))
    last_new, tries = samples, 0
  # Problems sampled late belong to solutions with many problems; shuffling gives both splits the same distribution.
  rng.shuffle(problems)
  orders = list(itertools.permutations(range(spec.people)))
  train = [_rename(row, order) for row in problems[spec.test :] for order in rng.sample(orders, spec.namings)]
  rng.shuffle(train)
  return {"test": problems[: spec.test], "train": train[: spec.train]}


def _rename(row, order) -> SolvedProblem:
  """Gives islander i the name that islander order[i] had."""

  def renamed(statement):
    operator, *parts = statement
    if operator == "is":
      return ("is", order[parts[0]])
    return statement if operator == "#" else (operator, *map(renamed, parts))

  statements = {order[i]: renamed(statement) for i, statement in enumerate(row.problem.statements)}
  wrong = {order[i]: role for i, role in enumerate(row.wrong_answer)}
  people = range(len(order))
  return SolvedProblem(Problem(tuple(statements[i] for i in people)), tuple(wrong[i] for i in people))


def demonstration(problem: Problem, style: str = "compact") -> str:
  """The text of the solution."""
  return answer_text(problem.solution, style)


def wrong_demonstration(problem: Problem, rng: np.random.Generator, style: str = "compact") -> str:
  """A well-formed wrong answer, sampled uniformly, for supervised warm starts with deliberate errors."""
  return answer_text(_wrong_roles(problem.solution, int(rng.integers(2 ** len(problem.solution) - 1))), style)


def _wrong_roles(solution, index):
  """The assignment with this index among all assignments except the solution."""
  solution_index = int("".join(str(int(role)) for role in solution), 2)
  return roles_from_index(index + (index >= solution_index), len(solution))


def _sample_problem(rng, spec, solution) -> Problem | None:
  """A problem with this solution (an index), or None if the sampled statements do not determine it."""
  roles = roles_from_index(solution, spec.people)
  statements = []
  for person, role in enumerate(roles):
    statement = _sample_consistent(rng, spec, person, solution, role)
    if statement is None:
      return None
    statements.append(statement)
  return Problem(tuple(statements)) if len(solutions(statements)) == 1 else None


def _sample_consistent(rng, spec, person, assignment, truth) -> Statement | None:
  """An informative statement of `person` whose value in an assignment (an index) is `truth`; None after some tries.

  Tautologies, contradictions and 'I am a knight' are not informative. Statements with redundant operators are rejected.
  """
  for _ in range(_STATEMENT_TRIES):
    statement = _sample_statement(rng, spec, rng.randint(0, spec.depth))
    table = truth_table(statement, spec.people)
    if bool(table >> assignment & 1) != truth or table == truth_table(("is", person), spec.people):
      continue
    if 0 < table < (1 << 2**spec.people) - 1 and not _has_redundant_operator(statement, spec.people):
      return statement
  return None


def _sample_statement(rng, spec, depth) -> Statement:
  if depth == 0:
    if "#" in spec.operators and rng.random() < _COUNT_SHARE:
      return ("#", rng.randint(0, spec.people))
    person = ("is", rng.randrange(spec.people))
    return person if rng.random() < 0.5 else ("!", person)
  operator = rng.choice(spec.operators.replace("#", "").replace("!", "" if depth == 1 else "!"))
  if operator == "!":
    return ("!", _sample_statement(rng, spec, depth - 1))
  parts = [_sample_statement(rng, spec, depth - 1), _sample_statement(rng, spec, rng.randint(0, depth - 1))]
  rng.shuffle(parts)
  return (operator, *parts)


def _has_redundant_operator(statement, people) -> bool:
  """Whether a compound statement in it is constant, or equivalent to one of its parts or to the negation of one."""
  operator, *parts = statement
  if operator in ("is", "#"):
    return False
  if operator == "!":
    return parts[0][0] == "!" or _has_redundant_operator(parts[0], people)
  always = (1 << 2**people) - 1
  simpler = {0, always}
  for part in parts:
    table = truth_table(part, people)
    simpler |= {table, table ^ always}
  return truth_table(statement, people) in simpler or any(_has_redundant_operator(part, people) for part in parts)


def key(problem: Problem) -> bytes:
  """A canonical form: equal for problems that differ only in the names of islanders and the wording of statements.

  Two problems have the same key if and only if a permutation of the islanders makes the truth tables of their
  statements equal. The key is the smallest array of truth tables over the permutations that colour refinement does not
  exclude (individualisation and refinement, as in McKay and Piperno, arXiv 1301.1493).
  """
  people = len(problem.statements)
  # [speaker, role of A, role of B, ...]; renaming permutes the axes.
  tables = np.empty((people, *[2] * people), bool)
  for person, statement in enumerate(problem.statements):
    table = truth_table(statement, people).to_bytes(max(1, 2**people // 8), "little")
    bits = np.unpackbits(np.frombuffer(table, np.uint8), count=2**people, bitorder="little")
    tables[person] = bits.reshape([2] * people)
  pairs = _pair_invariants(tables)

  def smallest(colours: list[int]) -> bytes:
    colours = _refine(colours, pairs)
    classes = [[i for i in range(people) if colours[i] == colour] for colour in sorted(set(colours))]
    open_class = next((members for members in classes if len(members) > 1), None)
    if open_class is None:
      return np.packbits(_permuted(tables, np.argsort(colours))).tobytes()
    chosen: list[int] = []
    for member in open_class:
      # Of islanders whose exchange leaves the tables unchanged, one is enough.
      if not any(np.array_equal(tables, _permuted(tables, _swap(people, member, other))) for other in chosen):
        chosen.append(member)
    return min(smallest([2 * colour - (i == member) for i, colour in enumerate(colours)]) for member in chosen)

  return bytes([people]) + smallest([0] * people)


def _permuted(tables, order):
  """The truth tables after islander order[i] has become islander i."""
  return tables[order].transpose(0, *(1 + np.asarray(order)))


def _swap(people, i, j):
  order = list(range(people))
  order[i], order[j] = j, i
  return order


def _pair_invariants(tables):
  """[i][j]: counts for islanders i and j that renaming does not change: assignments in which i's statement is true and
  j is a knight, those in which i is a knight as well, and both counts with i and j exchanged."""
  people = len(tables)
  flat = tables.reshape(people, -1).astype(int)
  roles = np.stack([np.arange(2**people) >> (people - 1 - i) & 1 for i in range(people)])
  counts = np.stack([flat @ roles.T, (flat * roles) @ roles.T], axis=-1)
  symmetric = np.concatenate([counts, counts.swapaxes(0, 1)], axis=-1)
  return [[tuple(numbers) for numbers in row] for row in symmetric.tolist()]


def _refine(colours, pairs):
  """Colour refinement: splits classes of islanders by their invariants until the partition is stable.

  The new colours are the ranks of the classes in the order of their invariants.
  """
  people = range(len(colours))
  while True:
    signatures = [(colours[i], pairs[i][i], *sorted((colours[j], pairs[i][j]) for j in people)) for i in people]
    distinct = sorted(set(signatures))
    refined = [distinct.index(signature) for signature in signatures]
    if len(distinct) == len(set(colours)):
      return refined
    colours = refined
