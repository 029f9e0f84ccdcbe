"""Any Python callable as a reward, by its dotted path; on request in processes that are killed when it hangs."""

import functools
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rspo_jax.data.examples import Example
from rspo_jax.lookup import load_path
from rspo_jax.rewards.base import RewardResult, close, outcomes, score_batch
from rspo_jax.rewards.worker_pool import WorkerPool


def as_result(value: Any, success_at: float = 1.0) -> Any:
  """What a user's reward returned, as a RewardResult: a number is the reward, and success from `success_at` on.

  A number says nothing of the form, so `format` is success then. Anything else is left as it is, to be refused.
  """
  if not isinstance(value, bool | int | float | np.bool_ | np.number):
    return value
  return RewardResult(float(value), bool(value >= success_at), bool(value >= success_at))


class CustomReward:
  """A user's function `(text, example, **options) -> number, bool or RewardResult`, or an instance of a user's class.

  A class is made once with the options and called; if it has `score_batch`, that is given whole batches (see
  `rspo_jax.rewards.base`). With a timeout, every completion is judged in a worker process, which imports the module
  anew,
  and is killed when it is over its time: reward 0 and the reason 'timeout'. One that raises there, or ends its
  process, is an error as it is in this process.

  A context manager; without it the workers end with the process that made them.
  """

  def __init__(
    self, path: str, *, timeout: float = 0.0, workers: int = 2, success_at: float = 1.0, options: Mapping[str, Any]
  ):
    """Imports the callable, and starts the workers if there is a timeout.

    Args:
      path: "package.module:function" or "package.module:Class".
      timeout: seconds that a completion may take; 0 judges in this process, where a function that hangs hangs the run.
      workers: processes, with a timeout.
      success_at: the least number that is a success.
      options: bound by keyword; JSON if there is a timeout.
    Raises:
      ValueError: there is no such callable, or options or a setting that it does not take.
    """
    made = load_path(path)
    self._path, self._success_at = path, success_at
    self._reward, self._pool = None, None
    if timeout:
      module, _, function = path.partition(":")
      try:
        wanted = {"module": module, "function": function, "options": dict(options), "fields": Example._fields}
        argument = json.dumps(wanted | {"path": sys.path})
      except TypeError as error:
        raise ValueError(f"options of {path!r} are {options!r}; with a timeout they must be JSON ({error}).") from error
      self._pool = WorkerPool(
        "rspo_jax.rewards.custom_worker:load", argument=argument, workers=workers, timeout=timeout
      )
    else:
      self._reward = made(**options) if isinstance(made, type) else functools.partial(made, **options)
      self.needs_lengths = getattr(self._reward, "needs_lengths", False)

  def __enter__(self) -> "CustomReward":
    return self

  def __exit__(self, *error: Any) -> None:
    self.close()

  def close(self) -> None:
    close(self._reward if self._pool is None else self._pool)

  def __call__(self, text: str, example: Example) -> RewardResult:
    return score_batch(self, [text], [example])[0]

  def score_batch(
    self, texts: Sequence[str], examples: Sequence[Example], lengths: Sequence[int] | None = None
  ) -> list[RewardResult | Exception]:
    """As `judging.outcomes`."""
    if self._pool is None:
      if hasattr(self._reward, "score_batch"):
        return outcomes(self._reward, texts, examples, lengths)
      return outcomes(lambda *pair: as_result(self._reward(*pair), self._success_at), texts, examples)

    def result(row, outcome):
      if outcome.status == "timeout":
        return RewardResult(0.0, False, False, "timeout")
      if outcome.status == "ok":
        whole, value = outcome.value
        return RewardResult(*value) if whole else as_result(value, self._success_at)
      return ValueError(
        f"The reward {self._path} failed ({outcome.status}: {outcome.value}) at row {row} (prompt "
        f"{examples[row].prompt[:80]!r}, completion {texts[row][:80]!r}). Let it give 0 to what it cannot judge, or "
        "set its option on_error to 'zero'."
      )

    found = self._pool.map([(text, tuple(example)) for text, example in zip(texts, examples, strict=True)])
    return [result(row, outcome) for row, outcome in enumerate(found)]
