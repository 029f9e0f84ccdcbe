"""Knights and Knaves against a solver that never saw ours, answers of every kind, and the data set."""

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

from experiments.config_io import read_config
from experiments.configs import knights_tiny
from experiments.problems import make_tokenizer
from rspo_jax import knights_tfds
from rspo_jax.data import ALPHABETS, DATASETS, Example, load_knights
from rspo_jax.knights import (
  ALPHABET,
  NAMES,
  OPERATORS,
  STYLES,
  Problem,
  answer_text,
  canonical_operators,
  check,
  compact_text,
  depth,
  parse,
  prompt_text,
  solutions,
)
from rspo_jax.knights_answers import READ, read
from rspo_jax.knights_problems import KnightsSpec, demonstration, key, make_problems, wrong_demonstration
from rspo_jax.knights_tfds import KnightsConfig
from rspo_jax.rewards import make_reward

# B is a knave; A and C are knights; exactly two of us are knights.
PROBLEM = Problem((("!", ("is", 1)), ("&", ("is", 0), ("is", 2)), ("#", 2)))
SPEC = {"train": 120, "test": 40, "seed": 5}


def statements_of(people, leaves=6):
  """Any statement of so many islanders, however silly."""
  leaf = st.tuples(st.just("is"), st.integers(0, people - 1)) | st.tuples(st.just("#"), st.integers(0, people))
  nested = st.recursive(
    leaf,
    lambda part: st.tuples(st.just("!"), part) | st.tuples(st.sampled_from("&|>="), part, part),
    max_leaves=leaves,
  )
  return nested.filter(lambda statement: nesting(statement) < 8)


def nesting(statement):
  return 0 if statement[0] in ("is", "#") else 1 + max(map(nesting, statement[1:]))


scenes = st.integers(2, 4).flatmap(lambda people: st.tuples(*[statements_of(people)] * people))


def spoken_truth(statement, roles):
  operator, *parts = statement
  if operator == "is":
    return roles[parts[0]]
  if operator == "#":
    return sum(roles) == parts[0]
  said = [spoken_truth(part, roles) for part in parts]
  if operator == "!":
    return not said[0]
  if operator == "&":
    return all(said)
  if operator == "|":
    return any(said)
  return said[0] == said[1] or (operator == ">" and said[1])


def brute_force(statements):
  return [
    roles
    for roles in itertools.product((False, True), repeat=len(statements))
    if all(spoken_truth(statement, roles) == role for statement, role in zip(statements, roles, strict=True))
  ]


def renamed(statement, order):
  operator, *parts = statement
  if operator == "is":
    return ("is", order[parts[0]])
  return statement if operator == "#" else (operator, *(renamed(part, order) for part in parts))


def rename(statements, order):
  """The same scene where islander i is called order[i]."""
  moved = [None] * len(statements)
  for person, statement in enumerate(statements):
    moved[order[person]] = renamed(statement, order)
  return tuple(moved)


def meaning(statements):
  """Per islander what is said, as the truth in every assignment."""
  cases = list(itertools.product((False, True), repeat=len(statements)))
  return tuple(tuple(spoken_truth(statement, roles) for roles in cases) for statement in statements)


@settings(max_examples=200, deadline=None)
@given(scenes)
def test_the_solver_finds_what_brute_force_finds(statements):
  found = brute_force(statements)
  assert solutions(statements) == found
  if len(found) == 1:
    assert Problem(statements).solution == found[0]
  else:
    with pytest.raises(ValueError, match=f"{len(found)} assignments fit"):
      Problem(statements)


def test_operators_mean_what_they_are_called():
  a, b = ("is", 0), ("is", 1)
  for x, y in itertools.product((False, True), repeat=2):
    expected = {"&": x and y, "|": x or y, ">": not x or y, "=": x == y}
    for operator, value in expected.items():
      # Two more people repeat the statement and its negation, so who is a knight says what is true.
      scene = (a if x else ("!", a), b if y else ("!", b), (operator, a, b), ("!", (operator, a, b)))
      assert {roles[2:] for roles in solutions(scene) if roles[:2] == (x, y)} <= {(value, not value)}
  assert solutions((("#", 1), ("#", 2), ("#", 0))) == [(True, False, False)]


