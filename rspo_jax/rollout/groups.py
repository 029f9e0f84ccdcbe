"""TODO."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rspo_jax.data.examples import Example
from rspo_jax.rollout.completions import Completion


class GroupScores(NamedTuple):
  """Of the G completions of a group: reward with and without the overlong penalty, success, format; each [G]."""

  reward: np.ndarray
  answer_reward: np.ndarray
  success: np.ndarray
  format: np.ndarray

  @property
  def has_signal(self) -> bool:
    """The rewards of the answers differ, so there is something to learn."""
    return self.answer_reward.max() > self.answer_reward.min()


class Group:
  """The completions of one prompt.

  Attributes:
    number: of the group, in the order they begin. place: of its example, in the walk over the data, or with a
      curriculum in the split. started: the RL step it began in. judged: None until its rewards are known.
  """

  def __init__(self, number: int, place: int, example: Example, completions: Sequence[Completion], started: int):
    self.number, self.place, self.example, self.started = number, place, example, started
    self.completions = list(completions)
    self.judged: GroupScores | None = None

  @property
  def done(self) -> bool:
    return all(completion.done for completion in self.completions)
