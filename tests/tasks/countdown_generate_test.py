"""Generated Countdown problems: solutions against brute force, distinctness, ranges, reproducibility, speed."""

import ast
import dataclasses
import hashlib
import itertools
import os
import subprocess
import sys
import time

import numpy as np
import pytest

from rspo_jax.tasks.countdown.generate import (
  CountdownSpec,
  demonstration,
  make_problems,
  solutions,
  wrong_demonstration,
)
from rspo_jax.tasks.countdown.problem import Problem, check
from tests.support.countdown_cases import PROBLEM, value_of
from tests.support.processes import skip_package_code


def brute_force(numbers, operators):
  """{value: one tree} over all trees with three numbers as leaves."""
  trees = {}
  for (a, b, c), f, g in itertools.product(itertools.permutations(numbers), operators, operators):
    for tree in ((g, (f, a, b), c), (f, a, (g, b, c))):
      try:
        trees.setdefault(value_of(tree), tree)
      except ZeroDivisionError:
        continue
  return trees


@pytest.mark.parametrize(("numbers", "operators"), [((3, 7, 12), "+-*/"), ((4, 4, 1), "+-*/"), ((6, 2, 9), "-/")])
def test_solutions_are_correct_and_exist_exactly_where_brute_force_finds_one(numbers, operators):
  reachable = brute_force(numbers, operators)
  for target in range(1, 121):
    problem = Problem(numbers, target)
    texts = solutions(problem, operators)
    assert bool(texts) == (target in reachable)
    assert all(check(text, problem, operators).correct for text in texts)
    assert len(set(texts)) == len(texts)
    left_trees = (
      ast.unparse(ast.parse(f"({a}{f}{b}){g}{c}")).replace(" ", "")
      for (a, b, c), f, g in itertools.product(itertools.permutations(numbers), operators, operators)
    )
    assert {text for text in left_trees if check(text, problem).correct} <= set(texts)


def test_solutions_for_four_numbers_include_those_with_fractions():
  assert "8/(3-8/3)" in solutions(Problem((3, 3, 8, 8), 24))
  assert not solutions(Problem((1, 1, 1, 1), 24))


def test_demonstrations_depend_only_on_the_random_generator():
  samples = [demonstration(PROBLEM, np.random.default_rng(seed)) for seed in range(30)]
  assert set(samples) == set(solutions(PROBLEM))
  assert samples[:5] == [demonstration(PROBLEM, np.random.default_rng(seed)) for seed in range(5)]
  wrong = wrong_demonstration(PROBLEM, np.random.default_rng(0), "+-")
  assert check(wrong, PROBLEM, "+-").reason == "wrong value"
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
    CountdownSpec(numbers=5, high=3, target_high=20, train=150, test=30),  # many divisions by zero
    CountdownSpec(numbers=6, high=100, target_low=100, target_high=999, train=200, test=100),
  ],
)
def test_problems_are_distinct_and_within_the_spec_with_a_solution_and_a_wrong_answer(spec):
  splits = make_problems(spec)
  assert {name: len(rows) for name, rows in splits.items()} == {"train": spec.train, "test": spec.test}
  rows = splits["train"] + splits["test"]
  assert len({row.problem.key for row in rows}) == len(rows)
  for problem, solution, wrong_answer in rows:
    assert len(problem.numbers) == spec.numbers
    assert all(spec.low <= number <= spec.high for number in problem.numbers)
    assert spec.target_low <= problem.target <= spec.target_high
    assert check(solution, problem, spec.operators).correct
    assert check(wrong_answer, problem, spec.operators).reason == "wrong value"


def test_splits_are_equally_hard():
  # The problems sampled first have the most solutions; a split of these would be easier.
  splits = make_problems(CountdownSpec(train=10_000, test=1_000))
  mean_solutions = {
    name: np.mean([len(solutions(row.problem)) for row in rows[:: len(rows) // 500]]) for name, rows in splits.items()
  }
  assert abs(mean_solutions["train"] - mean_solutions["test"]) < 0.2 * mean_solutions["train"]


def test_generation_finds_all_existing_problems_and_reports_their_number():
  spec = CountdownSpec(numbers=3, high=4, target_high=12, train=10, test=10)
  universe = {
    (numbers, int(value))
    for numbers in itertools.combinations_with_replacement(range(1, 5), 3)
    for value in brute_force(numbers, "+-*/")
    if value.denominator == 1 and 1 <= value <= 12
  }
  splits = make_problems(dataclasses.replace(spec, train=len(universe) - 10))
  assert {row.problem.key for row in splits["train"] + splits["test"]} == universe
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
def test_invalid_specs_are_refused(change, message):
  with pytest.raises(ValueError, match=message):
    CountdownSpec(**change)


def test_the_largest_numbers_allowed_are_computed_exactly():
  spec = CountdownSpec(numbers=6, low=724, high=724, target_high=2**31 - 1, train=20, test=5)
  for problem, solution, wrong_answer in make_problems(spec)["train"]:
    assert check(solution, problem).correct
    assert check(wrong_answer, problem).reason == "wrong value"


def test_problems_do_not_depend_on_the_process_or_its_hash_seed():
  code = skip_package_code("rspo_jax") + (
    "import hashlib; from rspo_jax.tasks.countdown.generate import *;"
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
  splits = make_problems(CountdownSpec(high=50, train=50_000))
  assert len(splits["train"]) == 50_000
  assert time.process_time() - started < 15.0
