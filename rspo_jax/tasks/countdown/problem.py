"""Countdown problems. Reach a target with each given number exactly once and the four operations.

As a prompt a problem reads `"3 7 12=22:"`; `"3+7+12"`, then the end of the sequence, answers it. Answers are judged
by a parser of our own: no text is ever executed, arithmetic is exact, and no text makes it raise or run long.
`rspo_jax.tasks.countdown.generate` makes problems and demonstrations.
"""

import dataclasses
from fractions import Fraction
from typing import NamedTuple

OPERATORS = "+-*/"
ALPHABET = "0123456789+-*/() =:"  # every character of a prompt or of an answer
MAX_LENGTH = 256  # characters of an answer; six numbers of nine digits need under a hundred
MAX_DEPTH = 16  # open parentheses

_PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2}
_ANSWER_CHARACTERS = frozenset("0123456789+-*/() ")


@dataclasses.dataclass(frozen=True)
class Problem:
  """Numbers to use once each, and the value to reach.

  Attributes:
    numbers: 2 to 6 positive integers, in the order the prompt shows them.
    target: positive integer.
  Raises:
    ValueError: anything else; says which field.
  """

  numbers: tuple[int, ...]
  target: int

  def __post_init__(self):
    if not isinstance(self.numbers, tuple) or not 2 <= len(self.numbers) <= 6:
      raise ValueError(f"numbers is {self.numbers!r}; want a tuple of 2 to 6 positive integers.")
    for name, value in (*(("numbers", number) for number in self.numbers), ("target", self.target)):
      if type(value) is not int or value < 1:
        raise ValueError(f"{name} has {value!r}; want positive integers.")

  @property
  def key(self) -> tuple[tuple[int, ...], int]:
    """What makes two problems the same: the numbers in any order, and the target."""
    return tuple(sorted(self.numbers)), self.target


class Verdict(NamedTuple):
  """What an answer is worth.

  Attributes:
    valid: an expression of allowed operators over exactly the given numbers, whatever its value.
    value: its exact value; None if it is not valid or divides by zero.
    right: value equals the target.
    why: of a valid answer 'right', 'wrong value' or 'division by zero'; of any other 'wrong numbers', 'operator not
      allowed', 'not an expression', 'too deep' (more than MAX_DEPTH parentheses open at once) or 'too long' (more
      than MAX_LENGTH characters).
  """

  valid: bool
  value: Fraction | None
  right: bool
  reason: str


def canonical_operators(operators: str) -> str:
  """The operators in the order of OPERATORS. ValueError for none, a repeated or an unknown one."""
  chosen = "".join(operator for operator in OPERATORS if operator in operators)
  if not chosen or len(chosen) != len(operators):
    raise ValueError(f"operators is {operators!r}; want some of {OPERATORS!r}, each at most once.")
  return chosen


def prompt_text(problem: Problem) -> str:
  """The prompt, e.g. '3 7 12=22:', which the policy answers with an expression and the end token."""
  return f"{' '.join(map(str, problem.numbers))}={problem.target}:"


def check(text: str, problem: Problem, operators: str = OPERATORS) -> Verdict:
  """Judges an answer. Returns for every text, however strange, and reads at most MAX_LENGTH characters of it.

  The grammar: decimal ASCII integers without leading zeros, binary operators of the usual precedence that associate
  to the left, parentheses, and ASCII spaces between tokens. Signs, powers, floor division, floats, underscores and
  '=' are 'not an expression'.
  """
  if len(text) > MAX_LENGTH:
    return Verdict(False, None, False, "too long")
  postfix, reason = _parse(text)
  if reason:
    return Verdict(False, None, False, reason)
  if any(token in OPERATORS and token not in operators for token in postfix):
    return Verdict(False, None, False, "operator not allowed")
  if sorted(int(token) for token in postfix if token not in OPERATORS) != sorted(problem.numbers):
    return Verdict(False, None, False, "wrong numbers")
  value = _evaluate(postfix)
  if value is None:
    return Verdict(True, None, False, "division by zero")
  right = value == problem.target
  return Verdict(True, value, right, "right" if right else "wrong value")


def _tokens(text):
  """Numbers and single characters, in order. The text has only _ANSWER_CHARACTERS."""
  tokens = []
  for character, before in zip(text, " " + text, strict=False):
    if character in "0123456789" and before in "0123456789":
      tokens[-1] += character
    elif character != " ":
      tokens.append(character)
  return tokens


def _parse(text):
  """(tokens in postfix order, '') or ([], why not). The stack is explicit: no text makes this recurse."""
  if not _ANSWER_CHARACTERS.issuperset(text):
    return [], "not an expression"
  output, stack, depth, want_operand = [], [], 0, True
  for token in _tokens(text):
    opens = token == "(" or token not in "+-*/)"
    if opens != want_operand:
      return [], "not an expression"
    if token == "(":
      depth += 1
      if depth > MAX_DEPTH:
        return [], "too deep"
      stack.append(token)
    elif token == ")":
      depth -= 1
      if depth < 0:
        return [], "not an expression"
      while stack[-1] != "(":
        output.append(stack.pop())
      stack.pop()
    elif token in _PRECEDENCE:
      while stack and stack[-1] != "(" and _PRECEDENCE[stack[-1]] >= _PRECEDENCE[token]:
        output.append(stack.pop())
      stack.append(token)
      want_operand = True
    elif token[0] == "0" and len(token) > 1:
      return [], "not an expression"
    else:
      output.append(token)
      want_operand = False
  if want_operand or depth:
    return [], "not an expression"
  return output + stack[::-1], ""


def _evaluate(postfix):
  """The exact value, or None if something is divided by zero."""
  values = []
  for token in postfix:
    if token not in OPERATORS:
      values.append(Fraction(int(token)))
      continue
    right, left = values.pop(), values.pop()
    value = apply(token, left, right)
    if value is None:
      return None
    values.append(value)
  return values[0]


def apply(operator: str, left: Fraction, right: Fraction) -> Fraction | None:
  """left operator right, exactly; None for a division by zero."""
  if operator == "+":
    return left + right
  if operator == "-":
    return left - right
  if operator == "*":
    return left * right
  return left / right if right else None


class Term(NamedTuple):
  """An expression as text, and how tightly it binds: 1 a sum or difference, 2 a product or quotient, 3 a number."""

  text: str
  precedence: int


def join(operator: str, left: Term, right: Term) -> Term:
  """The text of `left operator right`, with parentheses only where the value would change without them."""
  precedence = _PRECEDENCE[operator]
  first = f"({left.text})" if left.precedence < precedence else left.text
  tight = right.precedence < precedence or (right.precedence == precedence and operator in "-/")
  second = f"({right.text})" if tight else right.text
  return Term(f"{first}{operator}{second}", precedence)
