r"""Knights and Knaves. Knights only tell the truth, knaves only lie: find out who is what.

Each islander makes one statement about them all, and exactly one assignment of roles fits what they say. As a compact
prompt a problem reads `"A:!B;B:A&C;C:#2?"` (B is a knave; A and C are knights; exactly two of us are knights), and
`"A1B0C0"` answers it: 1 is a knight. In English the same islanders have names, and the answer is asked for
in `\boxed{}`. The domain follows Xie et al., "On Memorization of Large Language Models in Logical Reasoning", arXiv
2410.23123. `rspo_jax.tasks.knights.generate` makes problems, `rspo_jax.tasks.knights.answers` judges English answers.
"""

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import NamedTuple

from rspo_jax.tasks.knights.answers import read

STYLES = ("compact", "english")
LETTERS = "ABCDEFGH"
NAMES = ("Alice", "Bob", "Carol", "David", "Eve", "Frank", "Grace", "Henry")
OPERATORS = "!&|>=#"  # not, and, or, implies, if and only if, exactly so many of us are knights
JOINING = "&|>="
ALPHABET = "ABCDEFGH012345678!&|>=#():;?"  # every character of a compact prompt or of its answer
MAX_DEPTH = 8  # operators within each other in a statement

# A statement: ("is", i), islander i is a knight; ("#", k), exactly k islanders are; ("!", statement); or
# (operator, statement, statement) with one of JOINING.
Statement = tuple
Roles = tuple[bool, ...]  # of the islanders in order; True is a knight


@dataclasses.dataclass(frozen=True)
class Problem:
  """What each islander says, and the one way in which all of it fits.

  Attributes:
    statements: of 2 to 8 islanders in order.
    solution: who is a knight; found by trying every assignment.
  Raises:
    ValueError: another number of islanders, a malformed statement, or no solution or several.
  """

  statements: tuple[Statement, ...]
  solution: Roles = dataclasses.field(init=False)

  def __post_init__(self):
    if not isinstance(self.statements, tuple) or not 2 <= len(self.statements) <= len(LETTERS):
      raise ValueError(f"statements is {self.statements!r}; want a tuple of 2 to {len(LETTERS)} statements.")
    for statement in self.statements:
      _check_statement(statement, len(self.statements), 0)
    found = solutions(self.statements)
    if len(found) != 1:
      raise ValueError(f"{len(found)} assignments fit {compact_text(self.statements)!r}; want exactly one.")
    object.__setattr__(self, "solution", found[0])


class Verdict(NamedTuple):
  """What an answer is worth.

  Attributes:
    valid: it has the form that was asked for, and gives every islander one role.
    right: these are the roles of the solution.
    why: of a valid answer 'right' or 'wrong'; of a compact one that is not, 'not an answer'; for English see
      `knights_answers.read`.
    answer: the roles in the compact form, whatever the style, as 'A1B0'; '' if not valid.
  """

  valid: bool
  right: bool
  reason: str
  answer: str = ""


def canonical_operators(operators: str) -> str:
  """The operators in the order of OPERATORS. ValueError for a repeated or an unknown one."""
  chosen = "".join(operator for operator in OPERATORS if operator in operators)
  if len(chosen) != len(operators):
    raise ValueError(f"operators is {operators!r}; want some of {OPERATORS!r}, each at most once.")
  return chosen


def check_style(style: str) -> None:
  if style not in STYLES:
    raise ValueError(f"style is {style!r}; want one of {', '.join(STYLES)}.")


@functools.cache
def _is_knight(person: int, people: int) -> int:
  """The truth table of ("is", person)."""
  return sum(1 << case for case in range(2**people) if case >> (people - 1 - person) & 1)


@functools.cache
def _exactly(knights: int, people: int) -> int:
  return sum(1 << case for case in range(2**people) if case.bit_count() == knights)


def truth_table(statement: Statement, people: int) -> int:
  """In which of the 2^people assignments a statement is true, as bits.

  Assignment a is the number whose binary digits are the roles in order, 1 for a knight: bit a of the table tells of it.
  """
  operator, *parts = statement
  if operator == "is":
    return _is_knight(parts[0], people)
  if operator == "#":
    return _exactly(parts[0], people)
  everywhere = (1 << 2**people) - 1
  first, *others = (truth_table(part, people) for part in parts)
  if operator == "!":
    return first ^ everywhere
  (second,) = others
  if operator == "&":
    return first & second
  if operator == "|":
    return first | second
  return (first ^ everywhere) | second if operator == ">" else first ^ second ^ everywhere


def solutions(statements: Sequence[Statement]) -> list[Roles]:
  """Every assignment in which the knights' statements are true and the knaves' false, knaves first."""
  people = len(statements)
  fits = (1 << 2**people) - 1
  for person, statement in enumerate(statements):
    fits &= ~(truth_table(statement, people) ^ _is_knight(person, people))
  return [roles_of(case, people) for case in range(2**people) if fits >> case & 1]


def roles_of(case: int, people: int) -> Roles:
  """The roles of an assignment by its number, see `truth_table`."""
  return tuple(bool(case >> (people - 1 - person) & 1) for person in range(people))


