"""The verifier against arithmetic that never saw its parser, and the problems it judges."""

import ast
import dataclasses
import hashlib
import itertools
import operator
import os
import subprocess
import sys
import time
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rspo_jax import countdown, countdown_problems
from rspo_jax.countdown import Problem, Term, canonical_operators, check, join, prompt_text
from rspo_jax.countdown_problems import CountdownSpec, demonstration, make_problems, solutions, wrong_demonstration

PROBLEM = Problem((3, 7, 12), 22)
PYTHON = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
NODES = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}


def trees(leaves):
  return st.recursive(leaves, lambda child: st.tuples(st.sampled_from("+-*/"), child, child), max_leaves=6).filter(
    lambda tree: isinstance(tree, tuple)
  )


def leaves_of(tree):
  return [tree] if isinstance(tree, int) else leaves_of(tree[1]) + leaves_of(tree[2])


def value_of(tree):
  return Fraction(tree) if isinstance(tree, int) else PYTHON[tree[0]](value_of(tree[1]), value_of(tree[2]))


def parenthesised(tree):
  return str(tree) if isinstance(tree, int) else f"({parenthesised(tree[1])}{tree[0]}{parenthesised(tree[2])})"


def shortest(tree):
  return Term(str(tree), 3) if isinstance(tree, int) else join(tree[0], shortest(tree[1]), shortest(tree[2]))


def judge(text, numbers):
  """`check` with the numbers of the text, whatever the target."""
  return check(text, Problem(tuple(numbers), 1))


def tree_of(text):
  """The tree Python's own parser sees, or None for what Countdown does not allow."""
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
def test_right_answers_are_right(text):
  assert check(text, PROBLEM) == (True, 22, True, "right")


