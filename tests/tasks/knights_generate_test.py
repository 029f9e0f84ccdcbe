"""Generated Knights and Knaves problems: distinct, uniquely solvable, reproducible; and their data set."""

import dataclasses
import hashlib
import itertools
import os
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.configs import knights_tiny
from experiments.setup.config_flags import read_config
from experiments.setup.data import make_tokenizer
from rspo_jax.data.datasets import ALPHABETS, DATASETS, load_knights
from rspo_jax.tasks.knights import dataset
from rspo_jax.tasks.knights.dataset import KnightsConfig
from rspo_jax.tasks.knights.generate import KnightsSpec, demonstration, key, make_problems, wrong_demonstration
from rspo_jax.tasks.knights.problem import (
  OPERATORS,
  STYLES,
  Problem,
  answer_text,
  canonical_operators,
  check,
  compact_text,
  depth,
  prompt_text,
)
from tests.support.knights_cases import brute_force, rename, truth_tables
from tests.support.processes import skip_package_code

# B is a knave; A and C are knights; exactly two of us are knights.
PROBLEM = Problem((("!", ("is", 1)), ("&", ("is", 0), ("is", 2)), ("#", 2)))
SPEC = {"train": 120, "test": 40, "seed": 5}


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 5), st.integers(0, 2**32), st.randoms(use_true_random=False))
def test_the_key_does_not_depend_on_names_or_wording(people, seed, random):
  ((problem, _),) = make_problems(KnightsSpec(people=people, depth=2, train=1, test=1, seed=seed))["train"]
  order = list(range(people))
  random.shuffle(order)

  def reworded(statement):
    operator, *parts = statement
    if operator in ("is", "#"):
      return statement
    parts = [reworded(part) for part in parts]
    if operator == ">":
      return ("|", ("!", parts[0]), parts[1])
    return (operator, *reversed(parts))

  variant = Problem(tuple(map(reworded, rename(problem.statements, order))))
  assert key(variant) == key(problem)
  assert variant.solution == tuple(problem.solution[order.index(person)] for person in range(people))


def test_the_key_differs_unless_a_renaming_makes_problems_equal():
  # With few operators many problems are similar, and different seeds generate some of them again.
  for spec in (KnightsSpec(operators="&#"), KnightsSpec(people=4, depth=0, operators="#")):
    specs = [dataclasses.replace(spec, train=80, test=1, seed=seed) for seed in range(3)]
    problems = [row.problem for spec in specs for row in make_problems(spec)["train"]]
    orders = list(itertools.permutations(range(spec.people)))
    classes = [min(truth_tables(rename(problem.statements, order)) for order in orders) for problem in problems]
    pairs = set(zip(classes, map(key, problems), strict=True))
    assert len(pairs) == len({tables for tables, _ in pairs}) == len({key_ for _, key_ in pairs}) < len(problems)


def test_the_key_of_eight_islanders_with_similar_statements_is_fast():
  start = time.process_time()
  first = Problem((("#", 0), *[("is", 0)] * 6, ("!", ("is", 0))))
  assert first.solution == (False,) * 7 + (True,)
  last = Problem((*[("!", ("is", 7))] * 2, *[("is", 7)] * 5, ("#", 0)))
  assert last.solution == (True, True, *(False,) * 6)
  assert key(first) == key(Problem(rename(first.statements, (3, 7, 6, 5, 4, 2, 1, 0)))) != key(last)
  assert time.process_time() - start < 1.0


@pytest.mark.parametrize(
  "spec",
  [
    KnightsSpec(train=600, test=200),
    KnightsSpec(people=2, train=20, test=10, seed=3),
    KnightsSpec(people=4, depth=0, operators="#", train=100, test=20),
    KnightsSpec(people=4, depth=1, operators="|>", train=300, test=50),
    KnightsSpec(people=5, depth=3, operators="!&=", train=150, test=50),
    KnightsSpec(people=8, depth=2, train=60, test=20),
  ],
)
def test_problems_are_distinct_and_within_the_spec_with_one_solution_and_a_wrong_answer(spec):
  splits = make_problems(spec)
  assert {name: len(rows) for name, rows in splits.items()} == {"train": spec.train, "test": spec.test}
  rows = splits["train"] + splits["test"]
  assert len({key(row.problem) for row in rows}) == len(rows)
  deepest = 0
  for problem, wrong in rows[:200]:
    assert len(problem.statements) == spec.people
    assert brute_force(problem.statements) == [problem.solution]
    assert len(wrong) == spec.people and wrong != problem.solution
    deepest = max(deepest, *map(depth, problem.statements))
    assert set(compact_text(problem.statements)) & set("&|>=#") <= set(spec.operators)
  assert deepest == spec.depth


