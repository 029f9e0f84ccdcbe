"""The Countdown checker against independent arithmetic and Python's own parser; prompts and problems."""

import ast
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rspo_jax.tasks.countdown.generate import CountdownSpec, make_problems
from rspo_jax.tasks.countdown.problem import (
  ALPHABET,
  MAX_DEPTH,
  MAX_LENGTH,
  Problem,
  Term,
  canonical_operators,
  check,
  join,
  prompt_text,
)
from tests.support.countdown_cases import PROBLEM, value_of

NODES = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}


def trees(leaves):
  return st.recursive(leaves, lambda child: st.tuples(st.sampled_from("+-*/"), child, child), max_leaves=6).filter(
    lambda tree: isinstance(tree, tuple)
  )


def leaves_of(tree):
  return [tree] if isinstance(tree, int) else leaves_of(tree[1]) + leaves_of(tree[2])


def parenthesised(tree):
  return str(tree) if isinstance(tree, int) else f"({parenthesised(tree[1])}{tree[0]}{parenthesised(tree[2])})"


def shortest(tree):
  return Term(str(tree), 3) if isinstance(tree, int) else join(tree[0], shortest(tree[1]), shortest(tree[2]))


def checked(text, numbers):
  """The verdict of `check` for these numbers and an arbitrary target."""
  return check(text, Problem(tuple(numbers), 1))


def tree_of(text):
  """The expression tree that Python's own parser returns, or None for syntax that Countdown does not allow."""
  try:
    node = ast.parse(text.strip(" "), mode="eval").body
  except (SyntaxError, ValueError, MemoryError, RecursionError):
    return None

  def walk(node):
    if isinstance(node, ast.Constant) and type(node.value) is int:
      return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in NODES:
      left, right = walk(node.left), walk(node.right)
      return None if left is None or right is None else (NODES[type(node.op)], left, right)
    return None

  return walk(node)


@pytest.mark.parametrize("text", ["3+7+12", "12+(7+3)", "(3)+7+12", " ( 3+ 7 )+12 ", "12+7+3"])
def test_correct_answers_are_accepted(text):
  assert check(text, PROBLEM) == (True, 22, True, "right")


@pytest.mark.parametrize(
  ("text", "reason"),
  [
    ("3*7+12", "wrong value"),
    ("12/(7-7-3)", "wrong numbers"),
    ("3+7", "wrong numbers"),
    ("3+7+12+3", "wrong numbers"),
    ("3+7+7+12", "wrong numbers"),
    ("3+7+21", "wrong numbers"),
    ("37+12", "wrong numbers"),
    ("22", "wrong numbers"),
    ("", "not an expression"),
    ("   ", "not an expression"),
    ("3 7+12", "not an expression"),
    ("3+7+1 2", "not an expression"),
    ("3**7+12", "not an expression"),
    ("3//7+12", "not an expression"),
    ("3+7+1_2", "not an expression"),
    ("3+7+１２", "not an expression"),
    ("3+7+①②", "not an expression"),
    ("٣+7+12", "not an expression"),
    ("+3+7+12", "not an expression"),
    ("-3+7+12", "not an expression"),
    ("3+7+-12", "not an expression"),
    ("3+7+(-12)", "not an expression"),
    ("3e0+7+12", "not an expression"),
    ("3.0+7+12", "not an expression"),
    ("0x3+7+12", "not an expression"),
    ("03+7+12", "not an expression"),
    ("3+7+012", "not an expression"),
    ("00+3+7+12", "not an expression"),
    ("3+7+12=22", "not an expression"),
    ("3+7+12\n", "not an expression"),
    ("3+7\t+12", "not an expression"),
    ("3\u00a0+7+12", "not an expression"),
    ("3+7+12;", "not an expression"),
    ("3+7+12+", "not an expression"),
    ("(3+7+12", "not an expression"),
    ("3+7+12)", "not an expression"),
    (")3+7+12(", "not an expression"),
    ("()3+7+12", "not an expression"),
    ("3(+7)+12", "not an expression"),
    ("(3)(7)+12", "not an expression"),
    ("3×7+12", "not an expression"),
    ("3−7+12", "not an expression"),
    ("__import__('os')", "not an expression"),
    ("\ud800", "not an expression"),
    ("\x00", "not an expression"),
    ("(" * 17 + "3" + ")" * 17 + "+7+12", "too deep"),
    ("(" * 100_000, "too long"),
    ("(" * 100_000 + "3" + ")" * 100_000 + "+7+12", "too long"),
    ("9" * 1_000_000, "too long"),
    (" " * 250 + "3+7+12 ", "too long"),
  ],
)
def test_other_answers_are_rejected_with_their_reason(text, reason):
  verdict = check(text, PROBLEM)
  assert not verdict.correct
  assert verdict.reason == reason
  assert verdict.valid == (reason == "wrong value")


def test_length_and_depth_limits_are_inclusive():
  deepest = "(" * MAX_DEPTH + "3" + ")" * MAX_DEPTH + "+7+12"
  assert check(deepest, PROBLEM).correct
  assert check("3+7+12".ljust(MAX_LENGTH), PROBLEM).correct
  assert check("()" * 5 + deepest, PROBLEM).reason == "not an expression"


def test_division_by_zero_is_valid_and_incorrect():
  assert check("7/(3-3)", Problem((3, 3, 7), 7)) == (True, None, False, "division by zero")
  assert check("(3-3)/7", Problem((3, 3, 7), 7)) == (True, 0, False, "wrong value")
  assert check("7/(3-3)/3", Problem((3, 3, 3, 7), 7)).reason == "division by zero"


