"""What samples say about a policy: avg@k, pass@k, maj@k, their averages and their uncertainty. Pure numpy.

Every estimator gives one number per problem, [N] float64; a benchmark's number is their mean, a paper's number the mean
of its benchmarks (`macro_average`). n is how many completions were drawn of each problem, k how many a user would draw.
"""

import math
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

OVER = ("problems", "samples", "both")
_AT_ONCE = 2**22  # numbers that are drawn anew at once


def avg_at_k(success: np.ndarray) -> np.ndarray:
  """Share of right completions of every problem, [N]; its mean is avg@k with k = n, the paper's "Pass@1 average".

  Args:
    success: [N, n], bool or in [0, 1].
  """
  return _samples(success).mean(axis=1)


def pass_at_k(success: np.ndarray, k: int) -> np.ndarray:
  """Chance that at least one of k completions is right, [N]: unbiased, 1 - C(n - c, k) / C(n, k) with c right of n.

  Computed as 1 - prod_{i = n-c+1..n} (1 - k / i), which neither overflows nor cancels.

  Args:
    success: [N, n] bool.
    k: 1 to n.
  Raises:
    ValueError: k out of range.
  Source: Chen et al. 2021, arXiv 2107.03374, equation 1.
  """
  success = _samples(success)
  n = success.shape[1]
  _check_k(k, n)
  right = success.astype(bool).sum(axis=1)
  i = np.arange(1, n + 1)
  factors = np.where(i > n - right[:, None], 1.0 - np.minimum(k / i, 1.0), 1.0)
  return 1.0 - factors.prod(axis=1)


def maj_at_k(answers: Sequence[Sequence[str]], success: np.ndarray, k: int) -> np.ndarray:
  """Chance that the most frequent answer among k completions is right, [N].

  The expectation over all C(n, k) ways to draw k of the n completions without replacement, exact, nothing is sampled.
  Answers that tie for the most votes win with equal chance. A completion without answer ('') takes a place among the k
  and votes for nothing; if nobody votes, the problem counts as wrong. maj@1 is avg@n where every right completion has
  an answer. Answers are compared by `vote`. If completions of one answer were judged differently (a timeout), it is
  worth its share of right ones.

  Args:
    answers: N lists of n texts. success: [N, n] bool.
    k: 1 to n.
  Raises:
    ValueError: k out of range, or shapes that do not fit.
  Source: self-consistency, Wang et al. 2022, arXiv 2203.11171; the expectation over subsets and ties is ours.
  """
  success = _samples(success)
  if len(answers) != len(success) or any(len(row) != success.shape[1] for row in answers):
    raise ValueError(f"success is {list(success.shape)}; want as many answers for each of as many problems.")
  _check_k(k, success.shape[1])
  return np.array([_majority(row, right, k) for row, right in zip(answers, success, strict=True)])


def vote(answer: str) -> str:
  """What an answer is compared by: its text in Unicode's form NFKC, runs of white space as one space, none at the ends.

  Cheap, and less than equality in mathematics: 1/2 and 0.5 are two candidates. A reward that knows better puts a
  canonical form into `RewardResult.answer`.
  """
  return " ".join(unicodedata.normalize("NFKC", answer).split())


def _majority(answers: Sequence[str], success: np.ndarray, k: int) -> float:
  votes = [vote(answer) for answer in answers]
  counts = Counter(votes)
  silent = counts.pop("", 0)
  worth = {answer: success[[v == answer for v in votes]].mean() for answer in counts}
  return sum(
    worth[answer] * _chance_to_win(count, list((counts - Counter({answer: count})).values()), silent, k)
    for answer, count in counts.items()
    if worth[answer] > 0
  )


def _chance_to_win(count: int, others: Sequence[int], silent: int, k: int) -> float:
  """Chance that an answer wins among k completions drawn without replacement.

  Numbers of independent binomials, given their sum, are what drawing without replacement gives: so polynomials of
  binomial chances, which stay in [0, 1], are multiplied, one for each answer, and the coefficient of k draws is read.

  Args:
    count: of its completions; others: those of the other answers; silent: of completions without answer.
  """
  n = count + sum(others) + silent
  share = k / n
  own, nobody, all_of_them = (_binomial(size, share) for size in (count, silent, n))
  chance = 0.0
  for most in range(1, min(count, k) + 1):
    left = k - most  # draws that go to the others, none of whom gets more than `most`
    ties = left // most
    table = np.zeros((left + 1, ties + 1))  # [draws, how many got exactly `most`]
    table[: silent + 1, 0] = nobody[: left + 1]
    for size in others:
      theirs = _binomial(size, share)[: most + 1]
      new = np.zeros_like(table)
      for got, weight in enumerate(theirs[: left + 1]):
        if got == most:
          new[got:, 1:] += weight * table[: left + 1 - got, :-1]
        else:
          new[got:] += weight * table[: left + 1 - got]
      table = new
    chance += own[most] * (table[left] / np.arange(1, ties + 2)).sum()
  return float(chance / all_of_them[k])


