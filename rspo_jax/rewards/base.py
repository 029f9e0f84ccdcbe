"""The reward protocol, and how completions are scored, one by one or in batches.

A reward is a function (text, example) -> RewardResult. A reward with a method `score_batch(texts, examples)` receives
whole batches instead; if it also has `needs_lengths = True`, the call is `score_batch(texts, examples, lengths)`, with
the completions' lengths in tokens, or None if they are unknown. `score_batch` may return an exception in place of a
result, for a completion that it failed on. A reward that holds processes has a method `close`.
"""

import collections
import logging
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import numpy as np

from rspo_jax.data.examples import Example


class RewardResult(NamedTuple):
  """The score of a completion.

  Attributes:
    reward: the quantity that training maximises; finite.
    success: the answer is correct.
    format: the answer has the requested form, correct or not.
    reason: one or two words, counted in the metrics; '' if the reward gives none.
    answer: the scored answer, cut out of the text, so that equal answers can be counted (maj@k); '' for none.
  """

  reward: float
  success: bool
  format: bool
  reason: str = ""
  answer: str = ""


Reward = Callable[[str, Example], RewardResult]


# Scoring

CURE = "A reward must give every text a result: return reward 0 for a text it cannot score, or set on_error to 'zero'."


def outcomes(
  reward: Reward,
  texts: Sequence[str],
  examples: Sequence[Example],
  lengths: Sequence[int] | None = None,
  *,
  owner: str = "",
) -> list[RewardResult | Exception]:
  """A finite result for every text, or the exception that prevented it; texts[i] answers examples[i].

  Args:
    lengths: [B], of the completions in tokens; only for rewards with `needs_lengths`.
    owner: the part of a composed reward that scores these rows, for messages, as " of source 'gsm8k'".
  Returns:
    Failures are ValueErrors that name the row, the prompt and the start of the text, or a `score_batch`'s own
    exceptions.
  Raises:
    ValueError: unequal numbers of texts, examples, lengths or results. Exceptions that a reward's `score_batch` raises
      propagate.
  """
  if len(texts) != len(examples):
    raise ValueError(
      f"{len(texts)} texts for {len(examples)} examples; want an example per text: repeat it for its samples."
    )
  if lengths is not None and len(lengths) != len(texts):
    raise ValueError(f"{len(lengths)} lengths for {len(texts)} texts; want one for each.")
  rows = [f"row {row}{owner}" for row in range(len(texts))]
  if getattr(reward, "needs_lengths", False):
    results = reward.score_batch(texts, examples, lengths)
  elif hasattr(reward, "score_batch"):
    results = reward.score_batch(texts, examples)
  else:
    results = list(map(_score_one, [reward] * len(texts), texts, examples, rows))
  if len(results) != len(texts):
    raise ValueError(f"score_batch returned {len(results)} results for {len(texts)} texts; want one for each.")
  return list(map(_finite, results, texts, examples, rows))


def location(row: str, text: str, example: Example) -> str:
  """A row of a batch, for messages, with the start of its prompt and of its completion."""
  return f"{row} (prompt {example.prompt[:80]!r}, completion {text[:80]!r})"


def _score_one(reward: Reward, text: str, example: Example, row: str) -> RewardResult | Exception:
  try:
    return reward(text, example)
  except Exception as error:
    failure = ValueError(f"The reward raised {type(error).__name__}: {error} at {location(row, text, example)}. {CURE}")
    failure.__cause__ = error
    return failure


def _finite(result: Any, text: str, example: Example, row: str) -> RewardResult | Exception:
  if isinstance(result, Exception) or (isinstance(result, RewardResult) and math.isfinite(result.reward)):
    return result
  return ValueError(
    f"The reward returned {result!r} at {location(row, text, example)}; want a RewardResult with a finite reward."
  )


