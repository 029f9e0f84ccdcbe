"""Makes Knights and Knaves problems, no two of them the same, with a wrong answer to each.

A problem's answer is drawn first, every assignment of roles as likely as any other, and then statements that fit it
until nothing else fits them: so no answer is favoured, and guessing is right one time in 2^people.
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
  roles_of,
  solutions,
  truth_table,
)

_DRY = 2**13  # candidates drawn without meeting a new problem before the universe counts as exhausted
_TRIES = 256  # candidates with one answer before another answer is drawn: some answers have few problems or none
_STATEMENTS = 32  # statements drawn for an islander before a candidate is given up
_COUNTS = 0.25  # share of counts among the simplest statements, if there are any


@dataclasses.dataclass(frozen=True)
class KnightsSpec:
  """Which problems to make. What makes them harder: more people, more depth, more operators.

  Attributes:
    people: islanders, 2 to 8.
    depth: operators within each other, 0 to 4; that of each statement is drawn from 0 to depth. At 0 a statement says
      that somebody is a knight or a knave, or counts knights.
    operators: some of '!&|>=#', of which '!' negates what is deeper than 0 and '#' counts knights.
    train, test: how many problems of each split. No two are the same (see `key`), but for `namings`.
    namings: of each training problem, which comes under so many different names; the test split has every problem once.
    seed: the same spec gives the same problems in every process.
  Raises:
    ValueError: a field out of range, or operators that do not reach the depth or, at depth 0, any unique solution.
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
      # 'B is a knight' puts the speaker and B on one side, 'B is a knave' on two: so what fits, fits reversed as well.
      raise ValueError("At depth 0 without '#' no problem has exactly one solution. Add '#', or raise depth.")
    if not 1 <= self.namings <= math.factorial(self.people):
      raise ValueError(f"namings is {self.namings}; {self.people} islanders have 1 to {math.factorial(self.people)}.")
    for name, least in (("train", 1), ("test", 1), ("seed", 0)):
      if getattr(self, name) < least:
        raise ValueError(f"{name} is {getattr(self, name)}; want {least} or more.")


class Worked(NamedTuple):
  """A problem, and roles that do not solve it."""

  problem: Problem
  wrong: Roles


