"""The queue of continuous batching: completions without a row, and prompts that are prefilled in batches."""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from rspo_jax import mesh
from rspo_jax.rollout.completions import Completion
from rspo_jax.rollout.decode_rows import PrefilledPrompts
from rspo_jax.tokenization.basic import pad_left


class Queued(NamedTuple):
  """A completion that is ready for a row; its prompt is row `source` of `prompts`."""

  completion: Completion
  source: int
  prompts: PrefilledPrompts


class PrefillQueue:
  """Completions that have no row yet: partial ones first, then shorter prompts first.

  Completions with the same prompt and the same sampled tokens share one prefill, which runs when the first of them gets
  a row.

  Args:
    prefill: (tokens [P, length], valid) -> `PrefilledPrompts`. batch_size: P.
    buckets: lengths that prompts are padded to; resume_buckets: likewise for prompts with the tokens sampled so far.
    record_experts: keep the experts of prompts, for `prompt_experts`.
  """

  def __init__(
    self,
    prefill: Callable[[np.ndarray, np.ndarray], PrefilledPrompts],
    batch_size: int,
    buckets: Sequence[int],
    resume_buckets: Sequence[int],
    record_experts: bool,
  ):
    self._prefill, self._batch_size, self._buckets, self._resume_buckets = prefill, batch_size, buckets, resume_buckets
    self._record_experts = record_experts
    self._batches: deque[tuple[int, list[list[Completion]]]] = deque()  # length, completions by prompt
    self._ready: deque[Queued] = deque()
    self._experts: dict[bytes, np.ndarray] = {}

  def __bool__(self) -> bool:
    return bool(self._batches or self._ready)

  def add(self, completions: Iterable[Completion]) -> None:
    """ValueError for a completion that is longer than the sampler's shapes."""
    by_length: dict[tuple[bool, int], dict[tuple[bytes, bytes], list[Completion]]] = {}
    for completion in completions:
      is_new = not len(completion.tokens)
      prompts = by_length.setdefault((is_new, self._padded_length(completion, is_new)), {})
      prompts.setdefault((completion.prompt.tobytes(), completion.tokens.tobytes()), []).append(completion)
    for is_new, length in sorted(by_length):
      prompts = list(by_length[is_new, length].values())
      for start in range(0, len(prompts), self._batch_size):
        self._batches.append((length, prompts[start : start + self._batch_size]))

  def _padded_length(self, completion: Completion, is_new: bool) -> int:
    length = len(completion.prompt) + len(completion.tokens)
    fitting = [bucket for bucket in (self._buckets if is_new else self._resume_buckets) if bucket >= length]
    if not fitting:
      raise ValueError(
        f"completion {completion.number} has {len(completion.prompt)} prompt tokens and {len(completion.tokens)} "
        f"sampled ones; want at most {self._buckets[-1]} prompt tokens, and resume=True for partial completions."
      )
    return fitting[0]

  def take(self, most: int) -> list[Queued]:
    """1 to `most` completions from one batch of prompts. The queue must not be empty."""
    if not self._ready:
      self._prefill_next()
    return [self._ready.popleft() for _ in range(min(most, len(self._ready)))]

  def _prefill_next(self) -> None:
    length, batch = self._batches.popleft()
    contexts = [group[0].context for group in batch]
    contexts += [contexts[row % len(batch)] for row in range(self._batch_size - len(batch))]
    prompts = self._prefill(*pad_left(contexts, length))
    by_slot = mesh.fetch(prompts.experts) if self._record_experts else None
    for source, group in enumerate(batch):
      prompt, is_new = group[0].prompt, not len(group[0].tokens)
      if by_slot is not None and is_new:
        self._experts[prompt.tobytes()] = by_slot[source, length - len(prompt) : length]
      self._ready.extend(Queued(completion, source, prompts) for completion in group)

  def prompt_experts(self, completion: Completion) -> np.ndarray:
    """[p, L, K], of the prompt of a completion that started in this queue."""
    return self._experts[completion.prompt.tobytes()]
