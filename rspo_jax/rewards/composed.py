"""Rewards composed of rewards: a weighted sum, and a choice by the example's source."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rspo_jax.data.examples import Example
from rspo_jax.rewards.base import BatchReward, Reward, RewardResult, close, outcomes

ANY_SOURCE = "*"


class WeightedReward(BatchReward):
  """The weighted sum of terms; success, format, reason and answer are those of one term.

  Every term scores the whole batch. A context manager that closes its terms.
  """

  needs_lengths = True

  def __init__(self, terms: Mapping[str, tuple[Reward, float]], success: str):
    """Checks labels and weights.

    Args:
      terms: label -> (reward, weight); weights are finite, of any sign.
      success: label of the term whose success, format, reason and answer are reported.
    Raises:
      ValueError: no term, an unknown label, or a weight that is not finite.
    """
    if success not in terms:
      raise ValueError(f"success is {success!r}; want the label of one of the terms {', '.join(terms) or '(none)'}.")
    for label, (_, weight) in terms.items():
      if not math.isfinite(weight):
        raise ValueError(f"the weight of term {label!r} is {weight}; want a finite number.")
    self._terms, self._success = dict(terms), success

  def close(self) -> None:
    for reward, _ in self._terms.values():
      close(reward)

  def score_batch(
    self, texts: Sequence[str], examples: Sequence[Example], lengths: Sequence[int] | None = None
  ) -> list[RewardResult | Exception]:
    """As `rspo_jax.rewards.base.outcomes`; errors name the term. A completion fails if any term fails on it."""
    results_of = {
      label: outcomes(reward, texts, examples, lengths, owner=f" of term {label!r}")
      for label, (reward, _) in self._terms.items()
    }

    def total(row):
      parts = {label: results[row] for label, results in results_of.items()}
      if errors := [result for result in parts.values() if isinstance(result, Exception)]:
        return errors[0]
      reward = sum(weight * parts[label].reward for label, (_, weight) in self._terms.items())
      return parts[self._success]._replace(reward=reward)

    return [total(row) for row in range(len(texts))]


class BySourceReward(BatchReward):
  """One reward per `Example.source`; each scores all rows of its source in a batch together.

  A context manager that closes its rewards.
  """

  needs_lengths = True

  def __init__(self, rewards: Mapping[str, Reward]):
    """rewards: source -> reward; '*' is for all other sources. ValueError if there is none."""
    if not rewards:
      raise ValueError("there is no reward for any source; want one for each, or '*' for all.")
    self._rewards = dict(rewards)

  def close(self) -> None:
    for reward in self._rewards.values():
      close(reward)

  def score_batch(
    self, texts: Sequence[str], examples: Sequence[Example], lengths: Sequence[int] | None = None
  ) -> list[RewardResult | Exception]:
    """As `rspo_jax.rewards.base.outcomes`; errors name the source. ValueError for a source without a reward."""
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
      of_source = outcomes(
        self._rewards[source],
        [texts[row] for row in rows],
        [examples[row] for row in rows],
        None if lengths is None else [lengths[row] for row in rows],
        owner=f" of source {source!r}",
      )
      for row, result in zip(rows, of_source, strict=True):
        results[row] = result
    return results