@settings(max_examples=200, deadline=None)
@given(scenes)
def test_compact_text_is_read_back(statements):
  assert parse(compact_text(statements)) == statements
  assert set(compact_text(statements)) <= set(ALPHABET)


def test_prompts_tell_problems_apart_in_both_styles():
  made = make_problems(KnightsSpec(depth=2, train=300, test=10))["train"]
  for style in STYLES:
    assert len({prompt_text(worked.problem, style) for worked in made}) == len(made)


def test_a_problem_reads_like_this():
  assert prompt_text(PROBLEM) == "A:!B;B:A&C;C:#2?"
  english = prompt_text(PROBLEM, "english")
  assert "You meet Alice, Bob and Carol." in english
  assert 'Alice says: "Bob is a knave."\n' in english
  assert 'Bob says: "Alice is a knight and Carol is a knight."\n' in english
  assert 'Carol says: "Exactly 2 of us are knights."\n' in english
  assert demonstration(PROBLEM) == "A1B0C0"
  assert demonstration(PROBLEM, "english") == r"\boxed{Alice is a knight, Bob is a knave, Carol is a knave}"
  nested = Problem((("!", (">", ("&", ("is", 0), ("is", 1)), ("#", 0))), ("|", ("is", 0), ("#", 0))))
  assert prompt_text(nested) == "A:!((A&B)>#0);B:A|#0?"
  assert (
    'Alice says: "It is not the case that (if (Alice is a knight and Bob is a knight), then none of us is a knight)."'
    in prompt_text(nested, "english")
  )


@pytest.mark.parametrize(
  ("text", "wanted"),
  [
    ("", "the end"),
    ("A;", "the end"),
    ("A&B&C", "want ';'"),
    ("(A&B", r"want '\)'"),
    ("A)", "want ';'"),
    ("&A", "want a letter"),
    ("#", "want a letter"),
    ("#x", "want a letter"),
    ("A;;B", "want a letter"),
    ("I;A", "want a letter"),
    ("A;B\n", "want ';'"),
    ("!" * 100_000, "at most 8"),
    ("(" * 100_000, "at most 8"),
  ],
)
def test_texts_that_are_no_statements_are_refused(text, wanted):
  with pytest.raises(ValueError, match=wanted):
    parse(text)


@pytest.mark.parametrize(
  "statements",
  [
    (("is", 0),),
    (("is", 0),) * 9,
    [("is", 1), ("is", 0)],
    (("is", 2), ("#", 1)),
    (("is", True), ("#", 1)),
    (("#", 3), ("is", 0)),
    (("#", -1), ("is", 0)),
    (("^", ("is", 0), ("is", 1)), ("is", 0)),
    (("&", ("is", 0)), ("is", 0)),
    (("", ("is", 0), ("is", 1)), ("is", 0)),
    (["is", 0], ("is", 0)),
    ("AB", "BA"),
    (None, None),
  ],
)
def test_what_are_no_statements_is_refused(statements):
  with pytest.raises(ValueError, match=r"want a tuple|is no statement"):
    Problem(statements)


@pytest.mark.parametrize(
  ("text", "why"),
  [
    ("A1B0C0", "right"),
    ("A0B0C0", "wrong"),
    ("A1B1C1", "wrong"),
    ("", "not an answer"),
    ("A1B0", "not an answer"),
    ("A1B0C", "not an answer"),
    ("A1B0C0D0", "not an answer"),
    ("A1B0C0A1B0C0", "not an answer"),
    ("A1B0C0 ", "not an answer"),
    (" A1B0C0", "not an answer"),
    ("A1B0C0\n", "not an answer"),
    ("B0A1C0", "not an answer"),
    ("A1A0C0", "not an answer"),
    ("a1b0c0", "not an answer"),
    ("A1B0C2", "not an answer"),
    ("A1B0C０", "not an answer"),
    ("А1B0C0", "not an answer"),  # a Cyrillic letter
    ("100", "not an answer"),
    ("A1B0C0\ud800", "not an answer"),
    ("A1B0C0" * 100_000, "not an answer"),
  ],
)
def test_compact_answers_are_judged_to_the_letter(text, why):
  verdict = check(text, PROBLEM)
  assert verdict == (why in ("right", "wrong"), why == "right", why, text if why in ("right", "wrong") else "")


RIGHT = "Alice is a knight, Bob is a knave, Carol is a knave"