def make_problems(spec: KnightsSpec) -> dict[str, list[Worked]]:
  """{'train': spec.train problems, 'test': spec.test problems}; only namings of one problem have the same `key`.

  Raises:
    ValueError: fewer distinct problems were found than asked for; says how many and what to widen.
  """
  count = -(-spec.train // spec.namings) + spec.test
  rng = random.Random(spec.seed)
  seen: set[bytes] = set()
  made: list[Worked] = []
  draws, newest, case, tries = 0, 0, 0, 0
  while len(made) < count:
    if draws - newest > _DRY:
      raise ValueError(
        f"Found only {len(made)} distinct Knights and Knaves problems in {draws} random ones; train and test ask for "
        f"{count}. Ask for fewer, or raise people ({spec.people}), depth ({spec.depth}), the number of operators "
        f"({spec.operators!r}) or namings ({spec.namings})."
      )
    if not tries:
      case, tries = rng.randrange(2**spec.people), _TRIES
    draws, tries = draws + 1, tries - 1
    problem = _draw(rng, spec, case)
    if problem is None or (found := key(problem)) in seen:
      continue
    seen.add(found)
    made.append(Worked(problem, _other(problem.solution, rng.randrange(2**spec.people - 1))))
    newest, tries = draws, 0
  # What is drawn last comes from answers with many problems: without the permutation the splits would differ.
  rng.shuffle(made)
  orders = list(itertools.permutations(range(spec.people)))
  train = [_rename(worked, order) for worked in made[spec.test :] for order in rng.sample(orders, spec.namings)]
  rng.shuffle(train)
  return {"test": made[: spec.test], "train": train[: spec.train]}


def _rename(worked, order) -> Worked:
  """Islander i is called what islander order[i] was called."""

  def renamed(statement):
    operator, *parts = statement
    if operator == "is":
      return ("is", order[parts[0]])
    return statement if operator == "#" else (operator, *map(renamed, parts))

  said = {order[i]: renamed(statement) for i, statement in enumerate(worked.problem.statements)}
  wrong = {order[i]: role for i, role in enumerate(worked.wrong)}
  everybody = range(len(order))
  return Worked(Problem(tuple(said[i] for i in everybody)), tuple(wrong[i] for i in everybody))


def demonstration(problem: Problem, style: str = "compact") -> str:
  """The right answer."""
  return answer_text(problem.solution, style)


def wrong_demonstration(problem: Problem, rng: np.random.Generator, style: str = "compact") -> str:
  """A well-formed wrong answer, each as likely, for warm starts that are noisy on purpose."""
  return answer_text(_other(problem.solution, int(rng.integers(2 ** len(problem.solution) - 1))), style)


def _other(solution, index):
  """The assignment with this index among all but the solution."""
  number = int("".join(str(int(role)) for role in solution), 2)
  return roles_of(index + (index >= number), len(solution))


def _draw(rng, spec, case) -> Problem | None:
  """A problem whose solution is this assignment, or None if the statements drawn do not make one."""
  roles = roles_of(case, spec.people)
  statements = []
  for person, role in enumerate(roles):
    statement = _fitting(rng, spec, person, case, role)
    if statement is None:
      return None
    statements.append(statement)
  return Problem(tuple(statements)) if len(solutions(statements)) == 1 else None


def _fitting(rng, spec, person, case, truth) -> Statement | None:
  """A statement that is true in this assignment or not, as asked, and that says something; or None after some tries.

  What is true or false whatever the roles says nothing, nor does 'I am a knight'; and no operator may be idle.
  """
  for _ in range(_STATEMENTS):
    statement = _statement(rng, spec, rng.randint(0, spec.depth))
    table = truth_table(statement, spec.people)
    if bool(table >> case & 1) != truth or table == truth_table(("is", person), spec.people):
      continue
    if 0 < table < (1 << 2**spec.people) - 1 and not _idle(statement, spec.people):
      return statement
  return None


def _statement(rng, spec, depth) -> Statement:
  if depth == 0:
    if "#" in spec.operators and rng.random() < _COUNTS:
      return ("#", rng.randint(0, spec.people))
    person = ("is", rng.randrange(spec.people))
    return person if rng.random() < 0.5 else ("!", person)
  operator = rng.choice(spec.operators.replace("#", "").replace("!", "" if depth == 1 else "!"))
  if operator == "!":
    return ("!", _statement(rng, spec, depth - 1))
  parts = [_statement(rng, spec, depth - 1), _statement(rng, spec, rng.randint(0, depth - 1))]
  rng.shuffle(parts)
  return (operator, *parts)


def _idle(statement, people) -> bool:
  """Some operator could be left out: what it joins is equivalent to a part of it, or to its negation, or constant."""
  operator, *parts = statement
  if operator in ("is", "#"):
    return False
  if operator == "!":
    return parts[0][0] == "!" or _idle(parts[0], people)
  everywhere = (1 << 2**people) - 1
  known = {0, everywhere}
  for part in parts:
    table = truth_table(part, people)
    known |= {table, table ^ everywhere}
  return truth_table(statement, people) in known or any(_idle(part, people) for part in parts)


def key(problem: Problem) -> bytes:
  """What makes two problems the same: what is said, however it is worded, and whatever the islanders are called.

  Problems have one key if and only if some renaming of the islanders makes each statement of the one true in the same
  assignments as its namesake's in the other. The key is the smallest array of truth tables over the renamings that
  colour refinement leaves open (individualisation and refinement, as in McKay and Piperno, arXiv 1301.1493).
  """
  people = len(problem.statements)
  # [speaker, role of A, role of B, ...]: to rename is to permute axes.
  tables = np.empty((people, *[2] * people), bool)
  for person, statement in enumerate(problem.statements):
    table = truth_table(statement, people).to_bytes(max(1, 2**people // 8), "little")
    bits = np.unpackbits(np.frombuffer(table, np.uint8), count=2**people, bitorder="little")
    tables[person] = bits.reshape([2] * people)
  pairs = _pairs(tables)

  def smallest(colours: list[int]) -> bytes:
    colours = _refine(colours, pairs)
    classes = [[i for i in range(people) if colours[i] == colour] for colour in sorted(set(colours))]
    open_class = next((members for members in classes if len(members) > 1), None)
    if open_class is None:
      return np.packbits(_renamed(tables, np.argsort(colours))).tobytes()
    chosen: list[int] = []
    for member in open_class:
      # Of islanders that can change places without any other change, one stands for all.
      if not any(np.array_equal(tables, _renamed(tables, _swap(people, member, other))) for other in chosen):
        chosen.append(member)
    return min(smallest([2 * colour - (i == member) for i, colour in enumerate(colours)]) for member in chosen)

  return bytes([people]) + smallest([0] * people)


def _renamed(tables, order):
  """The truth tables after islander order[i] became islander i."""
  return tables[order].transpose(0, *(1 + np.asarray(order)))


def _swap(people, i, j):
  order = list(range(people))
  order[i], order[j] = j, i
  return order


def _pairs(tables):
  """[i][j]: numbers about islanders i and j that no renaming changes: in how many assignments the statement of i is
  true and j a knight, and in how many of these i is a knight too; and the other way round."""
  people = len(tables)
  flat = tables.reshape(people, -1).astype(int)
  roles = np.stack([np.arange(2**people) >> (people - 1 - i) & 1 for i in range(people)])
  counts = np.stack([flat @ roles.T, (flat * roles) @ roles.T], axis=-1)
  both_ways = np.concatenate([counts, counts.swapaxes(0, 1)], axis=-1)
  return [[tuple(numbers) for numbers in row] for row in both_ways.tolist()]


def _refine(colours, pairs):
  """Splits classes of islanders until their colours tell all that the pairs do, and numbers the classes by that."""
  everybody = range(len(colours))
  while True:
    signs = [(colours[i], pairs[i][i], *sorted((colours[j], pairs[i][j]) for j in everybody)) for i in everybody]
    distinct = sorted(set(signs))
    refined = [distinct.index(sign) for sign in signs]
    if len(distinct) == len(set(colours)):
      return refined
    colours = refined
