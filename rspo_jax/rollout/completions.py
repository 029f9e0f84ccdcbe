"""Completions on the host, each with its own length, and how they become a batch."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from rspo_jax.types import Rollout


class Completion(NamedTuple):
  """A completion: not begun, under way, or through.

  Attributes:
    number: its random keys follow from it. prompt: [p] int32. limit: most tokens it may have.
    tokens [m] int32, sampler_log_prob, log_prob [m] float32: what is drawn so far, as `Rollout` has them.
    version: [m] int32, of the policy that drew each token.
    finished: it ended with a stop token.
    experts: [p + m, L, K], which every token was drawn with; None unless they are recorded.
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


def begin(number: int, prompt: np.ndarray, limit: int) -> Completion:
  """A completion of which nothing is drawn."""
  none, nothing = np.zeros(0, np.int32), np.zeros(0, np.float32)
  return Completion(number, np.asarray(prompt, np.int32), limit, none, nothing, nothing, none)


def pack(completions: Sequence[Completion], prompt_length: int, new: int, *, versions: bool = False) -> Rollout:
  """A batch of numpy arrays, a row each, prompts left-padded to prompt_length and completions padded to `new` tokens.

  Args:
    versions: fill in `Rollout.version`.
  """
  rows, slots = len(completions), prompt_length + new
  columns = {
    name: np.zeros((rows, slots), dtype)
    for name, dtype in (("tokens", np.int32), ("valid", bool), ("action_mask", bool), ("version", np.int32))
  } | {name: np.zeros((rows, slots), np.float32) for name in ("sampler_log_prob", "log_prob")}
  experts = None
  for row, completion in enumerate(completions):
    prompt = slice(prompt_length - len(completion.prompt), prompt_length)
    drawn = slice(prompt_length, prompt_length + len(completion.tokens))
    columns["tokens"][row, prompt] = completion.prompt
    for name in ("tokens", "sampler_log_prob", "log_prob", "version"):
      columns[name][row, drawn] = getattr(completion, name)
    columns["valid"][row, prompt.start : drawn.stop] = True
    columns["action_mask"][row, drawn] = True
    if completion.experts is not None:
      if experts is None:
        experts = np.zeros((rows, slots, *completion.experts.shape[1:]), completion.experts.dtype)
      experts[row, prompt.start : drawn.stop] = completion.experts
  return Rollout(
    tokens=columns["tokens"],
    valid=columns["valid"],
    action_mask=columns["action_mask"],
    sampler_log_prob=columns["sampler_log_prob"],
    log_prob=columns["log_prob"],
    finished=np.array([completion.finished for completion in completions], bool),
    expert_index=experts,
    version=columns["version"] if versions else None,
  )


_RAGGED = ("prompt", "tokens", "sampler_log_prob", "log_prob", "version")


def to_arrays(completions: Sequence[Completion]) -> dict[str, np.ndarray]:
  """Completions as a few flat arrays, to be saved; `from_arrays` is its inverse."""
  arrays = {
    "number": np.array([c.number for c in completions], np.int64),
    "limit": np.array([c.limit for c in completions], np.int32),
    "finished": np.array([c.finished for c in completions], bool),
    "prompt_length": np.array([len(c.prompt) for c in completions], np.int32),
    "length": np.array([len(c.tokens) for c in completions], np.int32),
  }
  nothing = begin(0, np.zeros(0), 0)
  for name in _RAGGED:
    parts = [getattr(c, name) for c in completions] or [getattr(nothing, name)]
    arrays[name] = np.concatenate(parts)
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


def unpack(rollout: Rollout, waiting: Sequence[Completion], version: int) -> list[Completion]:
  """What became of completions that were the first rows of a batch; further rows are left out."""
  found = []
  for row, completion in enumerate(waiting):
    drawn = np.flatnonzero(rollout.action_mask[row])
    experts = None
    if rollout.expert_index is not None:
      experts = rollout.expert_index[row, np.flatnonzero(rollout.valid[row])]
    found.append(
      completion._replace(
        tokens=rollout.tokens[row, drawn],
        sampler_log_prob=rollout.sampler_log_prob[row, drawn],
        log_prob=rollout.log_prob[row, drawn],
        version=np.full(len(drawn), version, np.int32),
        finished=bool(rollout.finished[row]),
        experts=experts,
      )
    )
  return found
