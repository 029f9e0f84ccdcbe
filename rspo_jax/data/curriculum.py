"""Which problems to sample next, by how often the policy solves them.

A problem that is always or never solved teaches a group objective nothing: the expected improvement is bounded from
below by the variance of the success, p (1 - p), which is largest at p = 1/2. So problems whose success rate lies
outside a band are passed over for a while.

Source: online difficulty filtering, arXiv 2504.03380. There problems are filtered after they have been sampled, as with
dynamic sampling; here by what earlier samples said, which costs no completions.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from rspo_jax.data.examples import Example, Split, index_stream

_UNSEEN = -1


class Curriculum:
  """Walks a split in the order that training would without it, and passes over problems outside the band.

  An epoch is a pass of the walk over as many examples as the split has, passed over or not. What has not been sampled
  yet is always taken. Whoever trains says how often a problem was solved (`record`). That estimate ages, so that old
  news does not keep a problem out: after e epochs, one at least, it counts memory ** e in the new estimate, and a
  problem outside the band is tried again after `retry_epochs`. Where too few are inside, a batch is filled up with
  those nearest to the band. Of a mixture, what is inside decides how far the batches keep to the weights.

  Everything follows from the arguments and from what was recorded, so processes that record the same choose the same.
  """

  def __init__(
    self,
    split: Split,
    *,
    low: float,
    high: float,
    seed: int,
    memory: float = 0.5,
    retry_epochs: int = 4,
    max_skipped: int = 64,
  ):
    """Begins with everything unseen.

    Args:
      low, high: the band of success rates, ends included, 0 <= low <= high <= 1.
      seed: of the walk, as for `data.batches`.
      memory: what an estimate keeps of its weight per epoch, in [0, 1). 0 believes the latest samples alone.
      retry_epochs: epochs after which a problem outside the band is tried again, 1 or more.
      max_skipped: examples passed over for each one wanted, at most, before a batch is filled up; 0 or more. Never more
        than an epoch of them.
    Raises:
      ValueError: an argument out of range.
    """
    if not 0.0 <= low <= high <= 1.0:
      raise ValueError(f"low is {low} and high is {high}; want 0 <= low <= high <= 1.")
    if not 0.0 <= memory < 1.0:
      raise ValueError(f"memory is {memory}; want a value in [0, 1).")
    if retry_epochs < 1 or max_skipped < 0:
      raise ValueError(
        f"retry_epochs is {retry_epochs} and max_skipped is {max_skipped}; want 1 or more, and 0 or more."
      )
    self._split, self._walk = split, index_stream(split, seed)
    self._low, self._high, self._memory, self._retry = low, high, memory, retry_epochs * len(split)
    self._max_skipped = max_skipped
    self._position = 0  # of the walk
    self._rate = np.zeros(len(split), np.float64)
    self._recorded_at = np.full(len(split), _UNSEEN, np.int64)  # position of the walk when it was last recorded
    self._last = np.zeros(3, np.int64)  # of the last choice: passed over, tried again, filled up

  def choose(self, count: int) -> tuple[np.ndarray, list[Example]]:
    """The next `count` examples, no two the same, and their indices [count] in the split.

    Raises:
      ValueError: count is not in 1 to the length of the split.
    """
    if not 1 <= count <= len(self._split):
      raise ValueError(
        f"{count} problems are wanted at once of {self._split.name}, which has {len(self._split)}; want 1 to that many."
      )
    most = min(self._max_skipped * count, len(self._split))
    chosen: dict[int, None] = {}
    passed: dict[int, None] = {}
    skipped = retried = 0
    while len(chosen) < count and (skipped < most or len(chosen) + len(passed) < count):
      index = int(self._walk[self._position])
      again = self._recorded_at[index] != _UNSEEN and self._outside(index) > 0
      due = self._position - self._recorded_at[index] >= self._retry
      self._position += 1
      if index in chosen or (again and not due):
        skipped += 1
        if index not in chosen:
          passed[index] = None
      else:
        retried += bool(again)
        passed.pop(index, None)
        chosen[index] = None
    nearest = sorted(passed, key=self._outside)[: count - len(chosen)]  # stable: of equals the first met
    self._last[:] = skipped, retried, len(nearest)
    indices = np.array([*chosen, *nearest], np.int64)
    return indices, [self._split[int(index)] for index in indices]

  def record(self, indices: Sequence[int] | np.ndarray, success_rates: Sequence[float] | np.ndarray) -> None:
    """Says how often problems were solved.

    Args:
      indices: [N] in the split, as `choose` gave them; one that stands there twice counts with its mean.
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
    rows, place = np.unique(indices, return_inverse=True)
    mean = np.bincount(place, rates) / np.bincount(place)
    epochs = np.maximum(1.0, (self._position - self._recorded_at[rows]) / len(self._split))
    kept = np.where(self._recorded_at[rows] == _UNSEEN, 0.0, self._memory**epochs)
    self._rate[rows] = kept * self._rate[rows] + (1 - kept) * mean
    self._recorded_at[rows] = self._position

  def metrics(self) -> dict[str, float]:
    """Shares of the split by their present estimates, which sum to 1, and what the last `choose` met."""
    seen = self._recorded_at != _UNSEEN
    skipped, retried, filled = self._last.tolist()
    return {
      "curriculum/unseen": float(np.mean(~seen)),
      "curriculum/below": float(np.mean(seen & (self._rate < self._low))),
      "curriculum/in_band": float(np.mean(seen & (self._rate >= self._low) & (self._rate <= self._high))),
      "curriculum/above": float(np.mean(seen & (self._rate > self._high))),
      "curriculum/skipped": skipped,
      "curriculum/retried": retried,
      "curriculum/filled": filled,
    }

  def state(self) -> dict[str, np.ndarray]:
    """All that `restore` needs: position [], rate [N], recorded_at [N], last [3]; copies."""
    return {
      "position": np.array(self._position, np.int64),
      "rate": self._rate.copy(),
      "recorded_at": self._recorded_at.copy(),
      "last": self._last.copy(),
    }

  def restore(self, state: Mapping[str, np.ndarray]) -> None:
    """Goes on where a curriculum with the same arguments was when `state` was taken.

    Raises:
      ValueError: the state is of another split, or something is missing.
    """
    own = self.state()
    shapes = {name: np.shape(state[name]) for name in own if name in state}
    wanted = {name: value.shape for name, value in own.items()}
    if shapes != wanted:
      raise ValueError(
        f"the state has {shapes}, but a curriculum over {self._split.name} has {wanted}; it is of another data set. "
        "Restore it with the one it was made with, or begin anew."
      )
    self._position = int(state["position"])
    self._rate = np.array(state["rate"], np.float64)
    self._recorded_at = np.array(state["recorded_at"], np.int64)
    self._last = np.array(state["last"], np.int64)

  def _outside(self, index: int) -> float:
    """How far an estimate lies from the band; 0 inside."""
    return max(self._low - self._rate[index], self._rate[index] - self._high, 0.0)
