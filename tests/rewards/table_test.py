"""The puzzle rewards, scoring of batches, and rewards built by name."""

import functools
import inspect
import re
import sys

import numpy as np
import pytest

from rspo_jax.data.examples import Example
from rspo_jax.rewards.base import RewardResult, Scores, reason_counts, score_completions
from rspo_jax.rewards.puzzles import countdown_reward
from rspo_jax.rewards.table import REWARDS, check_reward, make_reward, reward_names
from rspo_jax.tasks.countdown.problem import Problem, prompt_text
from tests.support.paths import DOCS

COMPOSED = ("weighted", "by_source")
PROBLEM = Problem((3, 7, 12), 22)
EXAMPLE = Example(prompt_text(PROBLEM), PROBLEM, metadata={"operators": "+-*/"})
ONLY_PLUS_MINUS = EXAMPLE._replace(metadata={"operators": "+-"})


@pytest.mark.parametrize(
  ("text", "example", "expected"),
  [
    ("3+7+12", EXAMPLE, (1.0, True, True)),
    ("3*7+12", EXAMPLE, (0.25, False, True)),
    ("3*7+12", ONLY_PLUS_MINUS, (0.0, False, False)),
    ("3+7", EXAMPLE, (0.0, False, False)),
    ("\ufffd", EXAMPLE, (0.0, False, False)),
    ("", EXAMPLE, (0.0, False, False)),
  ],
)
def test_correct_expressions_earn_one_and_valid_ones_the_format_reward(text, example, expected):
  assert countdown_reward(text, example, format_reward=0.25)[:3] == expected


def test_division_by_zero_earns_the_format_reward():
  problem = Problem((3, 3, 7), 7)
  example = Example(prompt_text(problem), problem, metadata={"operators": "+-*/"})
  assert countdown_reward("7/(3-3)", example)[:3] == (0.1, False, True)


@pytest.mark.parametrize("format_reward", [-0.1, 1.0, float("nan")])
def test_format_reward_must_be_less_than_the_reward_of_a_correct_answer(format_reward):
  with pytest.raises(ValueError, match="less than a correct answer"):
    countdown_reward("3+7+12", EXAMPLE, format_reward=format_reward)


def test_a_batch_is_scored_row_by_row():
  reward = functools.partial(REWARDS["countdown"], format_reward=0.0)
  scores = score_completions(reward, ["3+7+12", "3*7+12", "", "12+3+7"], [EXAMPLE] * 4)
  np.testing.assert_array_equal(scores.reward, np.array([1, 0, 0, 1], np.float32))
  np.testing.assert_array_equal(scores.success, [True, False, False, True])
  np.testing.assert_array_equal(scores.format, [True, True, False, True])
  assert (scores.reward.dtype, scores.success.dtype, scores.format.dtype) == (np.float32, bool, bool)
  assert score_completions(reward, [], []).reward.shape == (0,)


def test_an_exception_in_a_reward_names_row_prompt_and_completion():
  def reward(text, example):
    if text == "bad":
      raise KeyError("answer")
    return RewardResult(1.0, True, True)

  with pytest.raises(
    ValueError, match=r"KeyError: 'answer' at row 2 \(prompt '3 7 12=22:', completion 'bad'\)"
  ) as caught:
    score_completions(reward, ["ok", "ok", "bad", "bad"], [EXAMPLE] * 4)
  assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize("result", [1.0, None, RewardResult(float("nan"), False, False), (1.0, True, True)])
def test_a_reward_must_return_a_finite_result(result):
  with pytest.raises(ValueError, match=r"row 0 .*finite reward"):
    score_completions(lambda text, example: result, ["x"], [EXAMPLE])


class Batched:
  """A reward of whole batches."""

  def __init__(self, results):
    self.results, self.calls = results, []

  def score_batch(self, texts, examples):
    self.calls.append((list(texts), list(examples)))
    return self.results


def test_a_reward_with_score_batch_receives_the_whole_batch_and_reasons_are_kept():
  reward = Batched([RewardResult(1.0, True, True, "right"), RewardResult(0.0, False, True)])
  scores = score_completions(reward, ["a", "b"], [EXAMPLE] * 2)
  assert reward.calls == [(["a", "b"], [EXAMPLE] * 2)]
  assert (scores.reward.tolist(), scores.reason) == ([1.0, 0.0], ("right", ""))