def test_only_the_training_split_contains_several_namings_of_a_problem():
  splits = make_problems(KnightsSpec(people=4, train=100, test=30, namings=6))
  assert {name: len(rows) for name, rows in splits.items()} == {"train": 100, "test": 30}
  keys = {name: Counter(key(row.problem) for row in split) for name, split in splits.items()}
  assert len(keys["train"]) == 17 and max(keys["train"].values()) == 6
  assert set(keys["test"].values()) == {1}
  assert not set(keys["train"]) & set(keys["test"])
  assert len({row.problem.statements for row in splits["train"]}) > 90  # symmetric problems have equal namings
  for problem, wrong in splits["train"]:
    assert brute_force(problem.statements) == [problem.solution] != [wrong]


def test_solutions_and_wrong_answers_are_uniformly_distributed():
  rows = make_problems(KnightsSpec(train=3900, test=100))["train"]
  for counts in (Counter(row.problem.solution for row in rows), Counter(row.wrong_answer for row in rows)):
    assert len(counts) == 8
    assert max(counts.values()) < 0.125 * 1.2 * len(rows)
    assert min(counts.values()) > 0.125 * 0.8 * len(rows)


def test_statements_are_informative_and_have_no_redundant_operators():
  for problem, _ in make_problems(KnightsSpec(people=4, depth=2, train=300, test=10))["train"]:
    for person, table in enumerate(truth_tables(problem.statements)):
      assert len(set(table)) == 2
      assert table != truth_tables((("is", person),) * 4)[0]
    for text in compact_text(problem.statements).split(";"):
      assert "!!" not in text
      if len(text) == 3 and text[1] in "&|>=":
        assert text[0] != text[2]


def test_generation_finds_all_existing_problems_and_reports_their_number():
  leaves = [("is", 0), ("is", 1), ("!", ("is", 0)), ("!", ("is", 1))]
  candidates = leaves + [("&", left, right) for left, right in itertools.combinations(leaves, 2)]
  universe = set()
  for statements in itertools.product(candidates, repeat=2):
    vacuous = any(
      len(set(table)) == 1 or table == own
      for table, own in zip(truth_tables(statements), truth_tables((("is", 0), ("is", 1))), strict=True)
    )
    if not vacuous and len(brute_force(statements)) == 1:
      universe.add(min(truth_tables(statements), truth_tables(rename(statements, (1, 0)))))
  spec = KnightsSpec(people=2, operators="&", train=len(universe) - 2, test=2)
  assert {
    min(truth_tables(row.problem.statements), truth_tables(rename(row.problem.statements, (1, 0))))
    for rows in make_problems(spec).values()
    for row in rows
  } == universe
  with pytest.raises(ValueError, match=f"Found only {len(universe)} distinct .* raise people"):
    make_problems(dataclasses.replace(spec, test=3))


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"people": 1}, "people is 1"),
    ({"people": 9}, "people is 9"),
    ({"depth": -1}, "depth is -1"),
    ({"depth": 5}, "depth is 5"),
    ({"operators": "!#"}, "depth 1 needs one of"),
    ({"operators": "&&"}, "each at most once"),
    ({"operators": "+"}, "each at most once"),
    ({"depth": 0, "operators": "&"}, "without '#'"),
    ({"namings": 0}, "namings is 0; 3 islanders have 1 to 6"),
    ({"namings": 7}, "namings is 7; 3 islanders have 1 to 6"),
    ({"train": 0}, "train is 0"),
    ({"test": 0}, "test is 0"),
    ({"seed": -1}, "seed is -1"),
  ],
)
def test_invalid_specs_are_refused(change, message):
  with pytest.raises(ValueError, match=message):
    KnightsSpec(**change)


def test_problems_do_not_depend_on_the_process_or_its_hash_seed():
  code = skip_package_code("rspo_jax") + (
    "import hashlib; from rspo_jax.tasks.knights.generate import *;"
    "print(hashlib.sha256(repr(make_problems(KnightsSpec(train=200, test=50, seed=7))).encode()).hexdigest())"
  )
  here = hashlib.sha256(repr(make_problems(KnightsSpec(train=200, test=50, seed=7))).encode()).hexdigest()
  environment = {**os.environ, "PYTHONHASHSEED": "1"}
  there = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
  assert there.stdout.strip() == here
  assert make_problems(KnightsSpec(train=200, test=50, seed=8)) != make_problems(KnightsSpec(train=200, test=50))


