"""A user's Python callable as a reward, by its dotted path; optionally in worker processes with a time limit."""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rspo_jax.data.examples import Example
from rspo_jax.lookup import load_path
from rspo_jax.rewards.base import CURE, BatchReward, RewardResult, close, location, outcomes
from rspo_jax.rewards.custom_worker import bind
from rspo_jax.rewards.worker_pool import Outcome, WorkerPool


def as_result(value: Any, success_at: float = 1.0) -> Any:
  """The return value of a user's reward as a RewardResult, if it is a number: a success if it is at least `success_at`.

  A number says nothing about the form of the answer, so `format` equals `success`. Other values are returned unchanged;
  `outcomes` refuses all but RewardResults.
  """
  if not isinstance(value, bool | int | float | np.bool_ | np.number):
    return value
  return RewardResult(float(value), bool(value >= success_at), bool(value >= success_at))


class CustomReward(BatchReward):
  """A user's function `(text, example, **options) -> number, bool or RewardResult`, or an instance of a user's class.

  A class is instantiated once with the options and called; one that has `score_batch` receives whole batches (see
  `rspo_jax.rewards.base`). With a timeout, every completion is scored in a worker process, which imports the module
  from scratch and is killed at the time limit: reward 0 and the reason 'timeout'. An exception there, or the end of the
  process, is an error as it is without a timeout.

  A context manager; workers also end with the process that started them.
  """

  def __init__(
    self, path: str, *, timeout: float = 0.0, workers: int = 2, success_at: float = 1.0, options: Mapping[str, Any]
  ):
    """Imports the callable, and starts the workers if there is a timeout.

    Args:
      path: "package.module:function" or "package.module:Class".
      timeout: seconds per completion; 0 scores in this process, which then hangs if the function hangs.
      workers: number of processes, if there is a timeout.
      success_at: the least number that is a success.
      options: keyword arguments of the callable; JSON if there is a timeout.
    Raises:
      ValueError: there is no such callable, or it does not take an option, or a setting is out of range.
    """
    target = load_path(path)
    self._path, self._success_at = path, success_at
    self._reward, self._pool = None, None
    if not timeout:
      self._reward = bind(target, options)
      self.needs_lengths = getattr(self._reward, "needs_lengths", False)
      return
    module, _, function = path.partition(":")
    spec = {"module": module, "function": function, "options": dict(options), "fields": Example._fields}
    try:
      argument = json.dumps(spec | {"path": sys.path})
    except TypeError as error:
      raise ValueError(f"options of {path!r} are {options!r}; with a timeout they must be JSON ({error}).") from error
    self._pool = WorkerPool("rspo_jax.rewards.custom_worker:load", argument=argument, workers=workers, timeout=timeout)

  def close(self) -> None:
    close(self._reward if self._pool is None else self._pool)

  def score_batch(
    self, texts: Sequence[str], examples: Sequence[Example], lengths: Sequence[int] | None = None
  ) -> list[RewardResult | Exception]:
    """As `rspo_jax.rewards.base.outcomes`."""
    if self._pool is not None:
      run = self._pool.map([(text, tuple(example)) for text, example in zip(texts, examples, strict=True)])
      return [self._result(outcome, row, texts[row], examples[row]) for row, outcome in enumerate(run)]
    if hasattr(self._reward, "score_batch"):
      return outcomes(self._reward, texts, examples, lengths)
    return outcomes(lambda *pair: as_result(self._reward(*pair), self._success_at), texts, examples)

  def _result(self, outcome: Outcome, row: int, text: str, example: Example) -> RewardResult | Exception:
    if outcome.status == "timeout":
      return RewardResult(0.0, False, False, "timeout")
    if outcome.status == "ok":
      is_result, value = outcome.value
      return RewardResult(*value) if is_result else as_result(value, self._success_at)
    return ValueError(
      f"The reward {self._path} failed ({outcome.status}: {outcome.value}) at {location(f'row {row}', text, example)}. "
      f"{CURE}"
    )