def _binomial(size: int, share: float) -> np.ndarray:
  """Chances [size + 1] of so many hits in `size` tries."""
  if share == 1.0:
    return np.eye(size + 1)[size]
  hit, miss = math.log(share), math.log1p(-share)
  return np.exp([math.log(math.comb(size, got)) + got * hit + (size - got) * miss for got in range(size + 1)])


def macro_average(values: Sequence[Any]) -> Any:
  """The unweighted mean of benchmarks, however many problems each has: numbers, or replicates [B, R] -> [R].

  Raises:
    ValueError: no benchmark.
  """
  if not len(values):
    raise ValueError("there is no benchmark to average over.")
  return np.mean(np.asarray(values, float), axis=0)


def bootstrap(values: np.ndarray, *, resamples: int = 10_000, seed: Any = 0, over: str = "problems") -> np.ndarray:
  """Means of data sets drawn anew, [resamples], for `interval`.

  Of a paired difference: pass the difference of the two runs on the same problems.

  Args:
    values: [N], one number per problem; or [N, n], one per completion, where samples are drawn anew.
    resamples: how many. seed: whatever `numpy.random.default_rng` takes; equal seeds give equal draws.
    over: "problems": N problems are drawn with replacement, with all that belongs to them. Their completions' noise is
      part of how they differ, so this is the interval for other problems of the kind. "samples": the problems stay, n
      completions of each are drawn anew: the interval for the same benchmark run again. "both": problems, then
      completions of each (two levels); it counts the noise of completions twice, and so is wider than it need be.
  Raises:
    ValueError: fewer than two problems (over samples: completions), an unknown `over`, or values that do not fit it.
  Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap.
  """
  values = np.asarray(values, float)
  if over not in OVER:
    raise ValueError(f"over is {over!r}; want one of {', '.join(OVER)}.")
  wanted = (1, 2) if over == "problems" else (2,)
  if values.ndim not in wanted or not values.size:
    raise ValueError(
      f"values have the shape {list(values.shape)}; for over={over!r} want {' or '.join(map(str, wanted))} axes."
    )
  if over == "problems" and values.ndim == 2:
    values = values.mean(axis=1)
  count = values.shape[1] if over == "samples" else values.shape[0]
  if count < 2 or resamples < 1:
    raise ValueError(
      f"{count} {over if over == 'samples' else 'problems'} and {resamples} resamples; want 2 and 1 at least."
    )
  rng = np.random.default_rng(seed)
  found = []
  at_once = max(1, _AT_ONCE // values.size)
  for start in range(0, resamples, at_once):
    found.append(_draw_anew(values, min(at_once, resamples - start), rng, over))
  return np.concatenate(found)


def _draw_anew(values: np.ndarray, resamples: int, rng: np.random.Generator, over: str) -> np.ndarray:
  rows = len(values)
  problem = np.arange(rows) if over == "samples" else rng.integers(rows, size=(resamples, rows))
  if values.ndim == 1:
    return values[problem].mean(axis=1)
  sample = rng.integers(values.shape[1], size=(resamples, *values.shape))
  return values[problem[..., None], sample].mean(axis=(1, 2))


def interval(replicates: np.ndarray, level: float = 0.95) -> tuple[float, float]:
  """The percentile interval of a bootstrap: its (1 - level) / 2 and (1 + level) / 2 quantiles.

  Raises:
    ValueError: level outside (0, 1).
  """
  if not 0.0 < level < 1.0:
    raise ValueError(f"level is {level}; want a value in (0, 1), such as 0.95.")
  low, high = np.quantile(replicates, [(1 - level) / 2, (1 + level) / 2])
  return float(low), float(high)


def powers_of_two(n: int) -> tuple[int, ...]:
  """1, 2, 4, ... up to n, and n itself: the k that curves are drawn over."""
  return tuple(sorted({*(2**i for i in range(n.bit_length())), n}))


def _samples(success: np.ndarray) -> np.ndarray:
  success = np.asarray(success, float)
  if success.ndim != 2 or not success.size:
    raise ValueError(f"success has the shape {list(success.shape)}; want [problems, samples], at least one of each.")
  return success


def _check_k(k: int, n: int) -> None:
  if not 1 <= k <= n:
    raise ValueError(f"k is {k} with {n} samples a problem; want 1 to {n}: draw more samples, or ask for a smaller k.")
