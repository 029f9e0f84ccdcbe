"""Rewards computed from the text alone: form, repetition, length, exact match."""

import time
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rspo_jax.data.examples import Example
from rspo_jax.objectives.penalties import overlong_penalty
from rspo_jax.rewards.text import (
  FormatReward,
  LengthReward,
  exact_match_reward,
  normalized,
  repeated_share,
  repetition_reward,
)

EXAMPLE = Example("q", "Paris")


# Form


@pytest.mark.parametrize(
  ("text", "answer"),
  [
    ("<think>so</think>5", "5"),
    (" <think>\nso\nso</think>\n 5 \n6", "5 \n6"),
    ("<think></think>5", "5"),
    ("<think>so</think>", None),
    ("<think>so</think>  \n", None),
    ("so</think>5", None),
    ("<think>so 5", None),
    ("Well. <think>so</think>5", None),
    ("<think>so<think></think>5", None),
    ("<think>so</think>5</think>", None),
    ("<think>a</think><think>b</think>5", None),
    ("", None),
  ],
)
def test_think_form_is_one_thought_then_an_answer(text, answer):
  result = FormatReward(form="think")(text, EXAMPLE)
  expected = (0.0, False, False, "malformed", "") if answer is None else (1.0, True, True, "formed", answer)
  assert result == expected
  if text.startswith("<think>"):  # the prompt ends with it
    assert FormatReward(form="think", opened=True)(text.removeprefix("<think>"), EXAMPLE) == expected


@pytest.mark.parametrize(
  ("text", "answer"),
  [
    ("<think>so</think><answer>5</answer>", "5"),
    ("<think>so</think>\n<answer>\n5\n</answer>\n", "5"),
    ("<think>so</think><answer></answer>", None),
    ("<think>so</think><answer>5</answer> or 6", None),
    ("<think>so</think>It is <answer>5</answer>", None),
    ("<think>so</think><answer>5</answer><answer>6</answer>", None),
    ("<think>so</think>5", None),
    ("<answer>5</answer>", None),
  ],
)
def test_think_answer_form_requires_answer_tags(text, answer):
  assert FormatReward(form="think_answer")(text, EXAMPLE)[3:] == (
    ("malformed", "") if answer is None else ("formed", answer)
  )


def test_a_pattern_matches_the_whole_completion_and_may_name_the_answer():
  reward = FormatReward(pattern=r"So: .*\nAnswer: (?P<answer>\d+)")
  assert reward("So: a\nb\nAnswer: 12", EXAMPLE) == (1.0, True, True, "formed", "12")
  for other in ("So: a\nAnswer: 12.", " So: a\nAnswer: 12", "So: a", ""):
    assert reward(other, EXAMPLE) == (0.0, False, False, "malformed", "")
  assert FormatReward(pattern=r"a|ab")("ab", EXAMPLE).success
  assert not FormatReward(pattern=r"\w*")("a\ud800 ", EXAMPLE).success


@pytest.mark.parametrize("pattern", [r"(a+)+b", r"(a|a)*b", r"(a*)*b", r"(.*a){20}b"])
def test_patterns_with_exponential_backtracking_elsewhere_take_linear_time(pattern):
  begin = time.process_time()
  assert not FormatReward(pattern=pattern)("a" * 20_000, EXAMPLE).success
  assert time.process_time() - begin < 5


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({}, "want a form of think, think_answer, or a pattern"),
    ({"form": "think", "pattern": "a"}, "want a form"),
    ({"form": "thought"}, "want a form"),
    ({"pattern": "a", "opened": True}, "without opened"),
    ({"pattern": r"(?=a)a"}, "no backreferences and no lookaround"),
    ({"pattern": r"(a)\1"}, "no backreferences and no lookaround"),
    ({"pattern": r"(a"}, "RE2 cannot compile"),
  ],
)
def test_invalid_forms_and_patterns_are_refused(settings, message):
  with pytest.raises(ValueError, match=message):
    FormatReward(**settings)


# Repetition


@pytest.mark.parametrize(
  ("text", "ngram", "share"),
  [
    ("a b c d", 2, 0.0),
    ("a b a b", 2, 1 / 3),
    ("A b a B", 2, 1 / 3),
    ("no no no no no", 1, 4 / 5),
    ("no no no no no", 3, 2 / 3),
    ("a b", 3, 0.0),
    ("", 1, 0.0),
    ("好好好好", 2, 2 / 3),
    ("ไปไปไป", 2, 3 / 5),
    ("はい はい", 2, 1 / 3),
    ("数学 math 数学 math", 3, 1 / 4),
  ],
)
def test_repeated_share_is_the_share_of_n_grams_that_repeat_an_earlier_one(text, ngram, share):
  assert repeated_share(text, ngram) == pytest.approx(share)
  result = repetition_reward(text, EXAMPLE, ngram=ngram, max_penalty=0.5)
  assert (result.reward, result.success, result.format) == (pytest.approx(-0.5 * share), True, True)