@pytest.mark.parametrize(
  "text",
  [
    rf"\boxed{{{RIGHT}}}",
    rf"We get $\boxed {{\text{{{RIGHT}}}}}$.",
    rf"\boxed{{Alice is a knave}} No: \boxed{{{RIGHT}.}}",
    rf"\boxed{{\boxed{{{RIGHT}}}}}",
    rf"\boxed{{{RIGHT}}} \boxed{{",
    rf"\boxed{{ \boxed{{{RIGHT}}}",
    r"\boxed{Alice is a \textbf{knight}; Bob and Carol are knaves}",
    r"\boxed{Bob is a knave & Carol isn't a knight, and Alice must be a knight.}",
    r"\boxed{Alice: knight, Bob: knave, Carol = Knave}",
    rf"\boxed{{{RIGHT}, Alice is a knight}}",
    rf"Suppose Alice is a knave. Then Bob is a knight and Carol is a knight, which fails. So {RIGHT}.",
    f"{RIGHT}.\nThat is all!",
    "Alice is a knave. Wait. Alice is a knight. Bob is a knave. Carol is a knave.",
    "- **Alice**: knight\n- **Bob**: knave\n- **Carol**: knave",
    "ALICE IS A KNIGHT, bob is a knave\nCarol is not a knight\nDoes that fit? Would Alice be a knave?",
    f'{RIGHT}. After all, Alice says "Bob is a knave".',
    "x" * 100_000 + f" {RIGHT}",
  ],
)
def test_right_english_answers_are_right(text):
  assert check(text, PROBLEM, "english") == (True, True, "right", "A1B0C0")


@pytest.mark.parametrize(
  ("text", "why"),
  [
    ("", "no answer"),
    ("A1B0C0", "no answer"),
    (r"\boxed{}", "no answer"),
    (r"\boxed{A1B0C0}", "not an answer"),
    (rf"{RIGHT} \boxed{{42}}", "not an answer"),
    (r"\boxed{Alice is a knight, Bob is a knave}", "names missing"),
    ("Alice is a knight. Bob is a knave.", "names missing"),
    (rf"\boxed{{{RIGHT}, David is a knave}}", "not an answer"),
    (rf"\boxed{{{RIGHT}, everybody else is a knave}}", "not an answer"),
    (rf"\boxed{{not {RIGHT}}}", "not an answer"),
    (r"\boxed{Alice is a knight or a knave, Bob is a knave, Carol is a knave}", "not an answer"),
    (r"\boxed{Alice is a knight or Bob is a knave or Carol is a knave}", "not an answer"),
    (rf"\boxed{{{RIGHT}, Alice is a knave}}", "contradictory"),
    (rf"\boxed{{Alice is a knave, \boxed{{{RIGHT}}}}}", "contradictory"),
    (r"\boxed{Alice is a knight, Alice is not a knight, Bob is a knave, Carol is a knave}", "contradictory"),
    (f"{RIGHT}, Alice is a knave.", "contradictory"),
    (f"If {RIGHT}.", "no answer"),
    (f'Dana says "{RIGHT}"', "no answer"),
    ("Alice is a knight or a knave. Bob is a knave. Carol is a knave.", "names missing"),
    (RIGHT.replace("A", "\u0410"), "names missing"),  # a Cyrillic letter
    (RIGHT.replace("Alice", "Аl\u200bice"), "names missing"),
    (RIGHT.replace("Bob", "éBob"), "names missing"),
    (RIGHT.replace("Alice", "Ａｌｉｃｅ"), "names missing"),
    (RIGHT + "x" * READ, "no answer"),
    ("\ud800\x00", "no answer"),
  ],
)
def test_english_without_one_clear_role_for_each_is_not_valid(text, why):
  assert check(text, PROBLEM, "english") == (False, False, why, "")


def test_wrong_english_answers_are_valid_and_the_last_word_counts():
  assert check(rf"\boxed{{{RIGHT}}} \boxed{{{RIGHT.replace('knave', 'knight')}}}", PROBLEM, "english") == (
    True,
    False,
    "wrong",
    "A1B1C1",
  )
  changed = f"{RIGHT}.\nAlternatively, Alice is a knave, Bob is a knave, Carol is a knave."
  assert check(changed, PROBLEM, "english").answer == "A0B0C0"