def depth(statement: Statement) -> int:
  """Operators within each other; 'B is a knave' and counts are 0 deep."""
  operator, *parts = statement
  if operator in ("is", "#") or (operator == "!" and parts[0][0] == "is"):
    return 0
  return 1 + max(map(depth, parts))


def _check_statement(statement, people, within):
  """ValueError unless it is a statement of so many islanders, within so many operators."""
  match statement if isinstance(statement, tuple) else None:
    case ("is", int(person)) if not isinstance(person, bool) and 0 <= person < people:
      return
    case ("#", int(knights)) if not isinstance(knights, bool) and 0 <= knights <= people:
      return
    case ("!", part) if within <= MAX_DEPTH:
      return _check_statement(part, people, within + 1)
    case (operator, left, right) if operator in tuple(JOINING) and within < MAX_DEPTH:
      _check_statement(left, people, within + 1)
      return _check_statement(right, people, within + 1)
  raise ValueError(
    f"{statement!r} is no statement of {people} islanders: want ('is', islander), ('#', knights), ('!', statement) or "
    f"(one of {JOINING!r}, statement, statement), at most {MAX_DEPTH} operators within each other."
  )


def prompt_text(problem: Problem, style: str = "compact") -> str:
  """The prompt. ValueError for an unknown style."""
  check_style(style)
  if style == "compact":
    said = zip(LETTERS, map(_compact, problem.statements), strict=False)
    return ";".join(f"{letter}:{text}" for letter, text in said) + "?"
  names = NAMES[: len(problem.statements)]
  said = "\n".join(
    f'{name} says: "{text[0].upper()}{text[1:]}."'
    for name, text in zip(names, map(_english, problem.statements), strict=True)
  )
  return (
    "On an island everybody is either a knight, who only tells the truth, or a knave, who only lies. You meet "
    f"{', '.join(names[:-1])} and {names[-1]}.\n{said}\n"
    'Here "or" means one or both, and "if ..., then ..." is false only where the first part is true and the second is '
    "not. Who is a knight and who is a knave? Think it through, and end with your answer in the form "
    r"\boxed{NAME is a knight, NAME is a knave, ...}, which names each of them once."
  )


def answer_text(roles: Roles, style: str = "compact") -> str:
  r"""The answer that gives these roles: 'A1B0', or '\boxed{Alice is a knight, Bob is a knave}'."""
  check_style(style)
  if style == "compact":
    return "".join(f"{letter}{role:d}" for letter, role in zip(LETTERS, roles, strict=False))
  said = (f"{name} is a {'knight' if role else 'knave'}" for name, role in zip(NAMES, roles, strict=False))
  return rf"\boxed{{{', '.join(said)}}}"


def check(text: str, problem: Problem, style: str = "compact") -> Verdict:
  """Judges an answer. Returns for every text, however strange.

  A compact answer is exactly a letter and 0 or 1 per islander, in order. What counts of English prose says
  `knights_answers.read`.
  """
  check_style(style)
  people = len(problem.statements)
  if style == "compact":
    roles = compact_roles(text, people)
    reason = "not an answer"
  else:
    roles, reason = read(text, NAMES[:people])
  if roles is None:
    return Verdict(False, False, reason)
  right = roles == problem.solution
  return Verdict(True, right, "right" if right else "wrong", answer_text(roles))


def compact_roles(text: str, people: int) -> Roles | None:
  """The roles that a compact answer gives, or None if it is none."""
  if len(text) != 2 * people or text[::2] != LETTERS[:people] or not set(text[1::2]) <= {"0", "1"}:
    return None
  return tuple(digit == "1" for digit in text[1::2])


def compact_text(statements: Sequence[Statement]) -> str:
  """The statements alone, as '!B;A&C;#2'. `parse` reads it."""
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
  """The statements of a `compact_text`. ValueError for any other text; says where it goes wrong.

  The grammar: a statement is a part, or two parts with one of '&|>=' between them; a part is a letter, '#' and a digit,
  '!' and a part, or a statement in parentheses.
  """
  tokens = re.findall(r"#\d|.", text, re.DOTALL)
  at = 0

  def token() -> str:
    return tokens[at] if at < len(tokens) else "the end"

  def fail(wanted: str):
    raise ValueError(f"{text[:200]!r} has {token()!r} as token {at}; want {wanted}.")

  def statement(within: int) -> Statement:
    nonlocal at
    left = part(within)
    if token() not in JOINING:
      return left
    operator = token()
    at += 1
    return (operator, left, part(within))

  def part(within: int) -> Statement:
    nonlocal at
    if within > 2 * MAX_DEPTH:
      fail(f"at most {MAX_DEPTH} operators within each other")
    found = token()
    if found not in (*LETTERS, "!", "(") and not (found[0] == "#" and len(found) == 2):
      fail("a letter, '#' and a digit, '!' or '('")
    at += 1
    if found in LETTERS:
      return ("is", LETTERS.index(found))
    if found[0] == "#":
      return ("#", int(found[1]))
    if found == "!":
      return ("!", part(within + 1))
    inner = statement(within + 1)
    if token() != ")":
      fail("')'")
    at += 1
    return inner

  statements = [statement(0)]
  while token() == ";":
    at += 1
    statements.append(statement(0))
  if at < len(tokens):
    fail("';' or the end")
  return tuple(statements)
