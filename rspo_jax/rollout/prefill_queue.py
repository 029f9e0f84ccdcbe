"""TODO."""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from rspo_jax import mesh
from rspo_jax.rollout.completions import Completion
from rspo_jax.rollout.decode_rows import PrefilledPrompts


class _Place(NamedTuple):
  """A completion that waits for a row, and where its prompt stands: row `source` of `prompts`."""

  completion: Completion
  source: int
  prompts: PrefilledPrompts


class _Queue:
  """Completions that have no row yet: begun ones first, then shorter prompts first.

  Completions with the same prompt, and the same tokens drawn, share one reading of it, which happens when the first of
  them is to get a row.

  Args:
    read: (tokens [P, length], valid) -> `slots.PrefilledPrompts`. at_once: P.
    buckets: lengths of prompts; continued: of prompts with what is drawn of them.
    record_experts: keep the experts of prompts, for `experts_of`.
  """

  def __init__(
    self,
    read: Callable[[np.ndarray, np.ndarray], PrefilledPrompts],
    at_once: int,
    buckets: Sequence[int],
    continued: Sequence[int],
    record_experts: bool,
  ):
    self._read, self._at_once, self._buckets, self._continued = read, at_once, buckets, continued
    self._record_experts = record_experts
    self._unread: deque[tuple[int, list[list[Completion]]]] = deque()  # length, completions by prompt
    self._places: deque[_Place] = deque()
    self._experts: dict[bytes, np.ndarray] = {}

  def __bool__(self) -> bool:
    return bool(self._unread or self._places)

  def add(self, completions: Iterable[Completion]) -> None:
    """ValueError for a completion that is longer than the sampler was made for."""
    by_length: dict[tuple[bool, int], dict[tuple[bytes, bytes], list[Completion]]] = {}
    for completion in completions:
      fresh = not len(completion.tokens)
      prompts = by_length.setdefault((fresh, self._padded(completion, fresh)), {})
      prompts.setdefault((completion.prompt.tobytes(), completion.tokens.tobytes()), []).append(completion)
    for fresh, length in sorted(by_length):
      prompts = list(by_length[fresh, length].values())
      for start in range(0, len(prompts), self._at_once):
        self._unread.append((length, prompts[start : start + self._at_once]))

  def _padded(self, completion: Completion, fresh: bool) -> int:
    length = len(completion.prompt) + len(completion.tokens)
    fitting = [bucket for bucket in (self._buckets if fresh else self._continued) if bucket >= length]
    if not fitting:
      raise ValueError(
        f"completion {completion.number} has {len(completion.prompt)} prompt tokens and {len(completion.tokens)} "
        f"drawn; want at most {self._buckets[-1]} prompt tokens, and resume=True for completions that are begun."
      )
    return fitting[0]

  def take(self, most: int) -> list[_Place]:
    """1 to `most` completions of one batch of prompts. Only where some wait."""
    if not self._places:
      self._read_next()
    return [self._places.popleft() for _ in range(min(most, len(self._places)))]

  def _read_next(self) -> None:
    length, batch = self._unread.popleft()
    tokens = np.zeros((self._at_once, length), np.int32)
    valid = np.zeros(tokens.shape, bool)
    for row in range(self._at_once):
      first = batch[row % len(batch)][0]
      context = np.concatenate([first.prompt, first.tokens])
      tokens[row, length - len(context) :], valid[row, length - len(context) :] = context, True
    prompts = self._read(tokens, valid)
    by_slot = mesh.fetch(prompts.experts) if self._record_experts else None
    for source, members in enumerate(batch):
      prompt, fresh = members[0].prompt, not len(members[0].tokens)
      if by_slot is not None and fresh:
        self._experts[prompt.tobytes()] = by_slot[source, length - len(prompt) : length]
      self._places.extend(_Place(completion, source, prompts) for completion in members)

  def experts_of(self, completion: Completion) -> np.ndarray:
    """[p, L, K], of the prompt of a completion that began here."""
    return self._experts[completion.prompt.tobytes()]
