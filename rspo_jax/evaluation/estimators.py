"""Estimators of a policy's success from samples: avg@k, pass@k, maj@k, their averages and intervals. Numpy only.

Every estimator gives one number per problem, [N] float64. The number of a benchmark is their mean, and the number of a
group the unweighted mean of its benchmarks (`macro_average`). n is the number of completions sampled of each problem, k
the number that the estimate is for.
"""

import math
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

BOOTSTRAP_UNITS = ("problems", "samples", "both")
_MAX_ELEMENTS = 2**22  # of one batch of resampled values, which bounds memory


def avg_at_k(success: np.ndarray) -> np.ndarray:
  """Share of correct completions of every problem, [N]; its mean is avg@k with k = n, the paper's "Pass@1 average".

  Args:
    success: [N, n], bool or in [0, 1].
  """
  return _samples(success).mean(axis=1)


def pass_at_k(success: np.ndarray, k: int) -> np.ndarray:
  """Probability that at least one of k completions is correct, [N].

  The unbiased estimate 1 - C(n - c, k) / C(n, k), where c of the n completions are correct.

  Computed as 1 - prod_{i = n-c+1..n} (1 - k / i), which avoids overflow and cancellation.

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
  correct = success.astype(bool).sum(axis=1)
  i = np.arange(1, n + 1)
  factors = np.where(i > n - correct[:, None], 1.0 - np.minimum(k / i, 1.0), 1.0)
  return 1.0 - factors.prod(axis=1)


def maj_at_k(answers: Sequence[Sequence[str]], success: np.ndarray, k: int) -> np.ndarray:
  """Probability that the most frequent answer among k completions is correct, [N].

  The exact expectation over all C(n, k) subsets of k of the n completions. Answers that tie for the most votes win with
  equal probability. A completion without answer ('') counts as one of the k but has no vote; without any vote the
  problem counts as incorrect. maj@1 equals avg@n if every correct completion has an answer. Answers are compared after
  `normalize_answer`. If completions with the same answer were scored differently (a timeout, for example), the answer
  counts with its share of correct completions.

  Args:
    answers: N lists of n texts. success: [N, n] bool.
    k: 1 to n.
  Raises:
    ValueError: k out of range, or the shapes of answers and success differ.
  Source: self-consistency, Wang et al. 2022, arXiv 2203.11171; the expectation over subsets and ties is ours.
  """
  success = _samples(success)
  problems, n = success.shape
  if len(answers) != problems or any(len(row) != n for row in answers):
    raise ValueError(f"answers do not match success {[problems, n]}; want {n} answers for each of {problems} problems.")
  _check_k(k, n)
  return np.array([_majority(row, correct, k) for row, correct in zip(answers, success, strict=True)])


def normalize_answer(answer: str) -> str:
  """An answer for comparison: Unicode's form NFKC, runs of white space as one space, none at the ends.

  This is cheap and does not recognise mathematical equality: 1/2 and 0.5 are two candidates. A reward that does can
  return a canonical form in `RewardResult.answer`.
  """
  return " ".join(unicodedata.normalize("NFKC", answer).split())


def _majority(answers: Sequence[str], success: np.ndarray, k: int) -> float:
  normalized = [normalize_answer(answer) for answer in answers]
  counts = Counter(normalized)
  unanswered = counts.pop("", 0)
  accuracy = {answer: success[[a == answer for a in normalized]].mean() for answer in counts}
  return sum(
    accuracy[answer] * _win_probability(count, list((counts - Counter({answer: count})).values()), unanswered, k)
    for answer, count in counts.items()
    if accuracy[answer] > 0
  )


def _win_probability(count: int, rivals: Sequence[int], unanswered: int, k: int) -> float:
  """Probability that an answer has the most votes among k completions sampled without replacement, ties shared.

  Counts under sampling without replacement are distributed as independent binomial counts given their sum. So the
  polynomials of binomial probabilities, one per answer, are multiplied, and the coefficient of k samples is read; all
  of these values stay in [0, 1].

  Args:
    count: completions with this answer. rivals: with each other answer. unanswered: without an answer.
  """
  n = count + sum(rivals) + unanswered
  share = k / n
  votes_pmf, unanswered_pmf, total_pmf = (_binomial(size, share) for size in (count, unanswered, n))
  probability = 0.0
  for votes in range(1, min(count, k) + 1):
    rest = k - votes  # samples of the rivals, each with at most `votes`, and of the unanswered
    max_ties = rest // votes
    table = np.zeros((rest + 1, max_ties + 1))  # [samples so far, rivals with exactly `votes`]
    table[: unanswered + 1, 0] = unanswered_pmf[: rest + 1]
    for size in rivals:
      rival_pmf = _binomial(size, share)[: votes + 1]
      updated = np.zeros_like(table)
      for rival_votes, weight in enumerate(rival_pmf[: rest + 1]):
        if rival_votes == votes:
          updated[rival_votes:, 1:] += weight * table[: rest + 1 - rival_votes, :-1]
        else:
          updated[rival_votes:] += weight * table[: rest + 1 - rival_votes]
      table = updated
    probability += votes_pmf[votes] * (table[rest] / np.arange(1, max_ties + 2)).sum()
  return float(probability / total_pmf[k])


def _binomial(size: int, share: float) -> np.ndarray:
  """Binomial probabilities [size + 1] of 0 to `size` hits in `size` trials."""
  if share == 1.0:
    return np.eye(size + 1)[size]
  hit, miss = math.log(share), math.log1p(-share)
  return np.exp([math.log(math.comb(size, hits)) + hits * hit + (size - hits) * miss for hits in range(size + 1)])


def macro_average(values: Sequence[Any]) -> Any:
  """The mean over benchmarks, not weighted by their numbers of problems.

  Args:
    values: a number per benchmark, [B] -> scalar, or its bootstrap replicates, [B, R] -> [R].
  Raises:
    ValueError: no benchmark.
  """
  if not len(values):
    raise ValueError("there is no benchmark to average over; pass the values of at least one.")
  return np.mean(np.asarray(values, float), axis=0)


def bootstrap(values: np.ndarray, *, resamples: int = 10_000, seed: Any = 0, over: str = "problems") -> np.ndarray:
  """Means of resampled data sets, [resamples], for `interval`.

  For a paired difference, pass the difference of two runs on the same problems.

  Args:
    values: [N], one number per problem; or [N, n], one per completion, which resampling of completions needs.
    resamples: number of resampled data sets.
    seed: as for `numpy.random.default_rng`; equal seeds give equal resamples.
    over: "problems": N problems are sampled with replacement, each with all its completions. The noise of completions
      is part of the variation between problems, so this is the interval for other problems of the same kind. "samples":
      the problems are fixed, and n completions of each are sampled with replacement: the interval for another run on
      the same benchmark. "both": problems, then completions of each (two levels); it counts the noise of completions
      twice, so it is wider than necessary.
  Raises:
    ValueError: fewer than two problems (completions for "samples"), an unknown `over`, or values of the wrong rank.
  Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap.
  """
  values = np.asarray(values, float)
  if over not in BOOTSTRAP_UNITS:
    raise ValueError(f"over is {over!r}; want one of {', '.join(BOOTSTRAP_UNITS)}.")
  ranks = (1, 2) if over == "problems" else (2,)
  if values.ndim not in ranks or not values.size:
    raise ValueError(
      f"values have the shape {list(values.shape)}; for over={over!r} want {' or '.join(map(str, ranks))} axes."
    )
  if over == "problems" and values.ndim == 2:
    values = values.mean(axis=1)
  count = values.shape[1] if over == "samples" else values.shape[0]
  if count < 2 or resamples < 1:
    raise ValueError(
      f"{count} {over if over == 'samples' else 'problems'} and {resamples} resamples; want at least 2 and 1."
    )
  rng = np.random.default_rng(seed)
  batch = max(1, _MAX_ELEMENTS // values.size)
  means = [_resample(values, min(batch, resamples - start), rng, over) for start in range(0, resamples, batch)]
  return np.concatenate(means)


def _resample(values: np.ndarray, resamples: int, rng: np.random.Generator, over: str) -> np.ndarray:
  rows = len(values)
  problem = np.arange(rows) if over == "samples" else rng.integers(rows, size=(resamples, rows))
  if values.ndim == 1:
    return values[problem].mean(axis=1)
  sample = rng.integers(values.shape[1], size=(resamples, *values.shape))
  return values[problem[..., None], sample].mean(axis=(1, 2))


def interval(replicates: np.ndarray, level: float = 0.95) -> tuple[float, float]:
  """The percentile interval of bootstrap replicates: their (1 - level) / 2 and (1 + level) / 2 quantiles.

  Raises:
    ValueError: level outside (0, 1).
  """
  if not 0.0 < level < 1.0:
    raise ValueError(f"level is {level}; want a value in (0, 1), such as 0.95.")
  low, high = np.quantile(replicates, [(1 - level) / 2, (1 + level) / 2])
  return float(low), float(high)


def powers_of_two(n: int) -> tuple[int, ...]:
  """1, 2, 4, ... up to n, and n itself: the values of k that curves are plotted over."""
  return tuple(sorted({*(2**i for i in range(n.bit_length())), n}))


def _samples(success: np.ndarray) -> np.ndarray:
  success = np.asarray(success, float)
  if success.ndim != 2 or not success.size:
    raise ValueError(f"success has the shape {list(success.shape)}; want [problems, samples], at least one of each.")
  return success


def _check_k(k: int, n: int) -> None:
  if not 1 <= k <= n:
    raise ValueError(
      f"k is {k} with {n} samples a problem; want 1 to {n}: sample more completions, or use a smaller k."
    )