@pytest.mark.parametrize(
  ("results", "message"),
  [([], "0 results for 1 texts"), ([RewardResult(float("inf"), True, True)], r"row 0 .*finite reward")],
)
def test_score_batch_must_return_a_finite_result_for_every_text(results, message):
  with pytest.raises(ValueError, match=message):
    score_completions(Batched(results), ["x"], [EXAMPLE])


def test_a_reward_is_built_by_name_with_its_options():
  assert make_reward("countdown", format_reward=0.25)("3*7+12", EXAMPLE).reward == 0.25
  with pytest.raises(ValueError, match="reward.name is 'countdwn'; did you mean countdown?"):
    make_reward("countdwn")


def test_numbers_of_texts_and_examples_must_be_equal():
  with pytest.raises(ValueError, match="4 texts for 2 examples"):
    score_completions(countdown_reward, ["x"] * 4, [EXAMPLE] * 2)


def test_lengths_are_passed_only_to_rewards_that_need_them():
  length = make_reward("length", max_length=10, buffer=4)
  examples = [EXAMPLE] * 3
  assert score_completions(length, ["a", "b", "c"], examples, [6, 8, 10]).reward.tolist() == [0.0, -0.5, -1.0]
  plain = Batched([RewardResult(1.0, True, True)] * 3)
  assert score_completions(plain, ["a", "b", "c"], examples, [6, 8, 10]).success.all()
  with pytest.raises(ValueError, match=r"lengths=lengths"):
    score_completions(length, ["a", "b", "c"], examples)
  with pytest.raises(ValueError, match="2 lengths for 3 texts"):
    score_completions(length, ["a", "b", "c"], examples, [6, 8])


# A reward that raises


def raising(text, example):
  if text == "bad":
    raise KeyError("answer")
  return RewardResult(1.0, True, True, "right")


class RaisingReward:
  def score_batch(self, texts, examples):
    return [raising(text, example) for text, example in zip(texts, examples, strict=True)]


@pytest.mark.parametrize("reward", [raising, RaisingReward()], ids=["function", "batched"])
def test_on_error_zero_scores_zero_where_the_reward_raises_and_keeps_other_results(monkeypatch, caplog, reward):
  monkeypatch.setitem(REWARDS, "raising", RaisingReward if reward is not raising else raising)
  wrapped = make_reward("raising", on_error="zero")
  scores = score_completions(wrapped, ["ok", "bad", "ok", "bad"], [EXAMPLE] * 4)
  assert (scores.reward.tolist(), scores.reason) == ([1, 0, 1, 0], ("right", "failed", "right", "failed"))
  assert "2 of 4 completions could not be scored: " in caplog.text and "'answer'" in caplog.text
  assert wrapped("bad", EXAMPLE).reason == "failed"


def test_on_error_zero_applies_to_results_that_are_not_finite(monkeypatch):
  monkeypatch.setitem(REWARDS, "odd", lambda text, example: RewardResult(float(text), True, True))
  scores = score_completions(make_reward("odd", on_error="zero"), ["1", "nan"], [EXAMPLE] * 2)
  assert (scores.reward.tolist(), scores.reason) == ([1.0, 0.0], ("", "failed"))


# Reasons as metrics


def scores_of(*reason):
  count = np.zeros(len(reason))
  return Scores(count, count, count, reason)


def test_reasons_are_counted_under_valid_metric_names():
  counts = reason_counts(scores_of("right", "no answer", "No Answer!", "", "right"))
  assert counts == {"reward/reason/right": 0.4, "reward/reason/no_answer": 0.4}
  assert reason_counts(scores_of()) == reason_counts(Scores(*np.zeros((3, 2)))) == {}


def test_the_number_of_reasons_is_bounded():
  counts = reason_counts(scores_of(*["often"] * 5, *map(str, range(100)), "other"), most=3)
  assert len(counts) <= 4
  assert counts["reward/reason/often"] == 5 / 106
  assert sum(counts.values()) == pytest.approx(1.0)


