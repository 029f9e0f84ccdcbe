"""How a reward is asked, and what becomes of one that raises, for one completion or a batch, alone or composed.

A reward is a function (text, example) -> RewardResult. One that has a method `score_batch(texts, examples)` is given
whole batches instead; one that also has `needs_lengths = True` is called as `score_batch(texts, examples, lengths)`,
with the completions' lengths in tokens, or None where nobody knows them. In the place of a result, `score_batch` may
return an exception for a completion that it failed on. What holds processes has a method `close`.
"""

import collections
import logging
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from rspo_jax.data.examples import Example


class RewardResult(NamedTuple):
  """What a completion is worth.

  Attributes:
    reward: what training maximises; finite.
    success: the answer is right.
    format: the answer has the form that was asked for, right or wrong.
    why: the reason in a word or two, to be counted; '' where a reward gives none.
    answer: what was judged, cut out of the text, so that equal answers can be counted (maj@k); '' for none.
  """

  reward: float
  success: bool
  format: bool
  reason: str = ""
  answer: str = ""


Reward = Callable[[str, Example], RewardResult]


def outcomes(
  reward: Reward,
  texts: Sequence[str],
  examples: Sequence[Example],
  lengths: Sequence[int] | None = None,
  *,
  of: str = "",
) -> list[RewardResult | Exception]:
  """For every text a finite result, or why there is none; texts[i] answers examples[i].

  Args:
    lengths: [B], of the completions in tokens; only rewards that need lengths look at them.
    of: what the rows belong to, for messages, as " of source 'gsm8k'".
  Returns:
    Failures are ValueErrors that name the row, the prompt and the start of the text, or a `score_batch`'s own
    exceptions.
  Raises:
    ValueError: unequal numbers of texts, examples, lengths or results. What a reward's `score_batch` raises passes
      through.
  """
  if len(texts) != len(examples):
    raise ValueError(
      f"{len(texts)} texts for {len(examples)} examples; want an example per text: repeat it for its samples."
    )
  if lengths is not None and len(lengths) != len(texts):
    raise ValueError(f"{len(lengths)} lengths for {len(texts)} texts; want one for each.")

  def place(row):
    return f"row {row}{of} (prompt {examples[row].prompt[:80]!r}, completion {texts[row][:80]!r})"

  def single(row):
    try:
      return reward(texts[row], examples[row])
    except Exception as error:
      failure = ValueError(
        f"The reward raised {type(error).__name__}: {error} at {place(row)}. A reward must return a RewardResult for "
        "every text: let it give 0 to what it cannot judge, or set its option on_error to 'zero'."
      )
      failure.__cause__ = error
      return failure

  if getattr(reward, "needs_lengths", False):
    results = reward.score_batch(texts, examples, lengths)
  elif hasattr(reward, "score_batch"):
    results = reward.score_batch(texts, examples)
  else:
    results = [single(row) for row in range(len(texts))]
  if len(results) != len(texts):
    raise ValueError(f"score_batch returned {len(results)} results for {len(texts)} texts; want one for each.")

  def checked(row, result):
    if isinstance(result, Exception) or (isinstance(result, RewardResult) and math.isfinite(result.reward)):
      return result
    return ValueError(f"The reward returned {result!r} at {place(row)}; want a RewardResult with a finite reward.")

  return [checked(row, result) for row, result in enumerate(results)]


def score_batch(
  reward: Reward, texts: Sequence[str], examples: Sequence[Example], lengths: Sequence[int] | None = None
) -> list[RewardResult]:
  """A finite result for every text, or the first failure raised; see `outcomes`."""
  results = outcomes(reward, texts, examples, lengths)
  for result in results:
    if isinstance(result, Exception):
      raise result
  return results


def close(reward: Any) -> None:
  """Ends the processes that a reward holds, its terms' too; nothing for one that holds none."""
  getattr(reward, "close", lambda: None)()


class ZeroOnError:
  """Another reward; a completion that it fails on gets reward 0 and the reason 'failed', all others their due.

  A warning says how many failed, and the first error. Where a `score_batch` raises for the batch as a whole,
  completions are judged one by one.
  """

  needs_lengths = True

  def __init__(self, reward: Reward):
    self._reward = reward

  def __call__(self, text: str, example: Example) -> RewardResult:
    return self.score_batch([text], [example])[0]

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
        "%d of %d completions could not be judged: %s: %s", len(errors), len(texts), type(errors[0]).__name__, errors[0]
      )
    failed = RewardResult(0.0, False, False, "failed")
    return [failed if isinstance(result, Exception) else result for result in results]


class Scores(NamedTuple):
  """Of B completions: reward [B] float32, success [B] bool, format [B] bool; why and answer: B texts each, or none."""

  reward: np.ndarray
  success: np.ndarray
  format: np.ndarray
  reason: tuple[str, ...] = ()
  answer: tuple[str, ...] = ()


def score_completions(
  reward: Reward, texts: Sequence[str], examples: Sequence[Example], lengths: Sequence[int] | None = None
) -> Scores:
  """Rewards a batch; texts[i] answers examples[i], so an example with G samples stands there G times.

  Args:
    lengths: [B], of the completions in tokens, for rewards that need them.
  Raises:
    ValueError: unequal lengths, or a reward that raised or returned anything but a finite RewardResult; names the
      row, the prompt and the start of the text. What a reward's own `score_batch` raises passes through.
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
  """How often every reason was given, as metrics.

  Args:
    most: reasons that are named, the most frequent first; the rest together are 'other'.
  Returns:
    'reward/reason/<reason>' -> share of the completions, in (0, 1]; reasons in small letters, digits and underscores.
    Completions without a reason are not counted.
  """
  counts = collections.Counter(re.sub(r"[^a-z0-9]+", "_", reason.casefold()).strip("_") for reason in scores.reason)
  del counts[""]
  named = dict(counts.most_common(most))
  if rest := counts.total() - sum(named.values()):
    named["other"] = named.get("other", 0) + rest
  return {f"reward/reason/{reason}": count / len(scores.reason) for reason, count in named.items()}
