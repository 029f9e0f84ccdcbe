"""F3: rewards that can be verified. A reward is a function of a completion's text and its example.

`REWARDS` maps a name to such a function; settings are bound with `functools.partial`.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from rspo_jax import countdown
from rspo_jax.data import Example


class RewardResult(NamedTuple):
  """What a completion is worth.

  Attributes:
    reward: what training maximises; finite.
    success: the answer is right.
    format: the answer has the form that was asked for, right or wrong.
  """

  reward: float
  success: bool
  format: bool


Reward = Callable[[str, Example], RewardResult]


class Scores(NamedTuple):
  """Rewards of B completions: reward [B] float32, success [B] bool, format [B] bool."""

  reward: np.ndarray
  success: np.ndarray
  format: np.ndarray


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
  return RewardResult(reward, verdict.right, verdict.valid)


def score_completions(reward: Reward, texts: Sequence[str], examples: Sequence[Example]) -> Scores:
  """Rewards a batch; texts[i] answers examples[i], so an example with G samples stands there G times.

  Raises:
    ValueError: unequal lengths, or a reward that raised or returned anything but a finite RewardResult; names the
      row, the prompt and the start of the text.
  """
  if len(texts) != len(examples):
    raise ValueError(
      f"{len(texts)} texts for {len(examples)} examples; want an example per text: repeat it for its samples."
    )
  results = []
  for row, (text, example) in enumerate(zip(texts, examples, strict=True)):
    where = f"row {row} (prompt {example.prompt[:80]!r}, completion {text[:80]!r})"
    try:
      result = reward(text, example)
    except Exception as error:
      raise ValueError(
        f"The reward raised {type(error).__name__}: {error} at {where}. A reward must return a RewardResult for "
        "every text: let it give 0 to what it cannot judge."
      ) from error
    if not isinstance(result, RewardResult) or not math.isfinite(result.reward):
      raise ValueError(f"The reward returned {result!r} at {where}; want a RewardResult with a finite reward.")
    results.append(result)
  return Scores(
    np.array([result.reward for result in results], np.float32),
    np.array([result.success for result in results], bool),
    np.array([result.format for result in results], bool),
  )


REWARDS: dict[str, Reward] = {"countdown": countdown_reward}
