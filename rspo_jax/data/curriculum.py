"""Chooses the problems to sample next by the policy's success rate on them.

A problem that is always or never solved carries no signal for a group objective: the expected improvement is bounded
from below by the variance of success, p (1 - p), which is largest at p = 1/2. Problems whose success rate lies outside
a band are therefore skipped for a while.

Source: online difficulty filtering, arXiv 2504.03380. The paper filters problems after sampling them, as dynamic
sampling does; here the rates of earlier samples decide, which costs no completions.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from rspo_jax.data.examples import Example, Split, index_stream

_UNSEEN = -1


@dataclasses.dataclass(frozen=True)
class CurriculumOptions:
  """The band of success rates and how estimates of them age. The defaults skip nothing.

  Attributes:
    low, high: the band, both ends included, 0 <= low <= high <= 1.
    memory: weight that an estimate keeps per epoch, in [0, 1). With 0 only the latest samples count.
    retry_epochs: epochs after which a problem outside the band is tried again, 1 or more.
    max_skipped: examples skipped per example wanted before a batch is filled up, 0 or more. A batch never skips more
      than one epoch of examples.
  Raises:
    ValueError: a field out of range.
  """

  low: float = 0.0
  high: float = 1.0
  memory: float = 0.5
  retry_epochs: int = 4
  max_skipped: int = 64

  def __post_init__(self):
    if not 0.0 <= self.low <= self.high <= 1.0:
      raise ValueError(f"low is {self.low} and high {self.high}; want success rates with 0 <= low <= high <= 1.")
    if not 0.0 <= self.memory < 1.0:
      raise ValueError(f"memory is {self.memory}; want a value in [0, 1). Use 0 to trust the latest samples alone.")
    if self.retry_epochs < 1:
      raise ValueError(
        f"retry_epochs is {self.retry_epochs}; want 1 or more. Use a large number to hardly ever try problems again."
      )
    if self.max_skipped < 0:
      raise ValueError(f"max_skipped is {self.max_skipped}; want 0 or more. Use 0 to skip nothing.")


class Curriculum:
  """Reads a split's index stream in the order of `data.batches` and skips problems outside the band.

  An epoch is as many positions of the stream as the split has examples, skipped ones included. Unseen problems are
  always chosen. The trainer records how often each problem was solved (`record`). Estimates decay, so that a stale
  success rate does not exclude a problem forever: after e >= 1 epochs the old estimate has weight memory ** e in the
  new one, and a problem outside the band is tried again after `retry_epochs`. If too few problems are inside, the batch
  is filled up with the skipped ones nearest to the band. In a mixture, skipping can move batches away from the weights.

  Choices depend only on the arguments and on the recorded rates: processes that record the same choose the same.
  """

  def __init__(self, split: Split, options: CurriculumOptions, *, seed: int):
    """Starts with all problems unseen.

    Args:
      seed: of the index stream, as for `data.batches`.
    Raises:
      ValueError: seed out of range.
    """
    self._split, self._stream, self._options = split, index_stream(split, seed), options
    self._retry = options.retry_epochs * len(split)  # positions of the stream
    self._position = 0  # in the stream
    self._rate = np.zeros(len(split), np.float64)
    self._recorded_at = np.full(len(split), _UNSEEN, np.int64)  # position in the stream at the latest record
    self._last = np.zeros(3, np.int64)  # of the latest choice: skipped, retried, filled

  def choose(self, count: int) -> tuple[np.ndarray, list[Example]]:
    """The indices [count] of the next problems in the split, all different, and their examples.

    Raises:
      ValueError: count outside 1 to the length of the split.
    """
    size = len(self._split)
    if not 1 <= count <= size:
      raise ValueError(
        f"count is {count}; want 1 to {size}, the examples of {self._split.name}. Choose fewer problems, or load more."
      )
    most = min(self._options.max_skipped * count, size)
    chosen: dict[int, None] = {}  # dicts without values: ordered sets
    passed: dict[int, None] = {}
    skipped = retried = 0
    while len(chosen) < count and (skipped < most or len(chosen) + len(passed) < count):
      index = int(self._stream[self._position])
      outside = self._recorded_at[index] != _UNSEEN and self._distance(index) > 0
      due = self._position - self._recorded_at[index] >= self._retry
      self._position += 1
      if index in chosen or (outside and not due):
        skipped += 1
        if index not in chosen:
          passed[index] = None
      else:
        retried += bool(outside)
        passed.pop(index, None)
        chosen[index] = None
    nearest = sorted(passed, key=self._distance)[: count - len(chosen)]  # stable: ties keep the order of the stream
    self._last[:] = skipped, retried, len(nearest)
    indices = np.array([*chosen, *nearest], np.int64)
    return indices, [self._split[int(index)] for index in indices]

  def record(self, indices: Sequence[int] | np.ndarray, success_rates: Sequence[float] | np.ndarray) -> None:
    """Records how often problems were solved.

    Args:
      indices: [N] in the split, as `choose` returned them; a repeated index counts with the mean of its rates.
      success_rates: [N], each in [0, 1].
    Raises:
      ValueError: unequal lengths, an index or a rate out of range.
    """
    indices, rates = np.asarray(indices, np.int64), np.asarray(success_rates, np.float64)
    if indices.ndim != 1 or indices.shape != rates.shape:
      raise ValueError(f"{indices.shape} indices for {rates.shape} success rates; want a rate for each index.")
    if not len(indices):
      return
    if indices.min() < 0 or indices.max() >= len(self._split):
      raise ValueError(f"indices go from {indices.min()} to {indices.max()}; want 0 to {len(self._split) - 1}.")
    if not np.all((rates >= 0) & (rates <= 1)):
      raise ValueError(f"success rates are {rates.tolist()}; want values in [0, 1].")
    rows, inverse = np.unique(indices, return_inverse=True)
    mean = np.bincount(inverse, rates) / np.bincount(inverse)
    epochs = np.maximum(1.0, (self._position - self._recorded_at[rows]) / len(self._split))
    weight = np.where(self._recorded_at[rows] == _UNSEEN, 0.0, self._options.memory**epochs)  # of the old estimate
    self._rate[rows] = weight * self._rate[rows] + (1 - weight) * mean
    self._recorded_at[rows] = self._position

  def metrics(self) -> dict[str, float]:
    """Shares of the split by current estimates, which sum to 1, and counts of the latest `choose`."""
    low, high, seen = self._options.low, self._options.high, self._recorded_at != _UNSEEN
    skipped, retried, filled = self._last.tolist()
    return {
      "curriculum/unseen": float(np.mean(~seen)),
      "curriculum/below": float(np.mean(seen & (self._rate < low))),
      "curriculum/in_band": float(np.mean(seen & (self._rate >= low) & (self._rate <= high))),
      "curriculum/above": float(np.mean(seen & (self._rate > high))),
      "curriculum/skipped": skipped,
      "curriculum/retried": retried,
      "curriculum/filled": filled,
    }

  def state(self) -> dict[str, np.ndarray]:
    """Copies of the arrays that `restore` needs: position [], rate [N], recorded_at [N], last [3]; N examples."""
    return {
      "position": np.array(self._position, np.int64),
      "rate": self._rate.copy(),
      "recorded_at": self._recorded_at.copy(),
      "last": self._last.copy(),
    }

  def restore(self, state: Mapping[str, np.ndarray]) -> None:
    """Continues where a curriculum with the same arguments was when `state` was taken.

    Raises:
      ValueError: the state is of another split, or incomplete.
    """
    own = self.state()
    shapes = {name: np.shape(state[name]) for name in own if name in state}
    expected = {name: value.shape for name, value in own.items()}
    if shapes != expected:
      raise ValueError(
        f"the state has {shapes}, but a curriculum over {self._split.name} has {expected}; it is of another data set. "
        "Restore it with the data set that it was taken from, or start from scratch."
      )
    self._position = int(state["position"])
    self._rate = np.array(state["rate"], np.float64)
    self._recorded_at = np.array(state["recorded_at"], np.int64)
    self._last = np.array(state["last"], np.int64)

  def _distance(self, index: int) -> float:
    """Distance of an estimate from the band; 0 inside."""
    return max(self._options.low - self._rate[index], self._rate[index] - self._options.high, 0.0)