def test_arithmetic_is_exact_beyond_floats():
  # In floats 49 * (1 / 49) is less than 1, and large products lose their last digits.
  assert check("1/49*49", Problem((1, 49, 49), 1)).correct
  big = 10**18 + 1
  assert check(f"{big}*{big}-{big}*{big}+1", Problem((big, big, big, big, 1), 1)).correct
  assert not check(f"{big}+1", Problem((big, 1), big)).correct


def test_operators_can_be_restricted():
  assert check("3+7+12", PROBLEM, "+-").correct
  assert check("3*7+12", PROBLEM, "+-") == (False, None, False, "operator not allowed")
  assert canonical_operators("/+") == "+/"
  for invalid in ("", "++", "^", "+%", "+ "):
    with pytest.raises(ValueError, match="each at most once"):
      canonical_operators(invalid)


def test_no_text_takes_long_to_check():
  texts = ["1" * 256, "(" * 16 + "1+" * 100, "1*" * 127 + "1", "9" * 60 + "*9" * 90, "1/" * 120 + "1", " " * 256]
  start = time.process_time()
  for text in texts * 20:
    check(text, PROBLEM)
  assert time.process_time() - start < 2.0


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_no_text_raises_and_arbitrary_text_is_not_an_answer(text):
  assert not check(text, Problem((10**9, 10**9), 1)).valid


TOKENS = [*"+-*/()", "**", "//", " ", "1", "2", "30", "07"]


@st.composite
def nearly_answers(draw):
  """A valid answer after up to two small edits, which may leave it valid."""
  text = draw(trees(st.integers(1, 40)).map(parenthesised) | trees(st.integers(1, 40)).map(lambda t: shortest(t).text))
  for _ in range(draw(st.integers(0, 2))):
    position = draw(st.integers(0, len(text)))
    text = text[:position] + draw(st.sampled_from(["", *TOKENS])) + text[position + draw(st.integers(0, 1)) :]
  return text


@settings(max_examples=500, deadline=None)
@given(nearly_answers() | st.lists(st.sampled_from(TOKENS), max_size=12).map("".join))
def test_accepts_exactly_the_binary_arithmetic_of_pythons_parser(text):
  tree = tree_of(text)
  numbers = [int(number) for number in "".join(c if c.isdigit() else " " for c in text).split()]
  if not 2 <= len(numbers) <= 6 or 0 in numbers:
    return
  verdict = check(text, Problem(tuple(numbers), 1))
  if tree is None:
    assert not verdict.valid
    return
  try:
    assert verdict[:2] == (True, value_of(tree))
  except ZeroDivisionError:
    assert verdict.reason == "division by zero"


@settings(max_examples=400, deadline=None)
@given(trees(st.integers(1, 99)), st.randoms(use_true_random=False))
def test_values_and_verdicts_agree_with_exact_arithmetic(tree, random):
  numbers = leaves_of(tree)
  random.shuffle(numbers)
  for text in (parenthesised(tree), shortest(tree).text, shortest(tree).text.replace("+", " + ")):
    try:
      value = value_of(tree)
    except ZeroDivisionError:
      assert checked(text, numbers).reason == "division by zero"
      continue
    assert checked(text, numbers)[:2] == (True, value)
    if value.denominator == 1 and value > 0:
      assert check(text, Problem(tuple(numbers), int(value))).correct
      assert check(text, Problem(tuple(numbers), int(value) + 1)).reason == "wrong value"
    assert check(text, Problem((*numbers[:-1], numbers[-1] + 1), 1)).reason == "wrong numbers"


@settings(max_examples=200, deadline=None)
@given(st.permutations([101, 211, 307, 401]), st.data())
def test_join_adds_no_redundant_parentheses(leaves, data):
  terms = list(leaves)
  while len(terms) > 1:
    terms.append(
      (data.draw(st.sampled_from("+-*/")), terms.pop(0), terms.pop(data.draw(st.integers(0, len(terms) - 1))))
    )
  text = shortest(terms[0]).text
  value = checked(text, leaves).value
  for opening in (i for i, character in enumerate(text) if character == "("):
    depth, closing = 0, opening
    while (depth := depth + {"(": 1, ")": -1}.get(text[closing], 0)) > 0:
      closing += 1
    without = text[:opening] + text[opening + 1 : closing] + text[closing + 1 :]
    assert checked(without, leaves).value != value


def test_prompts_and_answers_stay_within_the_alphabet():
  assert prompt_text(Problem((3, 7, 12), 22)) == "3 7 12=22:"
  for problem, solution, wrong_answer in make_problems(CountdownSpec(train=50, test=50))["train"]:
    assert set(prompt_text(problem) + solution + wrong_answer) <= set(ALPHABET)


@pytest.mark.parametrize(
  ("numbers", "target"),
  [((3,), 3), ((1,) * 7, 7), ([3, 4], 7), ((3, -4), 7), ((3, 4.0), 7), ((3, True), 4), ((3, 4), 0), ((3, 4), "7")],
)
def test_invalid_problems_are_refused(numbers, target):
  with pytest.raises(ValueError, match="positive integers"):
    Problem(numbers, target)


def test_key_ignores_only_the_order_of_numbers():
  assert Problem((3, 7, 12), 22).key == Problem((12, 3, 7), 22).key
  assert Problem((3, 7, 12), 22).key != Problem((3, 7, 12), 23).key
  assert Problem((3, 3, 7), 22).key != Problem((3, 7, 7), 22).key