@settings(max_examples=100, deadline=None)
@given(st.lists(st.booleans(), min_size=2, max_size=8).map(tuple), st.data())
def test_roles_survive_being_written_and_read(roles, data):
  assert read(answer_text(roles, "english"), NAMES[: len(roles)]) == (roles, "")
  forms = ["{} is a {}", "{}: {}", "so {} must be a {}", "**{}** is the {}"]
  said = [
    data.draw(st.sampled_from(forms)).format(name, "knight" if role else "knave")
    for name, role in data.draw(st.permutations(list(zip(NAMES, roles, strict=False))))
  ]
  joined = data.draw(st.sampled_from([", ", ".\n", "; ", " and ", "\n- "])).join(said)
  assert read(joined, NAMES[: len(roles)]) == (roles, "")


PIECES = [*"{},.\n", "Alice", "Bob", "Carol", " is a ", " are ", "knight", "knave", " and ", " or ", r"\boxed{"]


@settings(max_examples=300, deadline=None)
@given(st.text(), st.lists(st.sampled_from(PIECES), max_size=40).map("".join))
def test_no_text_raises_and_arbitrary_text_is_no_answer(text, collage):
  for style in STYLES:
    assert not check(text, PROBLEM, style).valid
    verdict = check(collage, PROBLEM, style)
    assert verdict.valid == bool(verdict.answer) and verdict.right == (verdict.answer == "A1B0C0")


def test_nothing_a_policy_writes_takes_long():
  long = [*"{}\\\n ", "Alice, ", r"\boxed{", "Alice is ", "Alice and ", "Alice is a knight or ", f"{RIGHT}. "]
  started = time.process_time()
  for text in long:
    check(text * 100_000, PROBLEM, "english")
  assert time.process_time() - started < 2.0


def test_an_unknown_style_is_refused():
  for call in (lambda: check("", PROBLEM, "x"), lambda: prompt_text(PROBLEM, "x"), lambda: load_knights(style="x")):
    with pytest.raises(ValueError, match="style is 'x'; want one of compact, english"):
      call()


def test_the_reward_pays_for_right_roles_and_a_little_for_the_form():
  example = Example(prompt_text(PROBLEM), PROBLEM, metadata={"style": "compact"})
  reward = make_reward("knights", format_reward=0.25)
  assert reward("A1B0C0", example) == (1.0, True, True, "right", "A1B0C0")
  assert reward("A1B0C1", example) == (0.25, False, True, "wrong", "A1B0C1")
  assert reward("A1B0", example) == (0.0, False, False, "not an answer", "")
  english = example._replace(metadata={"style": "english"})
  one, other = reward(RIGHT, english), reward(r"\boxed{Bob and Carol are knaves, Alice is a knight}", english)
  assert one == other == (1.0, True, True, "right", "A1B0C0")
  for wrong in (1.0, -0.1):
    with pytest.raises(ValueError, match="format_reward is"):
      make_reward("knights", format_reward=wrong)("A1B0C0", example)


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 5), st.integers(0, 2**32), st.randoms(use_true_random=False))
def test_the_key_does_not_see_names_or_wording(people, seed, random):
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

  told = Problem(tuple(map(reworded, rename(problem.statements, order))))
  assert key(told) == key(problem)
  assert told.solution == tuple(problem.solution[order.index(person)] for person in range(people))


def test_the_key_tells_apart_whatever_no_renaming_makes_equal():
  # Few operators, so that many problems are nearly the same, and other seeds make some of them again.
  for spec in (KnightsSpec(operators="&#"), KnightsSpec(people=4, depth=0, operators="#")):
    specs = [dataclasses.replace(spec, train=80, test=1, seed=seed) for seed in range(3)]
    problems = [worked.problem for spec in specs for worked in make_problems(spec)["train"]]
    orders = list(itertools.permutations(range(spec.people)))
    classes = [min(meaning(rename(problem.statements, order)) for order in orders) for problem in problems]
    pairs = set(zip(classes, map(key, problems), strict=True))
    assert len(pairs) == len({one for one, _ in pairs}) == len({other for _, other in pairs}) < len(problems)


