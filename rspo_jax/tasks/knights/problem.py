r"""Knights and Knaves: knights always tell the truth, knaves always lie; find the role of each islander.

Each islander makes one statement about the roles of all, and exactly one assignment of roles is consistent with the
statements. The compact prompt of a problem is `"A:!B;B:A&C;C:#2?"` (B is a knave; A and C are knights; exactly two of
us are knights), and `"A1B0C0"` solves it, where 1 means knight. The English prompt gives the islanders names and asks
for the answer in `\boxed{}`. The domain follows Xie et al., "On Memorization of Large Language Models in Logical
Reasoning", arXiv 2410.23123. `rspo_jax.tasks.knights.generate` generates problems; `rspo_jax.tasks.knights.answers`
parses English answers.
"""

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import NamedTuple

from rspo_jax.tasks.knights.answers import roles_from_english

STYLES = ("compact", "english")
LETTERS = "ABCDEFGH"
NAMES = ("Alice", "Bob", "Carol", "David", "Eve", "Frank", "Grace", "Henry")
OPERATORS = "!&|>=#"  # not, and, or, implies, if and only if, exactly k of us are knights
JOINING = "&|>="  # the binary operators
ALPHABET = "ABCDEFGH012345678!&|>=#():;?"  # all characters of compact prompts and answers
MAX_DEPTH = 8  # nested operators in a statement

# A statement: ("is", i), islander i is a knight; ("#", k), exactly k islanders are; ("!", statement); or
# (operator, statement, statement) with one of JOINING.
Statement = tuple
Roles = tuple[bool, ...]  # of the islanders in order; True for a knight


@dataclasses.dataclass(frozen=True)
class Problem:
  """The statements of the islanders, and the only assignment of roles that is consistent with them.

  Attributes:
    statements: one per islander, 2 to 8, in order.
    solution: the roles, found by exhaustive search.
  Raises:
    ValueError: another number of islanders, a malformed statement, or no or several consistent assignments.
  """

  statements: tuple[Statement, ...]
  solution: Roles = dataclasses.field(init=False)

  def __post_init__(self):
    if not isinstance(self.statements, tuple) or not 2 <= len(self.statements) <= len(LETTERS):
      raise ValueError(f"statements is {self.statements!r}; want a tuple of 2 to {len(LETTERS)} statements.")
    for statement in self.statements:
      _check_statement(statement, len(self.statements), 0)
    consistent = solutions(self.statements)
    if len(consistent) != 1:
      raise ValueError(
        f"{len(consistent)} assignments of roles satisfy {compact_text(self.statements)!r}; want exactly one."
      )
    object.__setattr__(self, "solution", consistent[0])


class Verdict(NamedTuple):
  """The result of checking an answer.

  Attributes:
    valid: it has the requested form and gives exactly one role to each islander.
    correct: the roles are those of the solution.
    reason: for a valid answer 'right' or 'wrong'; for an invalid compact answer 'not an answer'; for an invalid English
      answer see `answers.roles_from_english`.
    answer: the roles in compact form for either style, for example 'A1B0'; '' if not valid.
  """

  valid: bool
  correct: bool
  reason: str
  answer: str = ""


def canonical_operators(operators: str) -> str:
  """The operators in the order of OPERATORS. Raises ValueError for a repeated or an unknown one."""
  chosen = "".join(operator for operator in OPERATORS if operator in operators)
  if len(chosen) != len(operators):
    raise ValueError(f"operators is {operators!r}; want some of {OPERATORS!r}, each at most once.")
  return chosen


def check_style(style: str) -> None:
  """Raises ValueError for a style that is not in STYLES."""
  if style not in STYLES:
    raise ValueError(f"style is {style!r}; want one of {', '.join(STYLES)}.")


@functools.cache
def _is_table(person: int, people: int) -> int:
  """The truth table of ("is", person)."""
  return sum(1 << index for index in range(2**people) if index >> (people - 1 - person) & 1)