@pytest.mark.parametrize(
  ("text", "why"),
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
def test_every_other_answer_is_wrong_for_the_stated_reason(text, why):
  verdict = check(text, PROBLEM)
  assert not verdict.right
  assert verdict.why == why
  assert verdict.valid == (why == "wrong value")


def test_length_and_depth_limits_are_inclusive():
  deepest = "(" * countdown.MAX_DEPTH + "3" + ")" * countdown.MAX_DEPTH + "+7+12"
  assert check(deepest, PROBLEM).right
  assert check("3+7+12".ljust(countdown.MAX_LENGTH), PROBLEM).right
  assert check("()" * 5 + deepest, PROBLEM).why == "not an expression"


def test_division_by_zero_is_valid_but_worthless():
  assert check("7/(3-3)", Problem((3, 3, 7), 7)) == (True, None, False, "division by zero")
  assert check("(3-3)/7", Problem((3, 3, 7), 7)) == (True, 0, False, "wrong value")
  assert check("7/(3-3)/3", Problem((3, 3, 3, 7), 7)).why == "division by zero"


def test_arithmetic_is_exact_beyond_floats():
  # In floats 49 * (1 / 49) is less than 1, and 3**40-like products lose their last digits.
  assert check("1/49*49", Problem((1, 49, 49), 1)).right
  big = 10**18 + 1
  assert check(f"{big}*{big}-{big}*{big}+1", Problem((big, big, big, big, 1), 1)).right
  assert not check(f"{big}+1", Problem((big, 1), big)).right


def test_operators_can_be_restricted():
  assert check("3+7+12", PROBLEM, "+-").right
  assert check("3*7+12", PROBLEM, "+-") == (False, None, False, "operator not allowed")
  assert canonical_operators("/+") == "+/"
  for wrong in ("", "++", "^", "+%", "+ "):
    with pytest.raises(ValueError, match="each at most once"):
      canonical_operators(wrong)


def test_nothing_a_policy_writes_takes_long():
  texts = ["1" * 256, "(" * 16 + "1+" * 100, "1*" * 127 + "1", "9" * 60 + "*9" * 90, "1/" * 120 + "1", " " * 256]
  started = time.process_time()
  for text in texts * 20:
    check(text, PROBLEM)
  assert time.process_time() - started < 2.0


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_no_text_raises_and_arbitrary_text_is_not_an_answer(text):
  assert not check(text, Problem((10**9, 10**9), 1)).valid


TOKENS = [*"+-*/()", "**", "//", " ", "1", "2", "30", "07"]


@st.composite
def nearly_answers(draw):
  """A valid answer after up to two small edits: some stay valid."""
  text = draw(trees(st.integers(1, 40)).map(parenthesised) | trees(st.integers(1, 40)).map(lambda t: shortest(t).text))
  for _ in range(draw(st.integers(0, 2))):
    at = draw(st.integers(0, len(text)))
    text = text[:at] + draw(st.sampled_from(["", *TOKENS])) + text[at + draw(st.integers(0, 1)) :]
  return text


@settings(max_examples=500, deadline=None)
@given(nearly_answers() | st.lists(st.sampled_from(TOKENS), max_size=12).map("".join))
def test_accepts_exactly_what_pythons_parser_calls_binary_arithmetic(text):
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
    assert verdict.why == "division by zero"


@settings(max_examples=400, deadline=None)
@given(trees(st.integers(1, 99)), st.randoms(use_true_random=False))
def test_valid_trees_are_judged_as_exact_arithmetic_says(tree, random):
  numbers = leaves_of(tree)
  random.shuffle(numbers)
  for text in (parenthesised(tree), shortest(tree).text, shortest(tree).text.replace("+", " + ")):
    try:
      value = value_of(tree)
    except ZeroDivisionError:
      assert judge(text, numbers).why == "division by zero"
      continue
    assert judge(text, numbers)[:2] == (True, value)
    if value.denominator == 1 and value > 0:
      assert check(text, Problem(tuple(numbers), int(value))).right
      assert check(text, Problem(tuple(numbers), int(value) + 1)).why == "wrong value"
    assert check(text, Problem((*numbers[:-1], numbers[-1] + 1), 1)).why == "wrong numbers"


@settings(max_examples=200, deadline=None)
@given(st.permutations([101, 211, 307, 401]), st.data())
def test_joined_terms_have_no_parenthesis_too_many(leaves, data):
  terms = list(leaves)
  while len(terms) > 1:
    terms.append(
      (data.draw(st.sampled_from("+-*/")), terms.pop(0), terms.pop(data.draw(st.integers(0, len(terms) - 1))))
    )
  text = shortest(terms[0]).text
  value = judge(text, leaves).value
  for opening in (i for i, character in enumerate(text) if character == "("):
    depth, closing = 0, opening
    while (depth := depth + {"(": 1, ")": -1}.get(text[closing], 0)) > 0:
      closing += 1
    without = text[:opening] + text[opening + 1 : closing] + text[closing + 1 :]
    assert judge(without, leaves).value != value


def test_prompts_and_answers_stay_within_the_alphabet():
  assert prompt_text(Problem((3, 7, 12), 22)) == "3 7 12=22:"
  for worked in make_problems(CountdownSpec(train=50, test=50))["train"]:
    assert set(prompt_text(worked.problem) + worked.right + worked.wrong) <= set(countdown.ALPHABET)


@pytest.mark.parametrize(
  ("numbers", "target"),
  [((3,), 3), ((1,) * 7, 7), ([3, 4], 7), ((3, -4), 7), ((3, 4.0), 7), ((3, True), 4), ((3, 4), 0), ((3, 4), "7")],
)
def test_impossible_problems_are_refused(numbers, target):
  with pytest.raises(ValueError, match="positive integers"):
    Problem(numbers, target)


def test_key_ignores_the_order_of_numbers_only():
  assert Problem((3, 7, 12), 22).key == Problem((12, 3, 7), 22).key
  assert Problem((3, 7, 12), 22).key != Problem((3, 7, 12), 23).key
  assert Problem((3, 3, 7), 22).key != Problem((3, 7, 7), 22).key


def brute_force(numbers, operators):
  """{value: one tree} by trying both shapes of a tree over three numbers."""
  found = {}
  for (a, b, c), f, g in itertools.product(itertools.permutations(numbers), operators, operators):
    for tree in ((g, (f, a, b), c), (f, a, (g, b, c))):
      try:
        found.setdefault(value_of(tree), tree)
      except ZeroDivisionError:
        continue
  return found


@pytest.mark.parametrize(("numbers", "operators"), [((3, 7, 12), "+-*/"), ((4, 4, 1), "+-*/"), ((6, 2, 9), "-/")])
def test_solutions_are_right_and_found_wherever_brute_force_finds_one(numbers, operators):
  reachable = brute_force(numbers, operators)
  for target in range(1, 121):
    problem = Problem(numbers, target)
    found = solutions(problem, operators)
    assert bool(found) == (target in reachable)
    assert all(check(text, problem, operators).right for text in found)
    assert len(set(found)) == len(found)
    left_trees = (
      ast.unparse(ast.parse(f"({a}{f}{b}){g}{c}")).replace(" ", "")
      for (a, b, c), f, g in itertools.product(itertools.permutations(numbers), operators, operators)
    )
    assert {text for text in left_trees if check(text, problem).right} <= set(found)


def test_solutions_reach_four_numbers_with_fractions_on_the_way():
  assert "8/(3-8/3)" in solutions(Problem((3, 3, 8, 8), 24))
  assert not solutions(Problem((1, 1, 1, 1), 24))


def test_demonstrations_are_drawn_from_the_generator_alone():
  drawn = [demonstration(PROBLEM, np.random.default_rng(seed)) for seed in range(30)]
  assert set(drawn) == set(solutions(PROBLEM))
  assert drawn[:5] == [demonstration(PROBLEM, np.random.default_rng(seed)) for seed in range(5)]
  wrong = wrong_demonstration(PROBLEM, np.random.default_rng(0), "+-")
  assert check(wrong, PROBLEM, "+-").why == "wrong value"
  with pytest.raises(ValueError, match="cannot be solved"):
    demonstration(Problem((1, 1), 50), np.random.default_rng(0))
  with pytest.raises(ValueError, match="seems to equal 4"):
    wrong_demonstration(Problem((2, 2), 4), np.random.default_rng(0), "+*")


@pytest.mark.parametrize(
  "spec",
  [
    CountdownSpec(train=1500, test=600),
    CountdownSpec(numbers=2, low=2, high=30, train=400, test=100, operators="+*", seed=3),
    CountdownSpec(numbers=4, low=5, high=50, target_low=10, target_high=500, train=700, test=100, operators="+-*"),
    CountdownSpec(numbers=5, high=3, target_high=20, train=150, test=30),  # divides by zero time and again
    CountdownSpec(numbers=6, high=100, target_low=100, target_high=999, train=200, test=100),
  ],
)
def test_problems_are_distinct_solvable_in_range_and_come_with_one_right_and_one_wrong_expression(spec):
  splits = make_problems(spec)
  assert {name: len(worked) for name, worked in splits.items()} == {"train": spec.train, "test": spec.test}
  everything = splits["train"] + splits["test"]
  assert len({worked.problem.key for worked in everything}) == len(everything)
  for problem, right, wrong in everything:
    assert len(problem.numbers) == spec.numbers
    assert all(spec.low <= number <= spec.high for number in problem.numbers)
    assert spec.target_low <= problem.target <= spec.target_high
    assert check(right, problem, spec.operators).right
    assert check(wrong, problem, spec.operators).why == "wrong value"


def test_splits_are_equally_hard():
  # The first problems drawn have the most solutions; a split that took them would be the easier one.
  splits = make_problems(CountdownSpec(train=10_000, test=1_000))
  easy = {
    name: np.mean([len(solutions(worked.problem)) for worked in worked_list[:: len(worked_list) // 500]])
    for name, worked_list in splits.items()
  }
  assert abs(easy["train"] - easy["test"]) < 0.2 * easy["train"]


def test_the_whole_universe_can_be_had_and_nothing_more():
  spec = CountdownSpec(numbers=3, high=4, target_high=12, train=10, test=10)
  universe = {
    (numbers, int(value))
    for numbers in itertools.combinations_with_replacement(range(1, 5), 3)
    for value in brute_force(numbers, "+-*/")
    if value.denominator == 1 and 1 <= value <= 12
  }
  whole = make_problems(dataclasses.replace(spec, train=len(universe) - 10))
  assert {worked.problem.key for worked in whole["train"] + whole["test"]} == universe
  with pytest.raises(ValueError, match=f"Found only {len(universe)} distinct"):
    make_problems(dataclasses.replace(spec, train=len(universe)))


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"operators": "+"}, "Add another operator"),
    ({"operators": "x"}, "each at most once"),
    ({"numbers": 7}, "2 to 6"),
    ({"low": 0}, "1 <= low <= high"),
    ({"low": 9, "high": 8}, "1 <= low <= high"),
    ({"target_low": 0}, "1 <= target_low <= target_high"),
    ({"train": 0}, "train is 0"),
    ({"test": 0}, "test is 0"),
    ({"seed": -1}, "seed is -1"),
    ({"numbers": 6, "high": 725}, "64 bits"),
    ({"target_high": 2**31}, "64 bits"),
  ],
)
def test_impossible_specs_are_refused(change, message):
  with pytest.raises(ValueError, match=message):
    CountdownSpec(**change)


def test_the_largest_numbers_allowed_are_computed_exactly():
  spec = CountdownSpec(numbers=6, low=724, high=724, target_high=2**31 - 1, train=20, test=5)
  for worked in make_problems(spec)["train"]:
    assert check(worked.right, worked.problem).right
    assert check(worked.wrong, worked.problem).why == "wrong value"


def test_problems_do_not_depend_on_the_process_or_its_hash_seed():
  code = (
    "import hashlib; from rspo_jax.countdown_problems import *;"
    "print(hashlib.sha256(repr(make_problems(CountdownSpec(train=200, test=50, seed=7))).encode()).hexdigest())"
  )
  here = hashlib.sha256(repr(make_problems(CountdownSpec(train=200, test=50, seed=7))).encode()).hexdigest()
  for hash_seed in ("1", "2"):
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    there = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert there.stdout.strip() == here
  assert make_problems(CountdownSpec(train=200, test=50, seed=8)) != make_problems(CountdownSpec(train=200, test=50))


def test_fifty_thousand_problems_take_seconds():
  started = time.process_time()
  made = countdown_problems.make_problems(CountdownSpec(high=50, train=50_000))
  assert len(made["train"]) == 50_000
  assert time.process_time() - started < 15.0