# Checks of a config


@pytest.mark.parametrize(
  ("name", "options", "message"),
  [
    ("mth", {}, "config.reward.name is 'mth'; did you mean math?"),
    ("xyz", {}, "want one of by_source, .*package.module:function"),
    (3, {}, "config.reward.name is 3"),
    ("math", 3, "config.reward.options is 3"),
    ("math", {"timout": 1.0}, "config.reward.options.timout is unknown; did you mean timeout?"),
    ("countdown", {"text": 1.0}, "config.reward.options.text is unknown"),
    ("length", {"buffer": 3}, "config.reward.options lacks max_length"),
    ("math", {"on_error": "skip"}, "config.reward.options.on_error is 'skip'; want one of fail, zero"),
    ("weighted", {}, "lacks terms"),
    ("weighted", {"terms": {}}, "terms is {}"),
    ("weighted", {"terms": {"a": {"nme": "math"}}}, "config.reward.options.terms.a is .* at least name"),
    ("weighted", {"terms": {"a": {"name": "math", "wait": 1}}}, "terms.a.wait is unknown; did you mean weight?"),
    ("weighted", {"terms": {"a": {"name": "math", "weight": "1"}}}, "terms.a.weight is '1'; want a number"),
    ("weighted", {"terms": {"a": {"name": "mat"}}}, "terms.a.name is 'mat'; did you mean math?"),
    ("weighted", {"terms": {"a": {"name": "math", "options": {"form": 1}}}}, "terms.a.options.form is unknown"),
    ("by_source", {"x": {"name": "by_source", "options": {"y": {"name": "cod"}}}}, "x.options.y.name is 'cod'; .*code"),
    ("json:dmps", {}, "config.reward.name is 'json:dmps': json has no callable dmps; did you mean dumps?"),
    ("no.such:reward", {}, "module no.such cannot be imported"),
  ],
)
def test_mistakes_are_errors_with_the_key_and_a_cure(name, options, message):
  with pytest.raises(ValueError, match=message):
    check_reward(name, options, "config.reward")


def test_rewards_of_all_kinds_pass_the_check():
  think = {"name": "format", "options": {"form": "think"}}
  terms = {"answer": {"name": "math"}, "form": {**think, "weight": 0.1}}
  nested = {"gsm8k": {"name": "weighted", "options": {"terms": terms, "success": "answer"}}, "*": think}
  check_reward("by_source", {**nested, "on_error": "zero"})
  check_reward("code", {"wall_seconds": 3.0})


def test_reward_names_include_those_of_terms():
  terms = {"it": {"name": "math"}, "long": {"name": "length", "options": {"max_length": 9, "buffer": 3}}}
  nested = {"a": {"name": "weighted", "options": {"terms": terms, "success": "it"}}, "on_error": "zero"}
  assert reward_names("by_source", nested) == {"by_source", "weighted", "math", "length"}
  assert reward_names("math", {"forms": ("boxed",)}) == {"math"}


# The document


DOCUMENT = (DOCS / "rewards.md").read_text()


def test_code_in_the_document_prints_the_shown_output(capsys, monkeypatch):
  monkeypatch.setattr(sys, "path", sys.path[:])
  blocks = re.findall(r"^```python\n(.*?)^```$(?:\n\nprints\n\n```\n(.*?)^```$)?", DOCUMENT, re.MULTILINE | re.DOTALL)
  assert len(blocks) == DOCUMENT.count("```python") > 1
  for code, printed in blocks:
    exec(compile(code, "docs/rewards.md", "exec"), {})
    assert capsys.readouterr().out == printed


def test_the_document_lists_every_reward_and_option():
  rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", DOCUMENT, re.MULTILINE))
  assert rows.keys() == REWARDS.keys()
  for name, factory in REWARDS.items():
    parameters = list(inspect.signature(factory).parameters)[
      0 if isinstance(factory, type) or name in COMPOSED else 2 :
    ]
    assert set(parameters) - {"limits", "sources"} <= set(re.findall(r"`(\w+)`", rows[name])), name
