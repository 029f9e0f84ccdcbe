"""Groups: the completions of one prompt, and their rewards."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from rspo_jax.data.examples import Example
from rspo_jax.objectives.penalties import overlong_penalty
from rspo_jax.rewards.base import Reward, reason_counts, score_completions
from rspo_jax.rollout.completions import Completion


class GroupScores(NamedTuple):
  """Rewards of the G completions of a group, each [G].

  Attributes:
    reward: with the overlong penalty. answer_reward: without it. success, format: see `RewardResult`.
  """

  reward: np.ndarray
  answer_reward: np.ndarray
  success: np.ndarray
  format: np.ndarray

  @property
  def has_signal(self) -> bool:
    """The rewards of the answers differ, so that advantages are not all zero."""
    return bool(self.answer_reward.max() > self.answer_reward.min())


class Group:
  """The completions of one prompt.

  Attributes:
    number: in the order in which groups begin. index: of its example, in the index stream or, with a curriculum, in the
      split. started: the RL step it began in. scores: None until its rewards are known.
  """

  def __init__(self, number: int, index: int, example: Example, completions: Sequence[Completion], started: int):
    self.number, self.index, self.example, self.started = number, index, example, started
    self.completions = list(completions)
    self.scores: GroupScores | None = None

  @property
  def done(self) -> bool:
    return all(completion.done for completion in self.completions)


def score_groups(
  groups: Sequence[Group],
  reward: Reward,
  decode: Callable[[list[int]], str],
  *,
  max_length: int,
  overlong_buffer: int = 0,
  overlong_penalty_max: float = 1.0,
) -> tuple[list[GroupScores], dict[str, float]]:
  """Rewards of whole groups, in one batch.

  Args:
    decode: token ids of a completion -> text.
    max_length: the length limit, tokens. overlong_buffer: tokens before it over which the reward falls by up to
      overlong_penalty_max (DAPO); 0 is off.
  Returns:
    The scores of every group, and how often each reason was given (counts by metric name).
  """
  completions = [completion for group in groups for completion in group.completions]
  examples = [group.example for group in groups for _ in group.completions]
  texts = [decode(completion.tokens.tolist()) for completion in completions]
  lengths = np.array([len(completion.tokens) for completion in completions])
  scores = score_completions(reward, texts, examples, lengths)
  total = scores.reward
  if overlong_buffer:
    limits = {"max_length": max_length, "buffer": overlong_buffer, "penalty": overlong_penalty_max}
    total = total + np.asarray(overlong_penalty(lengths, **limits))
  columns = (total, scores.reward, scores.success, scores.format)
  rows = (column.reshape(len(groups), -1) for column in columns)
  reasons = {name: share * len(texts) for name, share in reason_counts(scores).items()}
  return [GroupScores(*row) for row in zip(*rows, strict=True)], reasons
