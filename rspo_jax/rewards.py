"""F3: rewards that can be verified. A reward is a function of a completion's text and its example.

A reward that has a method `judge(texts, examples) -> list[RewardResult]` is given whole batches. `REWARDS` maps a name
to a function, or to a class of such rewards; `make_reward` binds its settings.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from rspo_jax import countdown
from rspo_jax.code_rewards import CodeReward
from rspo_jax.data import Example, Reward, RewardResult
from rspo_jax.math_rewards import MathReward


class Scores(NamedTuple):
  """Of B completions: reward [B] float32, success [B] bool, format [B] bool; why and answer: B texts each, or none."""

  reward: np.ndarray
  success: np.ndarray
  format: np.ndarray
  why: tuple[str, ...] = ()
  answer: tuple[str, ...] = ()


def countdown_reward(text: str, example: Example, *, format_reward: float = 0.1) -> RewardResult:
  """1 for a right expression, format_reward for a valid one over the right numbers that is not right, else 0.

  Args:
    text: the completion without its end token.
    example: of the Countdown data set.
    format_reward: in [0, 1).
  Raises:
    ValueError: format_reward out of range.
  """
  if not 0.0 <= format_reward < 1.0:
    raise ValueError(f"format_reward is {format_reward}; want a value in [0, 1), less than a right answer earns.")
  verdict = countdown.check(text, example.gold, example.metadata["operators"])
  reward = 1.0 if verdict.right else format_reward if verdict.valid else 0.0
  return RewardResult(reward, verdict.right, verdict.valid, verdict.why, text.strip())


def score_completions(reward: Reward, texts: Sequence[str], examples: Sequence[Example]) -> Scores:
  """Rewards a batch; texts[i] answers examples[i], so an example with G samples stands there G times.

  Raises:
    ValueError: unequal lengths, or a reward that raised or returned anything but a finite RewardResult; names the
      row, the prompt and the start of the text. What a reward's own `judge` raises passes through.
  """
  if len(texts) != len(examples):
    raise ValueError(
      f"{len(texts)} texts for {len(examples)} examples; want an example per text: repeat it for its samples."
    )

  def place(row):
    return f"row {row} (prompt {examples[row].prompt[:80]!r}, completion {texts[row][:80]!r})"

  def single(row):
    try:
      return reward(texts[row], examples[row])
    except Exception as error:
      raise ValueError(
        f"The reward raised {type(error).__name__}: {error} at {place(row)}. A reward must return a RewardResult for "
        "every text: let it give 0 to what it cannot judge."
      ) from error

  results = reward.judge(texts, examples) if hasattr(reward, "judge") else [single(row) for row in range(len(texts))]
  if len(results) != len(texts):
    raise ValueError(f"The reward's judge returned {len(results)} results for {len(texts)} texts; want one for each.")
  for row, result in enumerate(results):
    if not isinstance(result, RewardResult) or not math.isfinite(result.reward):
      raise ValueError(f"The reward returned {result!r} at {place(row)}; want a RewardResult with a finite reward.")
  return Scores(
    np.array([result.reward for result in results], np.float32),
    np.array([result.success for result in results], bool),
    np.array([result.format for result in results], bool),
    tuple(result.why for result in results),
    tuple(result.answer for result in results),
  )


REWARDS: dict[str, Callable[..., Any]] = {"countdown": countdown_reward, "math": MathReward, "code": CodeReward}


def make_reward(name: str, **settings: Any) -> Reward:
  """A reward of `REWARDS` with its settings. KeyError for an unknown name; TypeError or ValueError for settings."""
  made = REWARDS[name]
  return made(**settings) if isinstance(made, type) else functools.partial(made, **settings)