def test_demonstrations_are_correct_and_wrong_ones_incorrect_in_both_styles():
  for style in STYLES:
    assert check(demonstration(PROBLEM, style), PROBLEM, style).reason == "right"
    samples = {wrong_demonstration(PROBLEM, np.random.default_rng(seed), style) for seed in range(100)}
    assert {check(text, PROBLEM, style).reason for text in samples} == {"wrong"}
    assert len(samples) == 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tfds")
  load_knights(folder, **SPEC)
  return folder


def test_loaded_examples_equal_the_generated_problems_in_both_styles_from_one_folder(folder, monkeypatch):
  generated = make_problems(KnightsSpec(**SPEC))
  monkeypatch.setattr(dataset, "make_problems", lambda spec: pytest.fail("generated again"))
  for style in STYLES:
    splits = DATASETS["knights"](folder, style=style, **SPEC)
    assert {name: len(split) for name, split in splits.items()} == {"train": 120, "test": 40}
    for name, split in splits.items():
      for example, row in zip(split.examples, generated[name], strict=True):
        assert example.gold == row.problem
        assert example.prompt == prompt_text(row.problem, style)
        assert example.metadata == {"style": style}
        assert check(example.demonstration, example.gold, style).reason == "right"
        assert check(example.wrong_demonstration, example.gold, style).reason == "wrong"
        assert check(example.wrong_demonstration, example.gold, style).answer == answer_text(row.wrong_answer)
  assert len(list(folder.glob("knights/*/1.0.0"))) == 1


def test_every_field_of_the_spec_is_part_of_the_folder_name():
  base = KnightsSpec()
  for field in dataclasses.fields(base):
    other = "&" if field.name == "operators" else getattr(base, field.name) + 1
    changed = dataclasses.replace(base, **{field.name: other})
    assert KnightsConfig.from_spec(changed).name != KnightsConfig.from_spec(base).name, field.name
  assert KnightsSpec(operators="#=&") == KnightsSpec(operators="&=#")
  assert canonical_operators("#!") == "!#" and len(canonical_operators(OPERATORS)) == 6


@pytest.mark.parametrize(
  ("field", "value", "cause"),
  [
    ("statements", b"A;B;C", "assignments of roles satisfy 'A;B;C'"),
    ("statements", b"A&;B;C", "want a letter"),
    ("statements", b"\xff", "UnicodeDecodeError"),
    ("statements", None, "KeyError: 'statements'"),
    ("solution", b"A1", "has the solution 'A1'"),
    ("wrong", b"A1B", "has the wrong answer 'A1B'"),
  ],
)
def test_a_broken_record_is_reported_or_skipped(folder, monkeypatch, field, value, cause):
  prepare = dataset.prepare

  def damaged(spec, root):
    splits = {name: list(records) for name, records in prepare(spec, root).items()}
    record = splits["train"][7] | {field: value}
    splits["train"][7] = {name: data for name, data in record.items() if data is not None}
    return splits

  monkeypatch.setattr(dataset, "prepare", damaged)
  with pytest.raises(ValueError, match=f"Record 7 of knights/train in .*{cause}"):
    load_knights(folder, **SPEC)
  splits = load_knights(folder, on_broken="skip", **SPEC)
  assert splits["train"].skipped == (7,) and len(splits["train"]) == 119


def test_an_unknown_setting_is_reported_with_the_known_ones(tmp_path):
  with pytest.raises(ValueError, match="no setting peple; it has people, .*, style"):
    load_knights(tmp_path, peple=3)


def test_the_character_tokenizer_round_trips_compact_prompts_and_answers(folder):
  tokenizer = make_tokenizer("", "knights")
  config = read_config(knights_tiny.get_config())
  assert tokenizer.vocab_size <= config.model.vocab_size
  for example in load_knights(folder, **SPEC)["train"].examples:
    for text in (example.prompt, example.demonstration, example.wrong_demonstration):
      assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(example.demonstration) < config.sampling.max_new_tokens  # with the end token


def test_a_data_set_without_an_alphabet_needs_a_tokenizer():
  assert set(ALPHABETS) == {"countdown", "knights"}
  with pytest.raises(ValueError, match=r"config.tokenizer is ''.*no list of characters; only countdown, knights"):
    make_tokenizer("", "files")
  assert make_tokenizer("bytes", "files").vocab_size == 257
