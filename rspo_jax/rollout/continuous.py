"""Continuous batching. A row that is through takes the next waiting prompt, so long answers do not idle the others.

The rows are decoded together until some of them are through; then the host collects those and fills the rows anew.
When nobody waits any more, the last rows move together into fewer: a step reads the cache of every row there is. The
draws are those of `rspo_jax.rollout.sampling.sample`: a completion depends on its key, its number and its prompt alone.
"""

import functools
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rspo_jax import mesh
from rspo_jax.rollout.completions import Completion, begin, pack
from rspo_jax.rollout.decode_rows import (
  DecodeRows,
  Partial,
  PrefilledPrompts,
  compact,
  decode,
  fill,
  init_rows,
  prefill_prompts,
)
from rspo_jax.rollout.prefill_queue import _Queue
from rspo_jax.rollout.sampling import SamplingOptions
from rspo_jax.types import Layout, Params, Policy, Rollout

After = Callable[[list[Completion]], Sequence[Completion] | None]


class ContinuousSampler:
  """Draws completions with a fixed number of rows.

  Args:
    policy, options: as for `sample`.
    rows: decoded at once, B. prompt_length: of the longest prompt, Tp.
    refill: rows that have to be through before the host looks, 1 to rows; by default an eighth of the rows.
    prompts_at_once: prompts read by one program; by default as many as fill the rows that are refilled.
    buckets: lengths that prompts are padded to, the last one prompt_length; one program each. By default a quarter, a
      half and the whole of it.
    continues: completions may come that are begun already; two more lengths for a prompt and what is drawn of it.
    shrink: by what the number of rows is divided at the end, twice as rows are through; one program for each number. 1
      keeps all rows.
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
    resume: bool = False,
    shrink: int = 4,
    layout: Layout | None = None,
  ):
    shards = layout.batch_shards if layout else 1
    self._options, self._rows, self._length, self._layout = options, rows, prompt_length, layout
    self._refill = refill or max(1, rows // 8)
    wanted = prompts_at_once or max(1, self._refill // options.samples_per_prompt)
    self._prompts_at_once = -(-wanted // shards) * shards
    self._buckets = tuple(buckets or sorted({-(-prompt_length // 4), -(-prompt_length // 2), prompt_length}))
    if rows < 1 or rows % shards or not 1 <= self._refill <= rows or shrink < 1:
      raise ValueError(
        f"rows is {rows}, refill {self._refill} and shrink {shrink}; want rows in multiples of {shards}, refill up to "
        "rows, and shrink 1 or more."
      )
    if self._buckets[-1] != prompt_length or list(self._buckets) != sorted(set(self._buckets)) or self._buckets[0] < 1:
      raise ValueError(f"buckets are {self._buckets}; want rising lengths, the last one {prompt_length}.")
    new, size = options.max_new_tokens, prompt_length + options.max_new_tokens
    self._continued = tuple(sorted({prompt_length + -(-new // 2), size})) if resume else ()
    self._sizes = [rows]
    while (
      shrink > 1
      and len(self._sizes) < 3
      and (fewer := -(-self._sizes[-1] // (shrink * shards)) * shards) < self._sizes[-1]
    ):
      self._sizes.append(fewer)
    bind = functools.partial
    self._prepare = jax.jit(lambda params: policy.for_decode(params, size))
    self._empty = lambda rows: init_rows(policy, options, rows, size)
    self._start = jax.jit(bind(self._empty, rows), out_shardings=self._shardings(rows))
    self._regroup = {count: jax.jit(compact, out_shardings=self._shardings(count)) for count in self._sizes}
    self._read = jax.jit(bind(prefill_prompts, policy, options))
    self._fill = jax.jit(bind(fill, policy, options), donate_argnums=2)
    self._decode = jax.jit(bind(decode, policy, options), donate_argnums=2)
    self._take = jax.jit(lambda kept, rows: jax.tree.map(lambda leaf: leaf[rows], kept))
    cache = jax.eval_shape(bind(policy.init_cache, rows, size))
    self.cache_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    lengths = (*self._buckets, *self._continued)
    self.programs = (
      *(f"read {self._prompts_at_once} prompts of {length} tokens" for length in lengths),
      f"fill {self._refill} of {rows} rows, one for each of {len(lengths)} lengths",
      *(f"decode {count} rows of up to {size} tokens, at the end" for count in reversed(self._sizes[1:])),
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
    samples, new = self._options.samples_per_prompt, self._options.max_new_tokens
    prompts = [row[chosen] for row, chosen in zip(np.asarray(tokens), np.asarray(valid), strict=True)]
    total = len(prompts) * samples
    limits = np.full(total, new) if limits is None else np.asarray(limits)
    waiting = [begin(first_row + row, prompts[row // samples], int(limits[row])) for row in range(total)]
    done = self.draw(params, waiting, key)
    return pack(done, self._length, new)

  def draw(
    self,
    params: Params,
    waiting: Iterable[Completion],
    key: jax.Array,
    *,
    version: int = 0,
    after: After | None = None,
  ) -> list[Completion]:
    """Draws on until every completion is through, or until `after` has enough.

    Args:
      waiting: completions; those that are through already come back as they are.
      version: of params, written beside every token.
      after: given the completions that came through since its last call (none, when nothing is left to do), returns
        further ones to draw, or None to stop.
    Returns:
      All completions in the order of their numbers. After a stop some are not through, and can be drawn on later.
    """
    weights, state = self._prepare(params), self._start()
    known = {completion.number: completion for completion in waiting}
    queue = _Queue(
      functools.partial(self._read_prompts, weights),
      self._prompts_at_once,
      self._buckets,
      self._continued,
      self._options.record_experts,
    )
    queue.add([completion for completion in known.values() if not completion.done])
    owner = np.full(self._rows, -1)
    news = [completion for completion in known.values() if completion.done]
    while True:
      if after is not None:
        more = after(news)
        if more is None:
          break
        known |= {completion.number: completion for completion in more}
        queue.add(more)
      if not queue and not np.any(owner >= 0):
        break
      if queue:
        state, owner = self._resize(state, owner, self._rows)
        state = self._seat(weights, key, state, queue, owner)
      busy = int(np.sum(owner >= 0))
      fewer = 0
      if not queue:
        state, owner = self._resize(state, owner, min(size for size in self._sizes if size >= busy))
        fewer = max((size for size in self._sizes if size < busy), default=0)
      # Without a word to say in between, the last rows run until they fit into fewer.
      least = max(1, busy - self._refill + 1) if queue or after is not None else fewer + 1
      state = self._decode(weights, key, state, jnp.int32(self._options.max_new_tokens), jnp.int32(least))
      running = mesh.fetch(state.running)
      through = np.flatnonzero((owner >= 0) & ~running)
      news = self._collect(state, through, owner, known, queue, version)
      owner[through] = -1
    self._collect(state, np.flatnonzero(owner >= 0), owner, known, queue, version)
    return [known[number] for number in sorted(known)]

  def _resize(self, state: DecodeRows, owner: np.ndarray, count: int) -> tuple[DecodeRows, np.ndarray]:
    """The rows that are in use, moved into `count` rows."""
    if len(owner) == count:
      return state, owner
    used = np.flatnonzero(owner >= 0)
    sources, live = np.zeros(count, np.int32), np.arange(count) < len(used)
    sources[: len(used)] = used
    return self._regroup[count](state, sources, live), np.where(live, owner[sources], -1)

  def _read_prompts(self, weights: Params, tokens: np.ndarray, valid: np.ndarray) -> PrefilledPrompts:
    return self._read(weights, *(mesh.put_batch((tokens, valid), self._layout) if self._layout else (tokens, valid)))

  def _shardings(self, rows: int) -> Any:
    if self._layout is None:
      return None
    split, everywhere = self._layout.sharding("batch"), self._layout.sharding()
    return jax.tree.map(lambda leaf: split if leaf.ndim else everywhere, jax.eval_shape(lambda: self._empty(rows)))

  def _seat(self, weights: Params, key: jax.Array, state: DecodeRows, queue: "_Queue", owner: np.ndarray):
    """Fills the free rows from the queue; one call fills rows from one batch of prompts."""
    free = np.flatnonzero(owner < 0)
    while queue and len(free):
      seated = queue.take(min(self._refill, len(free)))
      rows, free = free[: len(seated)], free[len(seated) :]
      owner[rows] = [place.completion.number for place in seated]
      limits = [place.completion.limit for place in seated]
      call = (rows, [place.source for place in seated], owner[rows], limits)
      rows_in, *others = (np.resize(part, self._refill).astype(np.int32) for part in call)
      rows_in[len(seated) :] = self._rows
      begun = self._begun([place.completion for place in seated])
      state = self._fill(weights, key, state, seated[0].prompts, rows_in, *others, begun)
    return state

  def _begun(self, completions: Sequence[Completion]) -> Partial | None:
    """What is drawn of them; None if nothing is: a batch of prompts has either kind only."""
    if not len(completions[0].tokens):
      return None

    def padded(parts: Iterable[np.ndarray]) -> np.ndarray:
      parts = list(parts)
      whole = np.zeros((self._refill, self._options.max_new_tokens, *parts[0].shape[1:]), parts[0].dtype)
      for row, part in enumerate(parts):
        whole[row, : len(part)] = part
      return whole

    experts = ()
    if self._options.record_experts:
      experts = padded(c.experts[len(c.prompt) :] for c in completions)
    lengths = np.resize([len(c.tokens) for c in completions], self._refill).astype(np.int32)
    columns = (padded(getattr(c, name) for c in completions) for name in ("tokens", "sampler_log_prob", "log_prob"))
    return Partial(lengths, *columns, experts)

  def _collect(self, state, rows, owner, known: dict[int, Completion], queue: "_Queue", version: int):
    """Takes what these rows hold into `known`; returns their completions."""
    kept = (state.length, state.tokens, state.sampler_log_prob, state.log_prob, state.experts)
    found = []
    for start in range(0, len(rows), self._refill):
      part = rows[start : start + self._refill]
      length, tokens, drawn, raw, experts = mesh.fetch(self._take(kept, np.resize(part, self._refill)))
      for i, row in enumerate(part):
        old, new = known[int(owner[row])], slice(0, int(length[i]))
        version_of = np.concatenate([old.version, np.full(length[i] - len(old.version), version, np.int32)])
        routed = None
        if self._options.record_experts:
          before = queue.experts_of(old) if old.experts is None else old.experts[: len(old.prompt)]
          routed = np.concatenate([before, experts[i, new]])
        ended = bool(np.isin(tokens[i, new][-1:], self._options.stop_ids).any())
        found.append(
          old._replace(
            tokens=tokens[i, new].copy(),
            sampler_log_prob=drawn[i, new].copy(),
            log_prob=raw[i, new].copy(),
            version=version_of,
            experts=routed,
            finished=ended,
          )
        )
    known |= {completion.number: completion for completion in found}
    return found


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
