"""Countdown problems: reach a target with the four operations, using each given number exactly once.

The prompt of a problem is `"3 7 12=22:"`; `"3+7+12"`, followed by the end token, solves it. Answers are checked by the
parser in this module: text is never executed, arithmetic is exact, and no text makes the parser raise or take long.
`rspo_jax.tasks.countdown.generate` generates problems and demonstrations.
"""

import dataclasses
from fractions import Fraction
from typing import NamedTuple

OPERATORS = "+-*/"
ALPHABET = "0123456789+-*/() =:"  # all characters of prompts and answers
MAX_LENGTH = 256  # characters of an answer; six numbers of nine digits need fewer than 100
MAX_DEPTH = 16  # nested parentheses

_PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2}
_ANSWER_CHARACTERS = frozenset("0123456789+-*/() ")


@dataclasses.dataclass(frozen=True)
class Problem:
  """Numbers to use exactly once each, and the value to reach.

  Attributes:
    numbers: 2 to 6 positive integers, in the order of the prompt.
    target: positive integer.
  Raises:
    ValueError: any other value; the message names the field.
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
    """Equal for equivalent problems: the sorted numbers, and the target."""
    return tuple(sorted(self.numbers)), self.target


class Verdict(NamedTuple):
  """The result of checking an answer.

  Attributes:
    valid: it is an expression with allowed operators over exactly the given numbers; its value may differ.
    value: its exact value; None if it is not valid or divides by zero.
    correct: its value equals the target.
    reason: for a valid answer 'right', 'wrong value' or 'division by zero'; otherwise 'wrong numbers', 'operator not
      allowed', 'not an expression', 'too deep' (more than MAX_DEPTH nested parentheses) or 'too long' (more than
      MAX_LENGTH characters).
  """

  valid: bool
  value: Fraction | None
  correct: bool
  reason: str


def canonical_operators(operators: str) -> str:
  """The operators in the order of OPERATORS. Raises ValueError for none, a repeated or an unknown one."""
  chosen = "".join(operator for operator in OPERATORS if operator in operators)
  if not chosen or len(chosen) != len(operators):
    raise ValueError(f"operators is {operators!r}; want some of {OPERATORS!r}, each at most once.")
  return chosen


def prompt_text(problem: Problem) -> str:
  """The prompt, for example '3 7 12=22:'; the policy continues it with an expression and the end token."""
  return f"{' '.join(map(str, problem.numbers))}={problem.target}:"


def check(text: str, problem: Problem, operators: str = OPERATORS) -> Verdict:
  """Checks an answer. Does not raise for any text; longer text than MAX_LENGTH characters is not parsed.

  Grammar: decimal ASCII integers without leading zeros, left-associative binary operators with the usual precedence,
  parentheses, and ASCII spaces between tokens. Signs, powers, floor division, floats, underscores and '=' are 'not an
  expression'.
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
  correct = value == problem.target
  return Verdict(True, value, correct, "right" if correct else "wrong value")


def _tokens(text):
  """Splits text that consists of _ANSWER_CHARACTERS into numbers and single characters, in order."""
  tokens = []
  for character, previous in zip(text, " " + text, strict=False):
    if character in "0123456789" and previous in "0123456789":
      tokens[-1] += character
    elif character != " ":
      tokens.append(character)
  return tokens


def _parse(text):
  """Returns (tokens in postfix order, '') or ([], reason). Uses an explicit stack instead of recursion."""
  if not _ANSWER_CHARACTERS.issuperset(text):
    return [], "not an expression"
  output, stack, depth, expect_operand = [], [], 0, True
  for token in _tokens(text):
    starts_operand = token == "(" or token not in "+-*/)"
    if starts_operand != expect_operand:
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
      expect_operand = True
    elif token[0] == "0" and len(token) > 1:
      return [], "not an expression"
    else:
      output.append(token)
      expect_operand = False
  if expect_operand or depth:
    return [], "not an expression"
  return output + stack[::-1], ""


def _evaluate(postfix):
  """The exact value; None for a division by zero."""
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
  """The exact value of `left operator right`; None for a division by zero."""
  if operator == "+":
    return left + right
  if operator == "-":
    return left - right
  if operator == "*":
    return left * right
  return left / right if right else None


class Term(NamedTuple):
  """An expression as text and its precedence: 1 for a sum or difference, 2 for a product or quotient, 3 a number."""

  text: str
  precedence: int


def join(operator: str, left: Term, right: Term) -> Term:
  """The text of `left operator right`, with parentheses only where omitting them would change the value."""
  precedence = _PRECEDENCE[operator]
  first = f"({left.text})" if left.precedence < precedence else left.text
  enclose = right.precedence < precedence or (right.precedence == precedence and operator in "-/")
  second = f"({right.text})" if enclose else right.text
  return Term(f"{first}{operator}{second}", precedence)
