"""Knights and Knaves: the solver against an independent one, prompts, parsing, and checking of answers."""

import itertools
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rspo_jax.data.datasets import load_knights
from rspo_jax.data.examples import Example
from rspo_jax.rewards.table import make_reward
from rspo_jax.tasks.knights.answers import MAX_LENGTH, roles_from_english
from rspo_jax.tasks.knights.generate import KnightsSpec, demonstration, make_problems
from rspo_jax.tasks.knights.problem import (
  ALPHABET,
  NAMES,
  STYLES,
  Problem,
  answer_text,
  check,
  compact_text,
  parse,
  prompt_text,
  solutions,
)
from tests.support.knights_cases import brute_force

# B is a knave; A and C are knights; exactly two of us are knights.
PROBLEM = Problem((("!", ("is", 1)), ("&", ("is", 0), ("is", 2)), ("#", 2)))


def statements_of(people, leaves=6):
  """Arbitrary statements about `people` islanders."""
  leaf = st.tuples(st.just("is"), st.integers(0, people - 1)) | st.tuples(st.just("#"), st.integers(0, people))
  nested = st.recursive(
    leaf,
    lambda part: st.tuples(st.just("!"), part) | st.tuples(st.sampled_from("&|>="), part, part),
    max_leaves=leaves,
  )
  return nested.filter(lambda statement: nesting(statement) < 8)


def nesting(statement):
  return 0 if statement[0] in ("is", "#") else 1 + max(map(nesting, statement[1:]))


statement_lists = st.integers(2, 4).flatmap(lambda people: st.tuples(*[statements_of(people)] * people))


@settings(max_examples=200, deadline=None)
@given(statement_lists)
def test_solutions_agree_with_brute_force(statements):
  expected = brute_force(statements)
  assert solutions(statements) == expected
  if len(expected) == 1:
    assert Problem(statements).solution == expected[0]
  else:
    with pytest.raises(ValueError, match=f"{len(expected)} assignments of roles satisfy"):
      Problem(statements)


def test_operators_have_their_logical_meaning():
  a, b = ("is", 0), ("is", 1)
  for x, y in itertools.product((False, True), repeat=2):
    expected = {"&": x and y, "|": x or y, ">": not x or y, "=": x == y}
    for operator, value in expected.items():
      # The roles of two more islanders, who state the compound and its negation, give its truth value.
      statements = (a if x else ("!", a), b if y else ("!", b), (operator, a, b), ("!", (operator, a, b)))
      assert {roles[2:] for roles in solutions(statements) if roles[:2] == (x, y)} <= {(value, not value)}
  assert solutions((("#", 1), ("#", 2), ("#", 0))) == [(True, False, False)]


@settings(max_examples=200, deadline=None)
@given(statement_lists)
def test_parse_inverts_compact_text(statements):
  assert parse(compact_text(statements)) == statements
  assert set(compact_text(statements)) <= set(ALPHABET)


def test_different_problems_have_different_prompts_in_both_styles():
  rows = make_problems(KnightsSpec(depth=2, train=300, test=10))["train"]
  for style in STYLES:
    assert len({prompt_text(row.problem, style) for row in rows}) == len(rows)


def test_prompts_and_demonstrations_of_example_problems():
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
  ("text", "expected"),
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
def test_parse_refuses_malformed_text(text, expected):
  with pytest.raises(ValueError, match=expected):
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
def test_invalid_statements_are_refused(statements):
  with pytest.raises(ValueError, match=r"want a tuple|is no statement"):
    Problem(statements)


@pytest.mark.parametrize(
  ("text", "reason"),
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
def test_verdicts_on_compact_answers(text, reason):
  verdict = check(text, PROBLEM)
  assert verdict == (
    reason in ("right", "wrong"),
    reason == "right",
    reason,
    text if reason in ("right", "wrong") else "",
  )


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
def test_correct_english_answers_are_accepted(text):
  assert check(text, PROBLEM, "english") == (True, True, "right", "A1B0C0")


@pytest.mark.parametrize(
  ("text", "reason"),
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
    (RIGHT + "x" * MAX_LENGTH, "no answer"),
    ("\ud800\x00", "no answer"),
  ],
)
def test_english_without_exactly_one_role_for_each_islander_is_not_valid(text, reason):
  assert check(text, PROBLEM, "english") == (False, False, reason, "")


def test_incorrect_english_answers_are_valid_and_the_last_claim_counts():
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
def test_parsed_roles_are_those_that_were_written(roles, data):
  assert roles_from_english(answer_text(roles, "english"), NAMES[: len(roles)]) == (roles, "")
  forms = ["{} is a {}", "{}: {}", "so {} must be a {}", "**{}** is the {}"]
  claims = [
    data.draw(st.sampled_from(forms)).format(name, "knight" if role else "knave")
    for name, role in data.draw(st.permutations(list(zip(NAMES, roles, strict=False))))
  ]
  joined = data.draw(st.sampled_from([", ", ".\n", "; ", " and ", "\n- "])).join(claims)
  assert roles_from_english(joined, NAMES[: len(roles)]) == (roles, "")


PIECES = [*"{},.\n", "Alice", "Bob", "Carol", " is a ", " are ", "knight", "knave", " and ", " or ", r"\boxed{"]


@settings(max_examples=300, deadline=None)
@given(st.text(), st.lists(st.sampled_from(PIECES), max_size=40).map("".join))
def test_no_text_raises_and_arbitrary_text_is_no_answer(text, collage):
  for style in STYLES:
    assert not check(text, PROBLEM, style).valid
    verdict = check(collage, PROBLEM, style)
    assert verdict.valid == bool(verdict.answer) and verdict.correct == (verdict.answer == "A1B0C0")


def test_no_text_takes_long_to_check():
  pieces = [*"{}\\\n ", "Alice, ", r"\boxed{", "Alice is ", "Alice and ", "Alice is a knight or ", f"{RIGHT}. "]
  start = time.process_time()
  for text in pieces:
    check(text * 100_000, PROBLEM, "english")
  assert time.process_time() - start < 2.0


def test_an_unknown_style_is_refused():
  for call in (lambda: check("", PROBLEM, "x"), lambda: prompt_text(PROBLEM, "x"), lambda: load_knights(style="x")):
    with pytest.raises(ValueError, match="style is 'x'; want one of compact, english"):
      call()


def test_the_reward_is_one_for_correct_roles_and_format_reward_for_valid_answers():
  example = Example(prompt_text(PROBLEM), PROBLEM, metadata={"style": "compact"})
  reward = make_reward("knights", format_reward=0.25)
  assert reward("A1B0C0", example) == (1.0, True, True, "right", "A1B0C0")
  assert reward("A1B0C1", example) == (0.25, False, True, "wrong", "A1B0C1")
  assert reward("A1B0", example) == (0.0, False, False, "not an answer", "")
  english = example._replace(metadata={"style": "english"})
  for text in (RIGHT, r"\boxed{Bob and Carol are knaves, Alice is a knight}"):
    assert reward(text, english) == (1.0, True, True, "right", "A1B0C0")
  for invalid in (1.0, -0.1):
    with pytest.raises(ValueError, match="format_reward is"):
      make_reward("knights", format_reward=invalid)("A1B0C0", example)
