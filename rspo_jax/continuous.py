"""F3: continuous batching. A row that is through takes the next waiting prompt, so long answers do not idle the others.

The rows are decoded together until some of them are through; then the host collects those and fills the rows anew. The
draws are those of `rspo_jax.sampling.sample`: a completion depends on its key, its number and its prompt alone.
"""

import functools
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rspo_jax import mesh, slots
from rspo_jax.sampling import SamplingOptions
from rspo_jax.types import Layout, Params, Policy, Rollout


class Waiting(NamedTuple):
  """A completion that has no row yet. number: in the whole batch, from 0; source: row of its prompt in `prompts`."""

  number: int
  source: int
  prompts: slots.Prompts


class ContinuousSampler:
  """Draws completions with a fixed number of rows.

  Args:
    policy, options: as for `sample`.
    rows: decoded at once, B. prompt_length: of the longest prompt, Tp.
    refill: rows that have to be through before the host looks, 1 to rows; by default an eighth of the rows.
    prompts_at_once: prompts read by one program; by default as many as fill the rows that are refilled.
    buckets: lengths that prompts are padded to, the last one prompt_length; one program each. By default a quarter, a
      half and the whole of it.
    layout: the mesh; rows and prompts_at_once are multiples of its batch shards.

  Attributes:
    cache_bytes: memory of the key/value cache, over all devices.
    programs: what will be compiled, a line each.
  Raises:
    ValueError: sizes that do not fit each other, the mesh, or the memory that is left.
  """

  def __init__(
    self,
    policy: Policy,
    options: SamplingOptions,
    *,
    rows: int,
    prompt_length: int,
    refill: int | None = None,
    prompts_at_once: int | None = None,
    buckets: Sequence[int] | None = None,
    layout: Layout | None = None,
  ):
    shards = layout.batch_shards if layout else 1
    self._options, self._rows, self._length, self._layout = options, rows, prompt_length, layout
    self._refill = refill or max(1, rows // 8)
    wanted = prompts_at_once or max(1, self._refill // options.samples_per_prompt)
    self._prompts_at_once = -(-wanted // shards) * shards
    self._buckets = tuple(buckets or sorted({-(-prompt_length // 4), -(-prompt_length // 2), prompt_length}))
    if rows < 1 or rows % shards or not 1 <= self._refill <= rows:
      raise ValueError(
        f"rows is {rows} and refill {self._refill}; want rows in multiples of {shards}, refill up to rows."
      )
    if self._buckets[-1] != prompt_length or list(self._buckets) != sorted(set(self._buckets)) or self._buckets[0] < 1:
      raise ValueError(f"buckets are {self._buckets}; want rising lengths, the last one {prompt_length}.")
    size = prompt_length + options.max_new_tokens
    bind = functools.partial
    self._prepare = jax.jit(lambda params: policy.for_decode(params, size))
    self._empty = bind(slots.empty_slots, policy, options, rows, size)
    self._read = jax.jit(bind(slots.read_prompts, policy, options))
    self._fill = jax.jit(bind(slots.fill, policy, options), donate_argnums=2)
    self._decode = jax.jit(bind(slots.decode, policy, options), donate_argnums=2)
    self._take = jax.jit(lambda kept, rows: jax.tree.map(lambda leaf: leaf[rows], kept))
    cache = jax.eval_shape(bind(policy.init_cache, rows, size))
    self.cache_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    self.programs = (
      *(f"read {self._prompts_at_once} prompts of {length} tokens" for length in self._buckets),
      f"fill {self._refill} of {rows} rows, one for each of {len(self._buckets)} lengths",
      f"decode {rows} rows of up to {size} tokens, cache {self.cache_bytes:,} bytes",
    )
    _check_memory(self.cache_bytes, rows)

  def __call__(
    self,
    params: Params,
    tokens: np.ndarray,
    valid: np.ndarray,
    key: jax.Array,
    *,
    first_row: int = 0,
    limits: np.ndarray | None = None,
  ) -> Rollout:
    """As `sample`, for any number of prompts [P, Tp]; the arrays of the result are numpy's."""
    options, samples = self._options, self._options.samples_per_prompt
    total, new = len(tokens) * samples, options.max_new_tokens
    limits = np.full(total, new, np.int32) if limits is None else np.asarray(limits, np.int32)
    weights, state = self._prepare(params), jax.jit(self._empty, out_shardings=self._shardings())()
    done = _Record(total, new)
    waiting = self._waiting(weights, np.asarray(tokens), np.asarray(valid), done)
    owner = np.full(self._rows, -1)
    upcoming = next(waiting, None)
    while upcoming is not None or np.any(owner >= 0):
      free = np.flatnonzero(owner < 0)
      while upcoming is not None and len(free):
        # One call fills rows from one batch of prompts.
        group, prompts = [], upcoming.prompts
        while upcoming is not None and upcoming.prompts is prompts and len(group) < min(self._refill, len(free)):
          group.append(upcoming)
          upcoming = next(waiting, None)
        rows, free = free[: len(group)], free[len(group) :]
        numbers = np.array([item.number for item in group])
        owner[rows] = numbers
        call = (rows, [item.source for item in group], first_row + numbers, limits[numbers])
        padded = (np.resize(part, self._refill).astype(np.int32) for part in call)
        rows_in, *others = padded
        rows_in[len(group) :] = self._rows
        state = self._fill(weights, key, state, prompts, rows_in, *others)
      busy = int(np.sum(owner >= 0))
      least = max(1, busy - self._refill + 1) if upcoming is not None else 1
      state = self._decode(weights, key, state, jnp.int32(new), jnp.int32(least))
      running = mesh.fetch(state.running)
      through = np.flatnonzero((owner >= 0) & ~running)
      self._collect(state, through, owner[through], done)
      owner[through] = -1
    return done.rollout(np.asarray(tokens), np.asarray(valid), options)

  def _shardings(self) -> Any:
    if self._layout is None:
      return None
    rows, everywhere = self._layout.sharding("batch"), self._layout.sharding()
    return jax.tree.map(lambda leaf: rows if leaf.ndim else everywhere, jax.eval_shape(self._empty))

  def _waiting(self, weights: Params, tokens: np.ndarray, valid: np.ndarray, done: "_Record") -> Iterator[Waiting]:
    """All completions in the order they get a row: shorter prompts first. Prompts are read when they are needed."""
    lengths = valid.sum(axis=1)
    bucket = np.searchsorted(self._buckets, lengths)
    samples = self._options.samples_per_prompt
    for number, length in enumerate(self._buckets):
      members = np.flatnonzero(bucket == number)
      for start in range(0, len(members), self._prompts_at_once):
        part = members[start : start + self._prompts_at_once]
        filled = np.resize(part, self._prompts_at_once)
        batch = tokens[filled, -length:], valid[filled, -length:]
        placed = mesh.put_batch(batch, self._layout) if self._layout else batch
        prompts = self._read(weights, *placed)
        done.keep_prompts(part, prompts, samples, tokens.shape[1])
        for source, prompt in enumerate(part):
          for sample in range(samples):
            yield Waiting(int(prompt) * samples + sample, source, prompts)

  def _collect(self, state: slots.Slots, rows: np.ndarray, numbers: np.ndarray, done: "_Record") -> None:
    kept = (state.length, state.tokens, state.drawn_log_prob, state.log_prob, state.experts)
    for start in range(0, len(rows), self._refill):
      part = rows[start : start + self._refill]
      found = mesh.fetch(self._take(kept, np.resize(part, self._refill)))
      done.keep(numbers[start : start + len(part)], found)


class _Record:
  """The completions that are through, on the host."""

  def __init__(self, total: int, new: int):
    self.length = np.zeros(total, np.int32)
    self.tokens = np.zeros((total, new), np.int32)
    self.drawn_log_prob, self.log_prob = np.zeros((2, total, new), np.float32)
    self.experts: np.ndarray | None = None

  def keep(self, numbers: np.ndarray, found: Any) -> None:
    length, tokens, drawn, raw, experts = jax.tree.map(lambda leaf: leaf[: len(numbers)], found)
    written = np.arange(self.tokens.shape[1]) < length[:, None]
    self.length[numbers] = length
    self.tokens[numbers] = np.where(written, tokens, 0)
    self.drawn_log_prob[numbers], self.log_prob[numbers] = np.where(written, drawn, 0), np.where(written, raw, 0)
    if self.experts is not None:
      self.experts[numbers, -written.shape[1] :] = experts

  def keep_prompts(self, members: np.ndarray, prompts: slots.Prompts, samples: int, length: int) -> None:
    """The experts of prompts, if they are recorded, for all samples of each."""
    for experts in jax.tree.leaves(prompts.experts):
      if self.experts is None:
        shape = (len(self.length), length + self.tokens.shape[1], *experts.shape[2:])
        self.experts = np.zeros(shape, experts.dtype)
      of_prompt = mesh.fetch(experts)[: len(members), :-1]
      for source, prompt in enumerate(members):
        rows = slice(prompt * samples, (prompt + 1) * samples)
        self.experts[rows, length - of_prompt.shape[1] : length] = of_prompt[source]

  def rollout(self, tokens: np.ndarray, valid: np.ndarray, options: SamplingOptions) -> Rollout:
    samples = options.samples_per_prompt
    chosen = np.arange(self.tokens.shape[1]) < self.length[:, None]

    def after_prompt(prompt: np.ndarray, completion: np.ndarray) -> np.ndarray:
      return np.concatenate([np.repeat(prompt, samples, axis=0).astype(completion.dtype), completion], axis=1)

    nothing = np.zeros_like(tokens)
    return Rollout(
      tokens=after_prompt(tokens, self.tokens),
      valid=after_prompt(valid, chosen),
      action_mask=after_prompt(nothing, chosen),
      sampler_log_prob=after_prompt(nothing, self.drawn_log_prob),
      log_prob=after_prompt(nothing, self.log_prob),
      finished=np.any(chosen & np.isin(self.tokens, options.stop_ids), axis=1),
      expert_index=self.experts,
    )


def _check_memory(cache_bytes: int, rows: int) -> None:
  """ValueError if the cache alone does not fit what the local devices (on a CPU: the host) have left."""
  device = jax.local_devices()[0]
  stats = device.memory_stats() or {}
  if "bytes_limit" in stats:
    left = (stats["bytes_limit"] - stats.get("bytes_in_use", 0)) * jax.device_count()
  elif device.platform == "cpu":
    left = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  else:
    return
  if cache_bytes > left:
    raise ValueError(
      f"the key/value cache of {rows} rows takes {cache_bytes:,} bytes and {left:,} are left; decode at most "
      f"{rows * left // cache_bytes} rows at once, or shorten prompts and completions."
    )
