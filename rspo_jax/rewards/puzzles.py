"""Rewards of the puzzles in `rspo_jax.tasks`: Countdown, Knights and Knaves."""

from rspo_jax.data.examples import Example
from rspo_jax.rewards.base import RewardResult
from rspo_jax.tasks import countdown, knights


def countdown_reward(text: str, example: Example, *, format_reward: float = 0.1) -> RewardResult:
  """1 for a correct expression, format_reward for a valid one over the given numbers with another value, else 0.

  Args:
    text: the completion without its end token.
    example: of the Countdown data set.
    format_reward: in [0, 1).
  Raises:
    ValueError: format_reward out of range.
  """
  verdict = countdown.check(text, example.gold, example.metadata["operators"])
  return _result(verdict, text.strip(), format_reward)


def knights_reward(text: str, example: Example, *, format_reward: float = 0.1) -> RewardResult:
  """1 for the correct roles, format_reward for a well-formed incorrect answer, else 0; no partial credit.

  Args:
    text: the completion without its end token.
    example: of the Knights and Knaves data set.
    format_reward: in [0, 1).
  Raises:
    ValueError: format_reward out of range.
  """
  verdict = knights.check(text, example.gold, example.metadata["style"])
  return _result(verdict, verdict.answer, format_reward)


def _result(verdict: countdown.Verdict | knights.Verdict, answer: str, format_reward: float) -> RewardResult:
  if not 0.0 <= format_reward < 1.0:
    raise ValueError(f"format_reward is {format_reward}; want a value in [0, 1), less than a correct answer earns.")
  reward = 1.0 if verdict.correct else format_reward if verdict.valid else 0.0
  return RewardResult(reward, verdict.correct, verdict.valid, verdict.reason, answer)