@given(st.text(max_size=60), st.integers(1, 5))
def test_repeated_share_is_bounded_and_grows_when_a_text_is_repeated(text, ngram):
  once, often = repeated_share(text, ngram), repeated_share(f"{text} " * 8, ngram)
  assert 0.0 <= once <= often + 1e-9 and often < 1.0


@pytest.mark.parametrize("settings", [{"ngram": 0}, {"max_penalty": -1.0}, {"max_penalty": float("nan")}])
def test_repetition_settings_out_of_range_are_refused(settings):
  with pytest.raises(ValueError, match="want ngram >= 1"):
    repetition_reward("a", EXAMPLE, **settings)


# Length


def test_length_reward_is_the_overlong_penalty():
  lengths = [0, 6, 7, 8, 9, 10, 11]
  results = LengthReward(max_length=10, buffer=4, penalty=2.0).score_batch([""] * 7, [EXAMPLE] * 7, lengths)
  expected = overlong_penalty(lengths, max_length=10, buffer=4, penalty=2.0)
  assert [result.reward for result in results] == pytest.approx(expected.tolist())
  assert [result.reason for result in results] == ["", "", *["overlong"] * 5]
  with pytest.raises(ValueError, match="0 < buffer <= max_length"):
    LengthReward(max_length=10, buffer=11)


# Exact match


@pytest.mark.parametrize(
  ("gold", "answer"),
  [
    ("Paris", " paris. "),
    ("Paris", "**PARIS!**"),
    ("Straße", "STRASSE"),
    ("ＡＢＣ１２", "abc12"),
    ("東京", "「東京」。"),
    ("Δελφοί", "«δελφοί»"),
    ("New  York", "new\nyork"),
    ("caf\u00e9", "cafe\u0301"),
    ("soft", "so\u00adft"),
    ("?", "?"),
    (["Paris", "Lutetia"], "Lutetia"),
    (("yes",), "Yes,"),
  ],
)
def test_case_width_spaces_and_surrounding_punctuation_are_ignored(gold, answer):
  assert exact_match_reward(answer, Example("q", gold)) == (1.0, True, True, "right", answer.strip())


@pytest.mark.parametrize(
  ("gold", "answer"),
  [("5", "-5"), ("5", ".5"), ("5", "5%"), ("(3,4]", "[3,4)"), ("a-b", "ab"), ("Paris", "Paris, France"), ("C", "C++")],
)
def test_answers_with_another_meaning_are_incorrect(gold, answer):
  assert exact_match_reward(answer, Example("q", gold), format_reward=0.25)[:4] == (0.25, False, True, "wrong")


@pytest.mark.parametrize(
  ("text", "places", "answer"),
  [
    (r"It is \boxed{Paris} or" + "\n#### Rome\nLyon", ("boxed", "####", "last_line"), "Paris"),
    ("It is\n#### Rome\nLyon", ("last_line", "boxed", "####"), "Rome"),
    ("It is\nLyon \n\n", "last_line", "Lyon"),
    ("It is\nLyon", "####", ""),
    ("  ", "all", ""),
  ],
)
def test_the_answer_is_taken_from_the_first_place_that_is_not_empty(text, places, answer):
  result = exact_match_reward(text, Example("q", answer or "x"), answer_in=places)
  assert (result.answer, result.reason) == (answer, "right" if answer else "no answer")


@given(st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=12), st.sampled_from([".", "!", "”", " "]))
def test_equal_answers_are_equal_after_normalization(word, end):
  for variant in (word.upper().lower(), f"  “{word}{end}", unicodedata.normalize("NFD", word)):
    assert normalized(variant) in {normalized(word), normalized(word.upper())}
  assert normalized(normalized(word)) == normalized(word)


@pytest.mark.parametrize("piece", ['"', ". ", ".5", "\u00ad", "a ", "好", "<think>", "</think>", r"\boxed{"])
def test_long_completions_are_scored_quickly(piece):
  begin = time.process_time()
  for reward in (exact_match_reward, repetition_reward, FormatReward(form="think_answer")):
    reward(piece * 100_000, EXAMPLE)
  assert time.process_time() - begin < 5


@pytest.mark.parametrize("gold", [None, 5, "", " ", [], [5], [""]])
def test_a_gold_that_is_not_text_is_refused(gold):
  with pytest.raises(ValueError, match="want a nonempty text"):
    exact_match_reward("x", Example("q", gold))


@pytest.mark.parametrize("settings", [{"answer_in": "end"}, {"answer_in": ()}, {"format_reward": 1.0}])
def test_exact_match_settings_out_of_range_are_refused(settings):
  with pytest.raises(ValueError, match="want one or more of boxed"):
    exact_match_reward("x", EXAMPLE, **settings)
