"""Continuous batching: a finished row is refilled with the next queued prompt.

So short completions do not wait for long ones.

The rows are decoded together until some of them are done; then the host collects those and refills the rows. When the
queue is empty, the last rows are compacted into fewer, since a step reads the cache of every row. A completion depends
on
its key, its number and its prompt alone: it is the one that `rspo_jax.rollout.sampling.sample` gives.
"""

import functools
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rspo_jax import mesh
from rspo_jax.rollout import decode_rows
from rspo_jax.rollout.cacheless import with_cache
from rspo_jax.rollout.completions import Completion
from rspo_jax.rollout.decode_rows import DecodeRows, Partial, PrefilledPrompts
from rspo_jax.rollout.prefill_queue import PrefillQueue
from rspo_jax.rollout.token_sampling import SamplingOptions
from rspo_jax.types import Layout, Params, Policy, Program


class ContinuousSampler:
  """Samples completions with a fixed number of rows (`rspo_jax.rollout.samplers.Sampler`).

  Args:
    policy, options: as for `sample`.
    rows: decoded together, B. prompt_length: of the longest prompt, Tp.
    refill: rows that have to be done before the host collects them, 1 to rows; by default an eighth of the rows.
    prefill_batch: prompts prefilled by one program; by default as many as fill the rows that are refilled.
    buckets: lengths that prompts are padded to, the last one prompt_length; one program each. By default a quarter, a
      half and the whole of it.
    resume: partial completions may come; two more lengths, for a prompt with the tokens sampled so far.
    shrink: divisor of the number of rows at the end, applied twice as rows are done; one program for each number. 1
      keeps all rows.
    layout: the mesh; rows and prefill_batch are multiples of its batch shards.

  Attributes:
    cache_bytes: memory of the key/value cache, over all devices.
    programs: what will be compiled.
  Raises:
    ValueError: sizes that do not fit each other, the mesh, or the memory that is left.
  """

  prompts_per_call = 1

  def __init__(
    self,
    policy: Policy,
    options: SamplingOptions,
    *,
    rows: int,
    prompt_length: int,
    refill: int | None = None,
    prefill_batch: int | None = None,
    buckets: Sequence[int] | None = None,
    resume: bool = False,
    shrink: int = 4,
    layout: Layout | None = None,
  ):
    policy, shards = with_cache(policy), layout.batch_shards if layout else 1
    self.options, self._rows, self._length, self._layout = options, rows, prompt_length, layout
    self._refill = refill or max(1, rows // 8)
    wanted = prefill_batch or max(1, self._refill // options.samples_per_prompt)
    self._prefill_batch = -(-wanted // shards) * shards
    self._buckets = tuple(buckets or sorted({-(-prompt_length // 4), -(-prompt_length // 2), prompt_length}))
    if rows < 1 or rows % shards or not 1 <= self._refill <= rows or shrink < 1:
      raise ValueError(
        f"rows is {rows}, refill {self._refill} and shrink {shrink}; want rows in multiples of {shards}, refill up to "
        "rows, and shrink 1 or more."
      )
    if self._buckets[-1] != prompt_length or list(self._buckets) != sorted(set(self._buckets)) or self._buckets[0] < 1:
      raise ValueError(f"buckets are {self._buckets}; want rising lengths, the last one {prompt_length}.")
    new, size = options.max_new_tokens, prompt_length + options.max_new_tokens
    self._resume_buckets = tuple(sorted({prompt_length + -(-new // 2), size})) if resume else ()
    self._sizes = [rows]
    while (
      shrink > 1
      and len(self._sizes) < 3
      and (fewer := -(-self._sizes[-1] // (shrink * shards)) * shards) < self._sizes[-1]
    ):
      self._sizes.append(fewer)
    bind = functools.partial
    self._lay_out = jax.jit(lambda params: policy.for_decode(params, size))
    self._empty = lambda rows: decode_rows.init_rows(policy, options, policy.init_cache(rows, size), rows)
    self._start = jax.jit(bind(self._empty, rows), out_shardings=self._shardings(rows))
    self._compact = {count: jax.jit(decode_rows.compact, out_shardings=self._shardings(count)) for count in self._sizes}
    self._prefill = jax.jit(bind(decode_rows.prefill_prompts, policy, options))
    # Fixed output shardings: each program then sees its own rows again, and is compiled once.
    stable = {"donate_argnums": 2, "out_shardings": self._shardings(rows)}
    self._insert = jax.jit(bind(decode_rows.insert, policy, options), **stable)
    self._decode = jax.jit(bind(decode_rows.decode, policy, options), **stable)
    self._take = jax.jit(lambda kept, rows: jax.tree.map(lambda leaf: leaf[rows], kept))
    cache = jax.eval_shape(bind(policy.init_cache, rows, size))
    self.cache_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    _check_memory(self.cache_bytes, rows, layout)
    self.programs = self._list_programs(policy)

  def _list_programs(self, policy: Policy) -> tuple[Program, ...]:
    size = self._length + self.options.max_new_tokens
    weights = jax.eval_shape(self._lay_out, mesh.abstract_params(policy, self._layout))
    key = jax.eval_shape(jax.random.key, 0)
    scalar, refill = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((self._refill,), jnp.int32)
    states = {count: self._abstract_rows(count) for count in self._sizes}
    prefills, inserts = [], []
    for length in (*self._buckets, *self._resume_buckets):
      shape = (self._prefill_batch, length)
      batch = mesh.abstract_batch(
        (jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, bool)), self._layout
      )
      prefills.append(
        Program(f"prefill {self._prefill_batch} prompts of {length} tokens", self._prefill, (weights, *batch))
      )
      partial = None
      if length in self._resume_buckets:
        empty = jax.eval_shape(lambda: self._empty(self._refill))
        partial = Partial(refill, empty.tokens, empty.sampler_log_prob, empty.log_prob, empty.experts)
      prompts = jax.eval_shape(self._prefill, weights, *batch)
      inserts.append(
        Program(
          f"insert {self._refill} of {self._rows} rows after prefills of {length} tokens",
          self._insert,
          (weights, key, states[self._rows], prompts, refill, refill, refill, refill, partial),
        )
      )
    decodes = [
      Program(
        f"decode {count} rows of up to {size} tokens, "
        + (f"cache {self.cache_bytes:,} bytes" if count == self._rows else "at the end"),
        self._decode,
        (weights, key, states[count], scalar, scalar),
      )
      for count in reversed(self._sizes)
    ]
    return (*prefills, *inserts, *decodes)

  def draw(
    self,
    params: Params,
    queue: Iterable[Completion],
    key: jax.Array,
    *,
    version: int = 0,
    on_finished: Callable[[list[Completion]], Sequence[Completion] | None] | None = None,
  ) -> list[Completion]:
    """See `rspo_jax.rollout.samplers.Sampler.draw`; a stop takes effect at the next collection of rows."""
    weights, state = self._lay_out(params), self._start()
    known = {completion.number: completion for completion in queue}
    waiting = PrefillQueue(
      functools.partial(self._prefill_prompts, weights),
      self._prefill_batch,
      self._buckets,
      self._resume_buckets,
      self.options.record_experts,
    )
    waiting.add([completion for completion in known.values() if not completion.done])
    owner = np.full(self._rows, -1)  # the number of the completion in each row, -1 for an empty row
    finished = [completion for completion in known.values() if completion.done]
    while True:
      if on_finished is not None:
        more = on_finished(finished)
        if more is None:
          break
        known |= {completion.number: completion for completion in more}
        waiting.add([completion for completion in more if not completion.done])
      if not waiting and not np.any(owner >= 0):
        break
      if waiting:
        state, owner = self._resize(state, owner, self._rows)
        state = self._refill_rows(weights, key, state, waiting, owner)
      busy = int(np.sum(owner >= 0))
      fewer = 0
      if not waiting:
        state, owner = self._resize(state, owner, min(size for size in self._sizes if size >= busy))
        fewer = max((size for size in self._sizes if size < busy), default=0)
      # With an empty queue and no `on_finished`, the last rows run until they fit into fewer.
      least = max(1, busy - self._refill + 1) if waiting or on_finished is not None else fewer + 1
      state = self._decode(weights, key, state, jnp.int32(self.options.max_new_tokens), jnp.int32(least))
      running = mesh.fetch(state.running)
      done = np.flatnonzero((owner >= 0) & ~running)
      finished = self._collect(state, done, owner, known, waiting, version)
      owner[done] = -1
    self._collect(state, np.flatnonzero(owner >= 0), owner, known, waiting, version)
    return [known[number] for number in sorted(known)]

  def _resize(self, state: DecodeRows, owner: np.ndarray, count: int) -> tuple[DecodeRows, np.ndarray]:
    """The rows in use, compacted into `count` rows."""
    if len(owner) == count:
      return state, owner
    used = np.flatnonzero(owner >= 0)
    sources, active = np.zeros(count, np.int32), np.arange(count) < len(used)
    sources[: len(used)] = used
    return self._compact[count](state, sources, active), np.where(active, owner[sources], -1)

  def _prefill_prompts(self, weights: Params, tokens: np.ndarray, valid: np.ndarray) -> PrefilledPrompts:
    batch = (tokens, valid)
    return self._prefill(weights, *(mesh.put_batch(batch, self._layout) if self._layout else batch))

  def _shardings(self, rows: int) -> Any:
    if self._layout is None:
      return None
    by_rows, everywhere = self._layout.sharding("batch"), self._layout.sharding()
    return jax.tree.map(lambda leaf: by_rows if leaf.ndim else everywhere, jax.eval_shape(lambda: self._empty(rows)))

  def _abstract_rows(self, rows: int) -> DecodeRows:
    shapes, shardings = jax.eval_shape(lambda: self._empty(rows)), self._shardings(rows)
    if shardings is None:
      return shapes
    return jax.tree.map(
      lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes, shardings
    )

  def _refill_rows(
    self, weights: Params, key: jax.Array, state: DecodeRows, waiting: PrefillQueue, owner: np.ndarray
  ) -> DecodeRows:
    """Fills the free rows from the queue, and writes into `owner`; one insert takes prompts of one prefill."""
    free = np.flatnonzero(owner < 0)
    while waiting and len(free):
      taken = waiting.take(min(self._refill, len(free)))
      rows, free = free[: len(taken)], free[len(taken) :]
      completions = [queued.completion for queued in taken]
      owner[rows] = [completion.number for completion in completions]
      limits = [completion.limit for completion in completions]
      call = (rows, [queued.source for queued in taken], owner[rows], limits)
      rows_in, *others = (np.resize(part, self._refill).astype(np.int32) for part in call)
      rows_in[len(taken) :] = self._rows  # beyond the batch: unused
      partial = self._partial(completions)
      state = self._insert(weights, key, state, taken[0].prompts, rows_in, *others, partial)
    return state

  def _partial(self, completions: Sequence[Completion]) -> Partial | None:
    """What has been sampled of them; None if nothing: a batch of prompts holds either new or partial completions."""
    if not len(completions[0].tokens):
      return None

    def padded(parts: Iterable[np.ndarray]) -> np.ndarray:
      parts = list(parts)
      whole = np.zeros((self._refill, self.options.max_new_tokens, *parts[0].shape[1:]), parts[0].dtype)
      for row, part in enumerate(parts):
        whole[row, : len(part)] = part
      return whole

    experts = ()
    if self.options.record_experts:
      experts = padded(c.experts[len(c.prompt) :] for c in completions)
    lengths = np.resize([len(c.tokens) for c in completions], self._refill).astype(np.int32)
    columns = (padded(getattr(c, name) for c in completions) for name in ("tokens", "sampler_log_prob", "log_prob"))
    return Partial(lengths, *columns, experts)

  def _collect(
    self,
    state: DecodeRows,
    rows: np.ndarray,
    owner: np.ndarray,
    known: dict[int, Completion],
    waiting: PrefillQueue,
    version: int,
  ) -> list[Completion]:
    """Reads these rows back into `known`; returns their completions."""
    kept = (state.length, state.tokens, state.sampler_log_prob, state.log_prob, state.experts)
    collected = []
    for start in range(0, len(rows), self._refill):
      part = rows[start : start + self._refill]
      length, tokens, sampler_log_prob, log_prob, experts = mesh.fetch(self._take(kept, np.resize(part, self._refill)))
      for i, row in enumerate(part):
        old, sampled = known[int(owner[row])], slice(0, int(length[i]))
        routed = None
        if self.options.record_experts:
          of_prompt = waiting.prompt_experts(old) if old.experts is None else old.experts[: len(old.prompt)]
          routed = np.concatenate([of_prompt, experts[i, sampled]])
        collected.append(
          old._replace(
            tokens=tokens[i, sampled].copy(),
            sampler_log_prob=sampler_log_prob[i, sampled].copy(),
            log_prob=log_prob[i, sampled].copy(),
            version=np.concatenate([old.version, np.full(length[i] - len(old.version), version, np.int32)]),
            experts=routed,
            finished=bool(np.isin(tokens[i, sampled][-1:], self.options.stop_ids).any()),
          )
        )
    known |= {completion.number: completion for completion in collected}
    return collected


def _check_memory(cache_bytes: int, rows: int, layout: Layout | None) -> None:
  """ValueError if the cache alone exceeds the free memory of the local devices (on a CPU: of the host)."""
  device = jax.local_devices()[0]
  if layout is not None and layout.mesh.devices.flat[0].platform != device.platform:
    return  # compiled for a machine that is not here
  stats = device.memory_stats() or {}
  if "bytes_limit" in stats:
    free = (stats["bytes_limit"] - stats.get("bytes_in_use", 0)) * jax.device_count()
  elif device.platform == "cpu":
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  else:
    return
  if cache_bytes > free:
    raise ValueError(
      f"the key/value cache of {rows} rows takes {cache_bytes:,} bytes and {free:,} are left; decode at most "
      f"{rows * free // cache_bytes} rows together, or shorten prompts and completions."
    )