def test_a_key_of_many_islanders_who_all_say_the_same_takes_no_time():
  started = time.process_time()
  first = Problem((("#", 0), *[("is", 0)] * 6, ("!", ("is", 0))))
  assert first.solution == (False,) * 7 + (True,)
  last = Problem((*[("!", ("is", 7))] * 2, *[("is", 7)] * 5, ("#", 0)))
  assert last.solution == (True, True, *(False,) * 6)
  assert key(first) == key(Problem(rename(first.statements, (3, 7, 6, 5, 4, 2, 1, 0)))) != key(last)
  assert time.process_time() - started < 1.0


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
  assert {name: len(worked) for name, worked in splits.items()} == {"train": spec.train, "test": spec.test}
  everything = splits["train"] + splits["test"]
  assert len({key(worked.problem) for worked in everything}) == len(everything)
  deepest = 0
  for problem, wrong in everything[:200]:
    assert len(problem.statements) == spec.people
    assert brute_force(problem.statements) == [problem.solution]
    assert len(wrong) == spec.people and wrong != problem.solution
    deepest = max(deepest, *map(depth, problem.statements))
    assert set(compact_text(problem.statements)) & set("&|>=#") <= set(spec.operators)
  assert deepest == spec.depth


def test_namings_of_a_problem_stay_in_the_training_split():
  splits = make_problems(KnightsSpec(people=4, train=100, test=30, namings=6))
  assert {name: len(worked) for name, worked in splits.items()} == {"train": 100, "test": 30}
  keys = {name: Counter(key(worked.problem) for worked in split) for name, split in splits.items()}
  assert len(keys["train"]) == 17 and max(keys["train"].values()) == 6
  assert set(keys["test"].values()) == {1}
  assert not set(keys["train"]) & set(keys["test"])
  assert len({worked.problem.statements for worked in splits["train"]}) > 90  # some problems look alike from all sides
  for problem, wrong in splits["train"]:
    assert brute_force(problem.statements) == [problem.solution] != [wrong]


def test_every_answer_is_as_likely_and_so_is_every_wrong_one():
  made = make_problems(KnightsSpec(train=3900, test=100))["train"]
  for counts in (Counter(worked.problem.solution for worked in made), Counter(worked.wrong for worked in made)):
    assert len(counts) == 8
    assert max(counts.values()) < 0.125 * 1.2 * len(made)
    assert min(counts.values()) > 0.125 * 0.8 * len(made)


def test_statements_say_something_and_no_operator_is_idle():
  for problem, _ in make_problems(KnightsSpec(people=4, depth=2, train=300, test=10))["train"]:
    for person, said in enumerate(meaning(problem.statements)):
      assert len(set(said)) == 2
      assert said != meaning((("is", person),) * 4)[0]
    for text in compact_text(problem.statements).split(";"):
      assert "!!" not in text
      if len(text) == 3 and text[1] in "&|>=":
        assert text[0] != text[2]


