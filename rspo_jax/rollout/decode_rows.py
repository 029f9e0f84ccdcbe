"""A fixed set of rows that are decoded together and filled anew one by one, the device side of continuous batching.

`rspo_jax.rollout.continuous` decides who comes when. All functions are pure and keep every shape fixed, so that each
is one program.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rspo_jax.rollout.sampling import SamplingOptions, experts_by_slot, experts_probe, row_keys, sample_tokens
from rspo_jax.router.trace import index_dtype
from rspo_jax.types import Array, Cache, Params, Policy


class PrefilledPrompts(NamedTuple):
  """Prompts that are read and wait for a row.

  Attributes:
    hidden: [P, D], of the last token. cache: filled to its last slot.
    experts: [P, Tp + 1, L, K] by slot, the last one that of the first new token; () unless they are recorded.
  """

  hidden: Array
  cache: Cache
  experts: Any


class Partial(NamedTuple):
  """Completions that go on where an earlier policy, or an earlier call, left them.

  Attributes:
    length: [n] int32, tokens drawn. tokens [n, N] int32, sampler_log_prob, log_prob [n, N] float32 and experts
      [n, N, L, K] (() unless they are recorded): the completion so far.
  """

  length: Array
  tokens: Array
  sampler_log_prob: Array
  log_prob: Array
  experts: Any = ()


class DecodeRows(NamedTuple):
  """B rows in the middle of their completions.

  Attributes:
    cache: of all rows. token: [B] int32, drawn last.
    running: [B] bool; a row that is not is through, or was never filled.
    length: [B] int32, tokens drawn. limit: [B] int32, most that a row may draw. number: [B] int32, of the completion
      in the whole batch; its random keys follow from it.
    tokens [B, N] int32, sampler_log_prob, log_prob [B, N] float32: the completion so far.
    experts: [B, N, L, K], of every token; () unless they are recorded.
  """

  cache: Cache
  token: Array
  running: Array
  length: Array
  limit: Array
  number: Array
  tokens: Array
  sampler_log_prob: Array
  log_prob: Array
  experts: Any


def init_rows(policy: Policy, options: SamplingOptions, rows: int, slots: int) -> DecodeRows:
  """Rows that nobody has filled, with a cache of so many slots: the longest prompt and max_new_tokens."""
  new = options.max_new_tokens
  of_row, of_token = jnp.zeros((rows,), jnp.int32), jnp.zeros((rows, new))
  kept = (rows, new, policy.num_moe_layers, policy.experts_per_token)
  return DecodeRows(
    cache=policy.init_cache(rows, slots),
    token=of_row,
    running=jnp.zeros((rows,), bool),
    length=of_row,
    limit=of_row,
    number=of_row,
    tokens=jnp.zeros((rows, new), jnp.int32),
    sampler_log_prob=of_token,
    log_prob=of_token,
    experts=jnp.zeros(kept, index_dtype(policy.num_experts)) if options.record_experts else (),
  )


def prefill_prompts(
  policy: Policy, options: SamplingOptions, weights: Params, tokens: Array, valid: Array
) -> PrefilledPrompts:
  """Prefills prompts [P, Tp], left-padded. weights: `Policy.for_decode`'s."""
  cache = policy.init_cache(*tokens.shape)
  hidden, experts, cache = policy.prefill(weights, tokens, valid, cache, probe=experts_probe(options))
  return PrefilledPrompts(hidden[:, -1], cache, experts_by_slot(experts))


def fill(
  policy: Policy,
  options: SamplingOptions,
  weights: Params,
  key: Array,
  slots: DecodeRows,
  prompts: PrefilledPrompts,
  rows: Array,
  sources: Array,
  numbers: Array,
  limits: Array,
  begun: Partial | None = None,
) -> DecodeRows:
  """Gives rows to n completions: rows[i] takes prompt sources[i], is number numbers[i], and draws its next token.

  A row beyond the batch (rows[i] = B) leaves that place of the call unused.

  Args:
    begun: what is drawn of them already; the prompts then end with those tokens. None: nothing is.
  """
  keys = row_keys(key, numbers)
  done = jnp.zeros_like(rows) if begun is None else begun.length
  tokens, drawn, raw = sample_tokens(policy, options, weights, prompts.hidden[sources], keys, done)

  def put(old: Array, new: Array) -> Array:
    return old.at[rows].set(new, mode="drop")

  def record(old: Array, new: Array, before: Array | None) -> Array:
    """A row's record is what was drawn before, and one entry more."""
    kept = jnp.zeros((rows.size, *old.shape[1:]), old.dtype) if before is None else before
    return put(old, kept.at[jnp.arange(rows.size), done].set(new.astype(old.dtype)))

  before = Partial(*[None] * 5) if begun is None else begun
  experts = slots.experts
  if options.record_experts:
    experts = record(experts, prompts.experts[sources, -1], before.experts)
  goes_on = ~_stops(options, tokens) & (limits > done + 1)
  return DecodeRows(
    cache=policy.insert(slots.cache, rows, prompts.cache, sources),
    token=put(slots.token, tokens),
    running=put(slots.running, goes_on),
    length=put(slots.length, done + 1),
    limit=put(slots.limit, limits),
    number=put(slots.number, numbers),
    tokens=record(slots.tokens, tokens, before.tokens),
    sampler_log_prob=record(slots.sampler_log_prob, drawn, before.sampler_log_prob),
    log_prob=record(slots.log_prob, raw, before.log_prob),
    experts=experts,
  )


def decode(
  policy: Policy, options: SamplingOptions, weights: Params, key: Array, slots: DecodeRows, steps: Array, least: Array
) -> DecodeRows:
  """Decodes until fewer than `least` rows run, at most `steps` tokens a row; both [] int32."""
  look, keys = experts_probe(options), row_keys(key, slots.number)

  def body(carry):
    step, slots = carry
    hidden, experts, cache = policy.decode(weights, slots.token, slots.running, slots.cache, probe=look)
    token, drawn, raw = sample_tokens(policy, options, weights, hidden, keys, slots.length)
    # A row that does not run writes beyond its record, which drops it.
    at = jnp.where(slots.running, slots.length, options.max_new_tokens)
    row = jnp.arange(at.size)

    def put(old: Array, new: Array) -> Array:
      return old.at[row, at].set(new.astype(old.dtype), mode="drop")

    length = slots.length + slots.running
    return step + 1, DecodeRows(
      cache=cache,
      token=token,
      running=slots.running & ~_stops(options, token) & (length < slots.limit),
      length=length,
      limit=slots.limit,
      number=slots.number,
      tokens=put(slots.tokens, token),
      sampler_log_prob=put(slots.sampler_log_prob, drawn),
      log_prob=put(slots.log_prob, raw),
      experts=jax.tree.map(lambda old, new: put(old, jnp.moveaxis(new, 0, 1)), slots.experts, experts),
    )

  def more(carry):
    step, slots = carry
    return (step < steps) & (jnp.sum(slots.running) >= least)

  return jax.lax.while_loop(more, body, (jnp.int32(0), slots))[1]


def compact(slots: DecodeRows, sources: Array, live: Array) -> DecodeRows:
  """Another number of rows: row i is what row sources[i] was, or empty where live[i] is False; both [B']."""
  moved = jax.tree.map(lambda leaf: leaf[sources] if leaf.ndim else leaf, slots)
  return moved._replace(running=moved.running & live)


def _stops(options: SamplingOptions, tokens: Array) -> Array:
  return jnp.isin(tokens, jnp.asarray(options.stop_ids, jnp.int32))
