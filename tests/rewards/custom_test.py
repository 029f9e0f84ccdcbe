"""User-defined rewards, by their dotted path: in this process, and in workers with a time limit."""

import time

import numpy as np
import pytest

from rspo_jax.data.examples import Example
from rspo_jax.rewards.base import RewardResult, close, reason_counts, score_completions
from rspo_jax.rewards.custom import as_result
from rspo_jax.rewards.table import check_reward, make_reward

MODULE = """
import os, time
from my_helper import LIMIT

def by_length(text, example, *, scale=1.0):
  return scale * len(text) / LIMIT

def right(text, example):
  return text == example.gold

def odd(text, example):
  if text == "raise":
    raise KeyError("answer")
  if text == "hang":
    while True:
      pass
  if text == "end":
    os._exit(3)
  if text == "nan":
    return float("nan")
  if text == "tuple":
    return (1.0, True, True)
  if text == "none":
    return None
  return example.metadata["value"]

class Scorer:
  def __init__(self, *, bonus=0.0):
    self.bonus = bonus

  def __call__(self, text, example):
    return self.bonus + (text == example.gold)

not_callable = 3
"""
RESULTS = """
from rspo_jax.rewards import RewardResult

def detailed(text, example):
  return RewardResult(0.5, False, True, "half", text.upper())

class Batch:
  needs_lengths = True

  def __init__(self):
    self.closed = False

  def score_batch(self, texts, examples, lengths=None):
    return [RewardResult(float(length), True, True) for length in lengths]

  def close(self):
    self.closed = True
"""
EXAMPLE = Example("q", "yes", metadata={"value": 0.25}, source="s")


@pytest.fixture(autouse=True)
def _modules(tmp_path, monkeypatch):
  (tmp_path / "my_helper.py").write_text("LIMIT = 4\n")
  (tmp_path / "my_rewards.py").write_text(MODULE)
  (tmp_path / "my_results.py").write_text(RESULTS)
  monkeypatch.syspath_prepend(tmp_path)


@pytest.fixture
def workers(request):
  return {"timeout": 1.0, "workers": 1} if request.param else {}


BOTH = pytest.mark.parametrize("workers", [False, True], indirect=True, ids=["in this process", "in workers"])


@BOTH
def test_a_number_is_the_reward_and_a_success_from_success_at(workers):
  reward = make_reward("my_rewards:by_length", scale=2.0, success_at=1.5, **workers)
  scores = score_completions(reward, ["a", "abc", ""], [EXAMPLE] * 3)
  assert scores.reward.tolist() == [0.5, 1.5, 0.0]
  assert scores.success.tolist() == scores.format.tolist() == [False, True, False]
  close(reward)


@BOTH
def test_a_class_is_instantiated_with_its_options(workers):
  reward = make_reward("my_rewards:Scorer", bonus=0.5, **workers)
  assert [result.reward for result in reward.score_batch(["yes", "no"], [EXAMPLE] * 2)] == [1.5, 0.5]
  close(reward)


@BOTH
def test_a_raising_reward_is_an_error_that_names_the_row_or_scores_zero(workers):
  texts, examples = ["ok", "raise", "ok"], [EXAMPLE] * 3
  reward = make_reward("my_rewards:odd", **workers)
  with pytest.raises(ValueError, match=r"KeyError: 'answer'.* at row 1 \(prompt 'q', completion 'raise'\)"):
    score_completions(reward, texts, examples)
  close(reward)
  reward = make_reward("my_rewards:odd", on_error="zero", **workers)
  scores = score_completions(reward, texts, examples)
  assert (scores.reward.tolist(), scores.reason) == ([0.25, 0.0, 0.25], ("", "failed", ""))
  close(reward)


def test_a_hanging_reward_is_killed_and_counted_and_other_rows_keep_their_results(caplog):
  reward = make_reward("my_rewards:odd", timeout=2.0, workers=1, on_error="zero")
  begin = time.monotonic()
  scores = score_completions(reward, ["ok", "hang", "end", "ok"], [EXAMPLE] * 4)
  assert time.monotonic() - begin < 20
  assert caplog.text.count("1 of 4 completions could not be scored") == 1
  assert scores.reward.tolist() == [0.25, 0.0, 0.0, 0.25]
  assert scores.reason == ("", "timeout", "failed", "")
  assert reason_counts(scores) == {"reward/reason/timeout": 0.25, "reward/reason/failed": 0.25}
  close(reward)
  with pytest.raises(RuntimeError, match="closed"):
    reward._reward.score_batch(["ok"], [EXAMPLE])


@BOTH
def test_only_finite_results_are_accepted(workers):
  with make_reward("my_rewards:odd", **workers) as reward:
    for text in ("nan", "tuple", "none"):
      with pytest.raises(ValueError, match=r"row 0 .*finite reward"):
        score_completions(reward, [text], [EXAMPLE])


@BOTH
def test_a_reward_result_is_returned_unchanged(workers):
  with make_reward("my_results:detailed", **workers) as reward:
    assert reward("x", EXAMPLE) == RewardResult(0.5, False, True, "half", "X")


def test_a_users_batch_reward_receives_batches_and_lengths_and_is_closed():
  reward = make_reward("my_results:Batch")
  assert score_completions(reward, ["a", "b"], [EXAMPLE] * 2, [3, 4]).reward.tolist() == [3.0, 4.0]
  close(reward)
  assert reward._reward.closed


@pytest.mark.parametrize("value", [np.float32(2), np.int64(2), np.bool_(True), 2, 2.0, True])
def test_numbers_of_all_kinds_become_results(value):
  result = as_result(value)
  assert (result.reward, result.success, result.format) == (float(value), True, True)
  assert type(result.reward) is float and type(result.success) is bool


@pytest.mark.parametrize(
  ("name", "options", "message"),
  [
    ("my_rewards:by_lenght", {}, "my_rewards has no callable by_lenght; did you mean by_length?"),
    ("my_rewards:not_callable", {}, "has no callable not_callable"),
    ("my_reward:odd", {}, "module my_reward cannot be imported .*PYTHONPATH"),
    ("my_rewards:by_length", {"scal": 2.0}, "reward.options.scal is unknown; did you mean scale?"),
    ("my_rewards:Scorer", {"bonsu": 2.0}, "reward.options.bonsu is unknown; did you mean bonus?"),
  ],
)
def test_unknown_paths_and_options_are_errors_that_suggest_a_similar_name(name, options, message):
  with pytest.raises(ValueError, match=message):
    check_reward(name, options)


def test_options_that_are_not_json_are_refused_with_a_timeout():
  with pytest.raises(ValueError, match="with a timeout they must be JSON"):
    make_reward("my_rewards:by_length", scale=1j, timeout=1.0)
