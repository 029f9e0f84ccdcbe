"""Rewards made of rewards: a weighted sum, and a choice by the example's source."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rspo_jax.data.examples import Example
from rspo_jax.rewards.base import Reward, RewardResult, close, outcomes, score_batch

ANY_SOURCE = "*"


class WeightedReward:
  """The sum of terms, each times its weight; all else (success, format, why, answer) is one term's.

  Every term judges the whole batch. A context manager that closes its terms.
  """

  needs_lengths = True

  def __init__(self, terms: Mapping[str, tuple[Reward, float]], success: str):
    """terms: label -> (reward, weight), weights finite, of any sign. success: label of the term that says whether the
    answer is right. ValueError: no term, an unknown label, a weight that is not finite."""
    if success not in terms:
      raise ValueError(f"success is {success!r}; want the label of one of the terms {', '.join(terms) or '(none)'}.")
    for label, (_, weight) in terms.items():
      if not math.isfinite(weight):
        raise ValueError(f"the weight of term {label!r} is {weight}; want a finite number.")
    self._terms, self._success = dict(terms), success

  def __enter__(self) -> "WeightedReward":
    return self

  def __exit__(self, *error: Any) -> None:
    self.close()

  def close(self) -> None:
    for reward, _ in self._terms.values():
      close(reward)

  def __call__(self, text: str, example: Example) -> RewardResult:
    return score_batch(self, [text], [example])[0]

  def score_batch(
    self, texts: Sequence[str], examples: Sequence[Example], lengths: Sequence[int] | None = None
  ) -> list[RewardResult | Exception]:
    """As `judging.outcomes`; errors name the term. A completion that one term fails on has failed."""
    judged = {
      label: outcomes(reward, texts, examples, lengths, of=f" of term {label!r}")
      for label, (reward, _) in self._terms.items()
    }

    def total(row):
      found = {label: results[row] for label, results in judged.items()}
      if errors := [result for result in found.values() if isinstance(result, Exception)]:
        return errors[0]
      reward = sum(weight * found[label].reward for label, (_, weight) in self._terms.items())
      return found[self._success]._replace(reward=reward)

    return [total(row) for row in range(len(texts))]


class BySourceReward:
  """Of several rewards the one for the example's `source`, which judges all its rows of the batch together.

  A context manager that closes its rewards.
  """

  needs_lengths = True

  def __init__(self, rewards: Mapping[str, Reward]):
    """rewards: source -> reward; '*' is for all others. ValueError: none."""
    if not rewards:
      raise ValueError("there is no reward for any source; want one for each, or '*' for all.")
    self._rewards = dict(rewards)

  def __enter__(self) -> "BySourceReward":
    return self

  def __exit__(self, *error: Any) -> None:
    self.close()

  def close(self) -> None:
    for reward in self._rewards.values():
      close(reward)

  def __call__(self, text: str, example: Example) -> RewardResult:
    return score_batch(self, [text], [example])[0]

  def score_batch(
    self, texts: Sequence[str], examples: Sequence[Example], lengths: Sequence[int] | None = None
  ) -> list[RewardResult | Exception]:
    """As `judging.outcomes`; errors name the source. ValueError for a source without a reward."""
    rows_of: dict[str, list[int]] = {}
    for row, example in enumerate(examples):
      rows_of.setdefault(example.source if example.source in self._rewards else ANY_SOURCE, []).append(row)
    if ANY_SOURCE in rows_of and ANY_SOURCE not in self._rewards:
      row = rows_of[ANY_SOURCE][0]
      raise ValueError(
        f"there is no reward for source {examples[row].source!r} (row {row}, prompt {examples[row].prompt[:80]!r}); "
        f"there are rewards for {', '.join(self._rewards)}. Add one, or '*' for all others."
      )
    results: list[Any] = [None] * len(texts)
    for source, rows in rows_of.items():
      mine = outcomes(
        self._rewards[source],
        [texts[row] for row in rows],
        [examples[row] for row in rows],
        None if lengths is None else [lengths[row] for row in rows],
        of=f" of source {source!r}",
      )
      for row, result in zip(rows, mine, strict=True):
        results[row] = result
    return results