@functools.cache
def _count_table(knights: int, people: int) -> int:
  """The truth table of ("#", knights)."""
  return sum(1 << index for index in range(2**people) if index.bit_count() == knights)


def truth_table(statement: Statement, people: int) -> int:
  """The truth values of a statement in all 2^people assignments of roles, as bits.

  The index of an assignment is the number whose binary digits are the roles in order, 1 for a knight. Bit i of the
  table is the truth value in assignment i.
  """
  operator, *parts = statement
  if operator == "is":
    return _is_table(parts[0], people)
  if operator == "#":
    return _count_table(parts[0], people)
  always = (1 << 2**people) - 1
  if operator == "!":
    return truth_table(parts[0], people) ^ always
  first, second = (truth_table(part, people) for part in parts)
  if operator == "&":
    return first & second
  if operator == "|":
    return first | second
  return (first ^ always) | second if operator == ">" else first ^ second ^ always


def solutions(statements: Sequence[Statement]) -> list[Roles]:
  """All assignments in which knights' statements are true and knaves' statements are false, in index order."""
  people = len(statements)
  consistent = (1 << 2**people) - 1
  for person, statement in enumerate(statements):
    consistent &= ~(truth_table(statement, people) ^ _is_table(person, people))
  return [roles_from_index(index, people) for index in range(2**people) if consistent >> index & 1]


def roles_from_index(index: int, people: int) -> Roles:
  """The roles of an assignment by its index; see `truth_table`."""
  return tuple(bool(index >> (people - 1 - person) & 1) for person in range(people))


def depth(statement: Statement) -> int:
  """The number of nested operators; 0 for 'B is a knave' and for counts."""
  operator, *parts = statement
  if operator in ("is", "#") or (operator == "!" and parts[0][0] == "is"):
    return 0
  return 1 + max(map(depth, parts))


def _check_statement(statement, people, level):
  """Raises ValueError unless this is a statement about `people` islanders; level: operators that enclose it."""
  match statement if isinstance(statement, tuple) else None:
    case ("is", int(person)) if not isinstance(person, bool) and 0 <= person < people:
      return
    case ("#", int(knights)) if not isinstance(knights, bool) and 0 <= knights <= people:
      return
    case ("!", part) if level <= MAX_DEPTH:
      return _check_statement(part, people, level + 1)
    case (operator, left, right) if operator in tuple(JOINING) and level < MAX_DEPTH:
      _check_statement(left, people, level + 1)
      return _check_statement(right, people, level + 1)
  raise ValueError(
    f"{statement!r} is no statement about {people} islanders; want ('is', islander), ('#', knights), ('!', statement) "
    f"or (one of {JOINING!r}, statement, statement), with at most {MAX_DEPTH} nested operators."
  )


def prompt_text(problem: Problem, style: str = "compact") -> str:
  """The prompt. Raises ValueError for an unknown style."""
  check_style(style)
  if style == "compact":
    statements = zip(LETTERS, map(_compact, problem.statements), strict=False)
    return ";".join(f"{letter}:{text}" for letter, text in statements) + "?"
  names = NAMES[: len(problem.statements)]
  statements = "\n".join(
    f'{name} says: "{text[0].upper()}{text[1:]}."'
    for name, text in zip(names, map(_english, problem.statements), strict=True)
  )
  return (
    "On an island everybody is either a knight, who only tells the truth, or a knave, who only lies. You meet "
    f"{', '.join(names[:-1])} and {names[-1]}.\n{statements}\n"
    'Here "or" means one or both, and "if ..., then ..." is false only where the first part is true and the second is '
    "not. Who is a knight and who is a knave? Think it through, and end with your answer in the form "
    r"\boxed{NAME is a knight, NAME is a knave, ...}, which names each of them once."
  )


def answer_text(roles: Roles, style: str = "compact") -> str:
  r"""The answer with these roles: 'A1B0', or '\boxed{Alice is a knight, Bob is a knave}'."""
  check_style(style)
  if style == "compact":
    return "".join(f"{letter}{role:d}" for letter, role in zip(LETTERS, roles, strict=False))
  claims = (f"{name} is a {'knight' if role else 'knave'}" for name, role in zip(NAMES, roles, strict=False))
  return rf"\boxed{{{', '.join(claims)}}}"