def score_batch(
  reward: Reward, texts: Sequence[str], examples: Sequence[Example], lengths: Sequence[int] | None = None
) -> list[RewardResult]:
  """A finite result for every text; raises the first failure. See `outcomes`."""
  results = outcomes(reward, texts, examples, lengths)
  for result in results:
    if isinstance(result, Exception):
      raise result
  return results


class Scores(NamedTuple):
  """Results of B completions, by column.

  Attributes:
    reward: [B] float32.
    success, format: [B] bool.
    reason, answer: B texts each, or empty.
  """

  reward: np.ndarray
  success: np.ndarray
  format: np.ndarray
  reason: tuple[str, ...] = ()
  answer: tuple[str, ...] = ()


def score_completions(
  reward: Reward, texts: Sequence[str], examples: Sequence[Example], lengths: Sequence[int] | None = None
) -> Scores:
  """Rewards of a batch; texts[i] answers examples[i], so an example with G samples is repeated G times.

  Args:
    lengths: [B], of the completions in tokens; only for rewards with `needs_lengths`.
  Raises:
    ValueError: unequal lengths, or a reward that raised or returned anything but a finite RewardResult; names the
      row, the prompt and the start of the text. Exceptions that a reward's `score_batch` raises propagate.
  """
  results = score_batch(reward, texts, examples, lengths)
  return Scores(
    np.array([result.reward for result in results], np.float32),
    np.array([result.success for result in results], bool),
    np.array([result.format for result in results], bool),
    tuple(result.reason for result in results),
    tuple(result.answer for result in results),
  )


def reason_counts(scores: Scores, *, most: int = 16) -> dict[str, float]:
  """The share of every reason, as metrics.

  Args:
    most: number of reasons with an entry of their own, the most frequent first; 'other' sums up the rest.
  Returns:
    'reward/reason/<reason>' -> share of the completions, in (0, 1]; reasons in lower case, digits and underscores.
    Completions without a reason are not counted.
  """
  counts = collections.Counter(re.sub(r"[^a-z0-9]+", "_", reason.casefold()).strip("_") for reason in scores.reason)
  del counts[""]
  named = dict(counts.most_common(most))
  if rest := counts.total() - sum(named.values()):
    named["other"] = named.get("other", 0) + rest
  return {f"reward/reason/{reason}": count / len(scores.reason) for reason, count in named.items()}


# Closing, and failures


def close(reward: Any) -> None:
  """Ends the processes that a reward and its terms hold, if any."""
  getattr(reward, "close", lambda: None)()


class BatchReward:
  """Mixin of rewards that score batches: a single completion is a batch of one, and leaving a `with` block closes.

  A subclass defines `score_batch`, and `close` if it holds processes or other rewards.
  """

  def __call__(self, text: str, example: Example) -> RewardResult:
    return score_batch(self, [text], [example])[0]

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *error: object) -> None:
    close(self)


class ZeroOnError(BatchReward):
  """Wraps a reward: a completion that it fails on gets reward 0 and the reason 'failed'; other results are unchanged.

  A warning gives the number of failures and the first error. If `score_batch` raises for the batch as a whole, the
  completions are scored one by one.
  """

  needs_lengths = True

  def __init__(self, reward: Reward):
    self._reward = reward

  def close(self) -> None:
    close(self._reward)

  def score_batch(
    self, texts: Sequence[str], examples: Sequence[Example], lengths: Sequence[int] | None = None
  ) -> list[RewardResult]:
    try:
      results = outcomes(self._reward, texts, examples, lengths)
    except Exception:
      results = []
      for row in range(len(texts)):
        one = slice(row, row + 1)
        try:
          results += outcomes(self._reward, texts[one], examples[one], lengths if lengths is None else lengths[one])
        except Exception as error:
          results.append(error)
    errors = [result for result in results if isinstance(result, Exception)]
    if errors:
      logging.getLogger(__name__).warning(
        "%d of %d completions could not be scored: %s: %s", len(errors), len(texts), type(errors[0]).__name__, errors[0]
      )
    failed = RewardResult(0.0, False, False, "failed")
    return [failed if isinstance(result, Exception) else result for result in results]
