"""The Countdown reward, and how a batch of completions is scored."""

import functools

import numpy as np
import pytest

from rspo_jax.countdown import Problem, prompt_text
from rspo_jax.data import Example
from rspo_jax.rewards import REWARDS, RewardResult, countdown_reward, make_reward, score_completions

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
def test_right_earns_one_and_a_valid_expression_the_format_reward(text, example, expected):
  assert countdown_reward(text, example, format_reward=0.25)[:3] == expected


def test_division_by_zero_earns_the_format_reward():
  problem = Problem((3, 3, 7), 7)
  example = Example(prompt_text(problem), problem, metadata={"operators": "+-*/"})
  assert countdown_reward("7/(3-3)", example)[:3] == (0.1, False, True)


@pytest.mark.parametrize("format_reward", [-0.1, 1.0, float("nan")])
def test_a_format_reward_that_rivals_a_right_answer_is_refused(format_reward):
  with pytest.raises(ValueError, match="less than a right answer"):
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


class Judge:
  """A reward of whole batches."""

  def __init__(self, results):
    self.results, self.calls = results, []

  def judge(self, texts, examples):
    self.calls.append((list(texts), list(examples)))
    return self.results


def test_a_reward_with_a_judge_is_given_the_whole_batch_and_its_reasons_are_kept():
  judge = Judge([RewardResult(1.0, True, True, "right"), RewardResult(0.0, False, True)])
  scores = score_completions(judge, ["a", "b"], [EXAMPLE] * 2)
  assert judge.calls == [(["a", "b"], [EXAMPLE] * 2)]
  assert (scores.reward.tolist(), scores.why) == ([1.0, 0.0], ("right", ""))


@pytest.mark.parametrize(
  ("results", "message"),
  [([], "0 results for 1 texts"), ([RewardResult(float("inf"), True, True)], r"row 0 .*finite reward")],
)
def test_a_judge_must_return_a_finite_result_for_every_text(results, message):
  with pytest.raises(ValueError, match=message):
    score_completions(Judge(results), ["x"], [EXAMPLE])


def test_a_reward_is_made_by_name_with_its_settings():
  assert make_reward("countdown", format_reward=0.25)("3*7+12", EXAMPLE).reward == 0.25
  with pytest.raises(KeyError):
    make_reward("none")


def test_texts_and_examples_must_pair_up():
  with pytest.raises(ValueError, match="4 texts for 2 examples"):
    score_completions(countdown_reward, ["x"] * 4, [EXAMPLE] * 2)
