"""Weighted sums of rewards, and rewards by source."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rspo_jax.data.examples import Example
from rspo_jax.rewards.base import RewardResult, close, score_completions
from rspo_jax.rewards.composed import BySourceReward, WeightedReward
from rspo_jax.rewards.table import REWARDS, make_reward

EXAMPLE = Example("q", "paris")
FINITE = st.floats(-100, 100)


def fixed(value, reason=""):
  return lambda text, example: RewardResult(value, value > 0, value >= 0, reason, f"{text}!")


@given(st.lists(st.tuples(FINITE, FINITE), min_size=1, max_size=5), st.data())
def test_reward_is_the_weighted_sum_and_other_fields_are_those_of_the_success_term(pairs, data):
  terms = {str(i): (fixed(value, f"reason {i}"), weight) for i, (value, weight) in enumerate(pairs)}
  main = data.draw(st.sampled_from(sorted(terms)))
  result = WeightedReward(terms, main)("x", EXAMPLE)
  assert result.reward == pytest.approx(math.fsum(value * weight for value, weight in pairs), abs=1e-6)
  assert result[1:] == terms[main][0]("x", EXAMPLE)[1:]


class Batch:
  """A batch reward that returns the lengths and records its calls."""

  needs_lengths = True

  def __init__(self):
    self.calls, self.closed = [], 0

  def score_batch(self, texts, examples, lengths=None):
    self.calls.append((list(texts), None if lengths is None else list(lengths)))
    return [RewardResult(float(length), True, True) for length in lengths or [0] * len(texts)]

  def close(self):
    self.closed += 1


def test_terms_receive_whole_batches_and_lengths_at_any_depth():
  batch, examples = Batch(), [EXAMPLE._replace(source=source) for source in "abab"]
  inner = WeightedReward({"length": (batch, 2.0), "one": (fixed(1.0), 1.0)}, "one")
  scores = score_completions(BySourceReward({"a": inner, "*": fixed(-1.0)}), list("wxyz"), examples, [1, 2, 3, 4])
  assert batch.calls == [(["w", "y"], [1, 3])]
  assert scores.reward.tolist() == [3.0, -1.0, 7.0, -1.0]
  assert scores.success.tolist() == [True, False, True, False]
  assert scores.answer == ("w!", "x!", "y!", "z!")


@given(st.lists(st.sampled_from("abc"), max_size=12))
def test_every_row_gets_the_result_of_the_reward_for_its_source(sources):
  reward = BySourceReward({"a": fixed(1.0), "b": fixed(2.0), "*": fixed(3.0)})
  texts = [str(row) for row in range(len(sources))]
  results = reward.score_batch(texts, [EXAMPLE._replace(source=source) for source in sources])
  assert [result.reward for result in results] == [{"a": 1.0, "b": 2.0}.get(source, 3.0) for source in sources]
  assert [result.answer for result in results] == [f"{text}!" for text in texts]


def test_a_source_without_a_reward_is_an_error_that_names_it():
  with pytest.raises(ValueError, match=r"no reward for source 'c' \(row 1, prompt 'q'\); there are rewards for a, b"):
    BySourceReward({"a": fixed(1.0), "b": fixed(1.0)}).score_batch(
      ["", ""], [EXAMPLE._replace(source="a"), EXAMPLE._replace(source="c")]
    )


def failing(text, example):
  raise KeyError(text)


@pytest.mark.parametrize(
  ("reward", "where"),
  [
    (WeightedReward({"good": (fixed(1.0), 1.0), "bad": (failing, 1.0)}, "good"), "row 0 of term 'bad'"),
    (BySourceReward({"*": fixed(1.0), "s": failing}), "row 0 of source 's'"),
  ],
)
def test_an_error_names_the_term_or_the_source(reward, where):
  with pytest.raises(ValueError, match=rf"KeyError: 'x' at {where} \(prompt 'q', completion 'x'\)"):
    reward("x", EXAMPLE._replace(source="s"))


def test_close_closes_every_term():
  batch = Batch()
  close(BySourceReward({"a": WeightedReward({"x": (batch, 1.0), "y": (fixed(1.0), 0.0)}, "x"), "b": fixed(1.0)}))
  with WeightedReward({"x": (batch, 1.0)}, "x"), BySourceReward({"b": batch}):
    pass
  assert batch.closed == 3


def test_weighted_reward_is_built_from_options():
  terms = {
    "answer": {"name": "exact_match", "options": {"answer_in": "last_line"}},
    "form": {"name": "format", "weight": 0.25, "options": {"form": "think"}},
    "talk": {"name": "repetition", "weight": 2, "options": {"ngram": 1, "max_penalty": 0.5}},
  }
  reward = make_reward("weighted", terms=terms, success="answer")
  scores = score_completions(reward, ["<think>so</think>\nParis", "Paris", "a a"], [EXAMPLE] * 3)
  assert scores.reward.tolist() == [1.25, 1.0, -0.5]
  assert scores.reason == ("right", "right", "wrong")
  alone = make_reward("weighted", terms={"it": {"name": "exact_match"}})
  assert alone("Paris", EXAMPLE).reward == 1.0
  with pytest.raises(ValueError, match="the term that decides whether the answer is correct, of answer, form, talk"):
    make_reward("weighted", terms=terms)
  with pytest.raises(ValueError, match="success is 'anser'"):
    make_reward("weighted", terms=terms, success="anser")
  with pytest.raises(ValueError, match="the weight of term 'it' is inf"):
    make_reward("weighted", terms={"it": {"name": "exact_match", "weight": float("inf")}})


def test_by_source_is_built_from_options_and_zeroes_errors_as_a_whole():
  sources = {"geo": {"name": "exact_match"}, "*": {"name": "format", "options": {"form": "think"}}}
  reward = make_reward("by_source", **sources, on_error="zero")
  examples = [EXAMPLE._replace(source="geo"), EXAMPLE, EXAMPLE._replace(source="geo", gold=5)]
  scores = score_completions(reward, ["Paris", "Paris", "Paris"], examples)
  assert scores.reason == ("right", "malformed", "failed")
  with pytest.raises(ValueError, match="no reward for any source"):
    make_reward("by_source")


def test_terms_are_closed_if_a_later_term_cannot_be_built(monkeypatch):
  built = []

  class Recorded(Batch):
    def __init__(self):
      super().__init__()
      built.append(self)

  monkeypatch.setitem(REWARDS, "recorded", Recorded)
  with pytest.raises(ValueError, match="RE2"):
    make_reward("by_source", a={"name": "recorded"}, b={"name": "format", "options": {"pattern": "("}})
  assert [reward.closed for reward in built] == [1]
