"""Completions on the host, each with its own length, and how they become a batch of arrays."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from rspo_jax.types import Rollout


class Completion(NamedTuple):
  """A completion: new, partial, or done.

  Attributes:
    number: its random keys follow from it. prompt: [p] int32. limit: most tokens it may have.
    tokens [m] int32, sampler_log_prob, log_prob [m] float32: sampled so far, as in `Rollout`.
    version: [m] int32, of the policy that sampled each token.
    finished: it ended with a stop token.
    experts: [p + m, L, K], those every token was sampled with; None unless they are recorded.
  """

  number: int
  prompt: np.ndarray
  limit: int
  tokens: np.ndarray
  sampler_log_prob: np.ndarray
  log_prob: np.ndarray
  version: np.ndarray
  finished: bool = False
  experts: np.ndarray | None = None

  @property
  def done(self) -> bool:
    return self.finished or len(self.tokens) >= self.limit

  @property
  def context(self) -> np.ndarray:
    """[p + m] int32, prompt and tokens: what the next token is conditioned on."""
    return np.concatenate([self.prompt, self.tokens])


# Finished completions -> further ones to sample, or None to stop: see `rspo_jax.rollout.samplers.Sampler.draw`.
OnFinished = Callable[[list[Completion]], Sequence[Completion] | None]


def new_completion(number: int, prompt: np.ndarray, limit: int) -> Completion:
  """A completion without tokens."""
  no_ids, no_values = np.zeros(0, np.int32), np.zeros(0, np.float32)
  return Completion(number, np.asarray(prompt, np.int32), limit, no_ids, no_values, no_values, no_ids)


def new_completions(
  prompts: Sequence[np.ndarray], samples: int, *, limits: int | Sequence[int], first: int = 0
) -> list[Completion]:
  """`samples` completions of every prompt, prompt-major, numbered from `first` on.

  Args:
    limits: most tokens of all of them, or of each.
  """
  count = len(prompts) * samples
  limits = np.broadcast_to(limits, count)
  return [new_completion(first + row, prompts[row // samples], int(limits[row])) for row in range(count)]


def to_rollout(
  completions: Sequence[Completion], prompt_length: int, new_slots: int, *, versions: bool = False
) -> Rollout:
  """A batch of numpy arrays, one row each: prompts left-padded to prompt_length, completions padded to new_slots.

  Args:
    versions: fill in `Rollout.version`.
  """
  rows, slots = len(completions), prompt_length + new_slots
  columns = {
    name: np.zeros((rows, slots), dtype)
    for name, dtype in (
      ("tokens", np.int32),
      ("valid", bool),
      ("action_mask", bool),
      ("sampler_log_prob", np.float32),
      ("log_prob", np.float32),
      ("version", np.int32),
    )
  }
  experts = None
  for row, completion in enumerate(completions):
    prompt = slice(prompt_length - len(completion.prompt), prompt_length)
    sampled = slice(prompt_length, prompt_length + len(completion.tokens))
    columns["tokens"][row, prompt] = completion.prompt
    for name in ("tokens", "sampler_log_prob", "log_prob", "version"):
      columns[name][row, sampled] = getattr(completion, name)
    columns["valid"][row, prompt.start : sampled.stop] = True
    columns["action_mask"][row, sampled] = True
    if completion.experts is not None:
      if experts is None:
        experts = np.zeros((rows, slots, *completion.experts.shape[1:]), completion.experts.dtype)
      experts[row, prompt.start : sampled.stop] = completion.experts
  version = columns.pop("version")
  finished = np.array([completion.finished for completion in completions], bool)
  return Rollout(**columns, finished=finished, expert_index=experts, version=version if versions else None)


def from_rollout(rollout: Rollout, queue: Sequence[Completion], version: int) -> list[Completion]:
  """The completions of `queue` after sampling, from the first rows of a batch of numpy arrays."""
  sampled = []
  for row, completion in enumerate(queue):
    actions = np.flatnonzero(rollout.action_mask[row])
    experts = None
    if rollout.expert_index is not None:
      experts = rollout.expert_index[row, np.flatnonzero(rollout.valid[row])]
    sampled.append(
      completion._replace(
        tokens=rollout.tokens[row, actions],
        sampler_log_prob=rollout.sampler_log_prob[row, actions],
        log_prob=rollout.log_prob[row, actions],
        version=np.full(len(actions), version, np.int32),
        finished=bool(rollout.finished[row]),
        experts=experts,
      )
    )
  return sampled


_RAGGED = ("prompt", "tokens", "sampler_log_prob", "log_prob", "version")


def to_arrays(completions: Sequence[Completion]) -> dict[str, np.ndarray]:
  """Completions as a few flat arrays, for a checkpoint; `from_arrays` is the inverse."""
  arrays = {
    "number": np.array([c.number for c in completions], np.int64),
    "limit": np.array([c.limit for c in completions], np.int32),
    "finished": np.array([c.finished for c in completions], bool),
    "prompt_length": np.array([len(c.prompt) for c in completions], np.int32),
    "length": np.array([len(c.tokens) for c in completions], np.int32),
  }
  empty = new_completion(0, np.zeros(0), 0)
  for name in _RAGGED:
    arrays[name] = np.concatenate([getattr(c, name) for c in completions] or [getattr(empty, name)])
  recorded = [c.experts for c in completions if c.experts is not None]
  arrays["recorded"] = np.array([c.experts is not None for c in completions], bool)
  if recorded:
    arrays["experts"] = np.concatenate(recorded)
  return arrays


def from_arrays(arrays: Mapping[str, np.ndarray]) -> list[Completion]:
  """The completions of `to_arrays`."""
  lengths = {name: arrays["length"] for name in _RAGGED} | {"prompt": arrays["prompt_length"]}
  parts = {name: np.split(arrays[name], np.cumsum(lengths[name])[:-1]) for name in _RAGGED}
  recorded = arrays["recorded"]
  experts = iter(())
  if recorded.any():
    rows = (arrays["length"] + arrays["prompt_length"])[recorded]
    experts = iter(np.split(arrays["experts"], np.cumsum(rows)[:-1]))
  return [
    Completion(
      number=int(arrays["number"][i]),
      limit=int(arrays["limit"][i]),
      finished=bool(arrays["finished"][i]),
      experts=next(experts) if recorded[i] else None,
      **{name: parts[name][i] for name in _RAGGED},
    )
    for i in range(len(recorded))
  ]