def test_the_whole_universe_can_be_had_and_nothing_more():
  leaves = [("is", 0), ("is", 1), ("!", ("is", 0)), ("!", ("is", 1))]
  said = leaves + [("&", left, right) for left, right in itertools.combinations(leaves, 2)]
  universe = set()
  for statements in itertools.product(said, repeat=2):
    vacuous = any(
      len(set(truth)) == 1 or truth == own
      for truth, own in zip(meaning(statements), meaning((("is", 0), ("is", 1))), strict=True)
    )
    if not vacuous and len(brute_force(statements)) == 1:
      universe.add(min(meaning(statements), meaning(rename(statements, (1, 0)))))
  spec = KnightsSpec(people=2, operators="&", train=len(universe) - 2, test=2)
  assert {
    min(meaning(worked.problem.statements), meaning(rename(worked.problem.statements, (1, 0))))
    for split in make_problems(spec).values()
    for worked in split
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
def test_impossible_specs_are_refused(change, message):
  with pytest.raises(ValueError, match=message):
    KnightsSpec(**change)


def test_problems_do_not_depend_on_the_process_or_its_hash_seed():
  code = (
    "import hashlib; from rspo_jax.knights_problems import *;"
    "print(hashlib.sha256(repr(make_problems(KnightsSpec(train=200, test=50, seed=7))).encode()).hexdigest())"
  )
  here = hashlib.sha256(repr(make_problems(KnightsSpec(train=200, test=50, seed=7))).encode()).hexdigest()
  environment = {**os.environ, "PYTHONHASHSEED": "1"}
  there = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
  assert there.stdout.strip() == here
  assert make_problems(KnightsSpec(train=200, test=50, seed=8)) != make_problems(KnightsSpec(train=200, test=50))


def test_demonstrations_are_right_and_wrong_in_both_styles():
  for style in STYLES:
    assert check(demonstration(PROBLEM, style), PROBLEM, style).why == "right"
    drawn = {wrong_demonstration(PROBLEM, np.random.default_rng(seed), style) for seed in range(100)}
    assert {check(text, PROBLEM, style).why for text in drawn} == {"wrong"}
    assert len(drawn) == 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tfds")
  load_knights(folder, **SPEC)
  return folder


def test_what_is_read_is_what_was_made_in_both_styles_and_from_one_folder(folder, monkeypatch):
  made = make_problems(KnightsSpec(**SPEC))
  monkeypatch.setattr(knights_tfds, "make_problems", lambda spec: pytest.fail("made again"))
  for style in STYLES:
    splits = DATASETS["knights"](folder, style=style, **SPEC)
    assert {name: len(split) for name, split in splits.items()} == {"train": 120, "test": 40}
    for name, split in splits.items():
      for example, worked in zip(split.examples, made[name], strict=True):
        assert example.gold == worked.problem
        assert example.prompt == prompt_text(worked.problem, style)
        assert example.metadata == {"style": style}
        assert check(example.demonstration, example.gold, style).why == "right"
        assert check(example.wrong_demonstration, example.gold, style).why == "wrong"
        assert check(example.wrong_demonstration, example.gold, style).answer == answer_text(worked.wrong)
  assert len(list(folder.glob("knights/*/1.0.0"))) == 1


def test_every_field_of_the_spec_is_part_of_the_folders_name():
  base = KnightsSpec()
  for field in dataclasses.fields(base):
    other = "&" if field.name == "operators" else getattr(base, field.name) + 1
    changed = dataclasses.replace(base, **{field.name: other})
    assert KnightsConfig.of(changed).name != KnightsConfig.of(base).name, field.name
  assert KnightsSpec(operators="#=&") == KnightsSpec(operators="&=#")
  assert canonical_operators("#!") == "!#" and len(canonical_operators(OPERATORS)) == 6


@pytest.mark.parametrize(
  ("field", "value", "cause"),
  [
    ("statements", b"A;B;C", "assignments fit 'A;B;C'"),
    ("statements", b"A&;B;C", "want a letter"),
    ("statements", b"\xff", "UnicodeDecodeError"),
    ("statements", None, "KeyError: 'statements'"),
    ("solution", b"A1", "has the solution 'A1'"),
    ("wrong", b"A1B", "has the wrong answer 'A1B'"),
  ],
)
def test_a_broken_record_is_named_or_left_out(folder, monkeypatch, field, value, cause):
  prepare = knights_tfds.prepare

  def damaged(spec, root):
    splits = {name: list(records) for name, records in prepare(spec, root).items()}
    splits["train"][7] = {name: was for name, was in (splits["train"][7] | {field: value}).items() if was is not None}
    return splits

  monkeypatch.setattr(knights_tfds, "prepare", damaged)
  with pytest.raises(ValueError, match=f"Record 7 of knights/train in .*{cause}"):
    load_knights(folder, **SPEC)
  splits = load_knights(folder, on_broken="skip", **SPEC)
  assert splits["train"].skipped == (7,) and len(splits["train"]) == 119


def test_an_unknown_setting_is_named_with_those_there_are(tmp_path):
  with pytest.raises(ValueError, match="no setting peple; it has people, .*, style"):
    load_knights(tmp_path, peple=3)


def test_compact_prompts_and_answers_have_a_token_for_every_character(folder):
  tokenizer = make_tokenizer("", "knights")
  config = read_config(knights_tiny.get_config())
  assert tokenizer.vocab_size <= config.model.vocab_size
  for example in load_knights(folder, **SPEC)["train"].examples:
    for text in (example.prompt, example.demonstration, example.wrong_demonstration):
      assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(example.demonstration) < config.sampling.max_new_tokens  # with the end token


def test_a_data_set_without_an_alphabet_needs_a_tokenizer():
  assert set(ALPHABETS) == {"countdown", "knights"}
  with pytest.raises(ValueError, match=r"config.tokenizer is ''.*files has no list; only countdown, knights"):
    make_tokenizer("", "files")
  assert make_tokenizer("bytes", "files").vocab_size == 257