def check(text: str, problem: Problem, style: str = "compact") -> Verdict:
  """Checks an answer. Does not raise for any text.

  A compact answer must consist of a letter and 0 or 1 for each islander, in order, and nothing else. English answers
  are parsed by `answers.roles_from_english`.
  """
  check_style(style)
  people = len(problem.statements)
  if style == "compact":
    roles = compact_roles(text, people)
    reason = "not an answer"
  else:
    roles, reason = roles_from_english(text, NAMES[:people])
  if roles is None:
    return Verdict(False, False, reason)
  correct = roles == problem.solution
  return Verdict(True, correct, "right" if correct else "wrong", answer_text(roles))


def compact_roles(text: str, people: int) -> Roles | None:
  """The roles of a compact answer, or None if the text is not one."""
  if len(text) != 2 * people or text[::2] != LETTERS[:people] or not set(text[1::2]) <= {"0", "1"}:
    return None
  return tuple(digit == "1" for digit in text[1::2])


def compact_text(statements: Sequence[Statement]) -> str:
  """The statements without speakers, for example '!B;A&C;#2'; the inverse of `parse`."""
  return ";".join(map(_compact, statements))


def _compact(statement):
  operator, *parts = statement
  if operator == "is":
    return LETTERS[parts[0]]
  if operator == "#":
    return f"#{parts[0]}"
  texts = [f"({_compact(part)})" if part[0] in JOINING else _compact(part) for part in parts]
  return f"!{texts[0]}" if operator == "!" else operator.join(texts)


def _english(statement):
  operator, *parts = statement
  if operator == "is":
    return f"{NAMES[parts[0]]} is a knight"
  if operator == "#":
    return {0: "none of us is a knight", 1: "exactly 1 of us is a knight"}.get(
      parts[0], f"exactly {parts[0]} of us are knights"
    )
  if operator == "!" and parts[0][0] == "is":
    return f"{NAMES[parts[0][1]]} is a knave"
  texts = [f"({_english(part)})" if depth(part) else _english(part) for part in parts]
  return {
    "!": "it is not the case that {}",
    "&": "{} and {}",
    "|": "{} or {}",
    ">": "if {}, then {}",
    "=": "{} if and only if {}",
  }[operator].format(*texts)


def parse(text: str) -> tuple[Statement, ...]:
  """The statements of a `compact_text`. Raises ValueError for any other text; the message gives the position.

  Grammar: a statement is a part, or two parts with one of '&|>=' between them; a part is a letter, '#' and a digit,
  '!' and a part, or a statement in parentheses.
  """
  tokens = re.findall(r"#\d|.", text, re.DOTALL)
  position = 0

  def token() -> str:
    return tokens[position] if position < len(tokens) else "the end"

  def fail(expected: str):
    raise ValueError(f"{text[:200]!r} has {token()!r} as token {position}; want {expected}.")

  def statement(level: int) -> Statement:
    nonlocal position
    left = part(level)
    if token() not in JOINING:
      return left
    operator = token()
    position += 1
    return (operator, left, part(level))

  def part(level: int) -> Statement:
    nonlocal position
    if level > 2 * MAX_DEPTH:
      fail(f"at most {MAX_DEPTH} nested operators")
    first = token()
    if first not in (*LETTERS, "!", "(") and not (first[0] == "#" and len(first) == 2):
      fail("a letter, '#' and a digit, '!' or '('")
    position += 1
    if first in LETTERS:
      return ("is", LETTERS.index(first))
    if first[0] == "#":
      return ("#", int(first[1]))
    if first == "!":
      return ("!", part(level + 1))
    inner = statement(level + 1)
    if token() != ")":
      fail("')'")
    position += 1
    return inner

  statements = [statement(0)]
  while token() == ";":
    position += 1
    statements.append(statement(0))
  if position < len(tokens):
    fail("';' or the end")
  return tuple(statements)
