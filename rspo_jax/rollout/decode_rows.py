"""Rows that are decoded together: prefill, insert, decode, compact. The device side of every sampler of ours.

All functions are pure and keep every shape fixed, so that each is one program. `rspo_jax.rollout.sampling` decodes a
whole batch with them, `rspo_jax.rollout.continuous` decides which completion gets which row.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rspo_jax.rollout.token_sampling import SamplingOptions, row_keys, sample_tokens
from rspo_jax.router.trace import index_dtype, record_experts
from rspo_jax.types import Array, Cache, Params, Policy, Probe


class PrefilledPrompts(NamedTuple):
  """Prompts in a cache of their own.

  Attributes:
    hidden: [P, D], of the last token. cache: filled to its last slot.
    experts: [P, Tp + 1, L, K] by slot, the last entry that of the first new token; () unless they are recorded.
  """

  hidden: Array
  cache: Cache
  experts: Any


class Partial(NamedTuple):
  """Completions that continue where an earlier policy, or an earlier call, left them.

  Attributes:
    length: [n] int32, tokens sampled. tokens [n, N] int32, sampler_log_prob, log_prob [n, N] float32 and experts
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
    cache: of all rows. token: [B] int32, sampled last.
    running: [B] bool; False where the row is done or empty.
    length: [B] int32, tokens sampled. limit: [B] int32, most tokens of the row. number: [B] int32, of the completion in
      the whole batch; its random keys follow from it.
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


def experts_probe(options: SamplingOptions) -> Probe:
  """The sampler's probe: the chosen experts if they are recorded, else nothing."""
  return lambda router, probe_inputs: record_experts(router, probe_inputs) if options.record_experts else ()


def init_rows(policy: Policy, options: SamplingOptions, cache: Cache, rows: int) -> DecodeRows:
  """Empty rows over a cache of that many rows."""
  new = options.max_new_tokens
  per_row, per_token = jnp.zeros((rows,), jnp.int32), jnp.zeros((rows, new))
  experts_shape = (rows, new, policy.num_moe_layers, policy.experts_per_token)
  return DecodeRows(
    cache=cache,
    token=per_row,
    running=jnp.zeros((rows,), bool),
    length=per_row,
    limit=per_row,
    number=per_row,
    tokens=jnp.zeros((rows, new), jnp.int32),
    sampler_log_prob=per_token,
    log_prob=per_token,
    experts=jnp.zeros(experts_shape, index_dtype(policy.num_experts)) if options.record_experts else (),
  )


def prefill_prompts(
  policy: Policy, options: SamplingOptions, weights: Params, tokens: Array, valid: Array
) -> PrefilledPrompts:
  """Prefills prompts [P, Tp], left-padded. weights: `Policy.for_decode`'s."""
  cache = policy.init_cache(*tokens.shape)
  hidden, experts, cache = policy.prefill(weights, tokens, valid, cache, probe=experts_probe(options))
  # [L, P, Tp, K] by position -> [P, Tp + 1, L, K] by slot
  by_slot = jax.tree.map(lambda x: jnp.pad(jnp.moveaxis(x, 0, 2), ((0, 0), (1, 0), (0, 0), (0, 0))), experts)
  return PrefilledPrompts(hidden[:, -1], cache, by_slot)


def insert(
  policy: Policy,
  options: SamplingOptions,
  weights: Params,
  key: Array,
  state: DecodeRows,
  prompts: PrefilledPrompts,
  rows: Array,
  sources: Array,
  numbers: Array,
  limits: Array,
  partial: Partial | None = None,
) -> DecodeRows:
  """Gives rows to n completions and samples their next token: rows[i] continues prompt sources[i] as numbers[i].

  A row index beyond the batch (rows[i] = B) leaves that entry of the call unused.

  Args:
    rows, sources, numbers, limits: [n] int32.
    partial: what has been sampled of them already; the prompts then end with those tokens. None: nothing.
  """
  before = Partial(*[None] * 5) if partial is None else partial
  done = jnp.zeros_like(rows) if partial is None else partial.length
  token, sampler_log_prob, log_prob = sample_tokens(
    policy, options, weights, prompts.hidden[sources], row_keys(key, numbers), done
  )

  def put(old: Array, new: Array) -> Array:
    return old.at[rows].set(new, mode="drop")

  def record(old: Array, new: Array, so_far: Array | None) -> Array:
    """What was sampled before, and one entry more."""
    kept = jnp.zeros((rows.size, *old.shape[1:]), old.dtype) if so_far is None else so_far
    return put(old, kept.at[jnp.arange(rows.size), done].set(new.astype(old.dtype)))

  experts = state.experts
  if options.record_experts:
    experts = record(experts, prompts.experts[sources, -1], before.experts)
  return DecodeRows(
    cache=policy.insert(state.cache, rows, prompts.cache, sources),
    token=put(state.token, token),
    running=put(state.running, _continues(options, token, done + 1, limits)),
    length=put(state.length, done + 1),
    limit=put(state.limit, limits),
    number=put(state.number, numbers),
    tokens=record(state.tokens, token, before.tokens),
    sampler_log_prob=record(state.sampler_log_prob, sampler_log_prob, before.sampler_log_prob),
    log_prob=record(state.log_prob, log_prob, before.log_prob),
    experts=experts,
  )


def start_rows(
  policy: Policy,
  options: SamplingOptions,
  weights: Params,
  key: Array,
  prompts: PrefilledPrompts,
  numbers: Array,
  limits: Array,
) -> DecodeRows:
  """`insert` for a whole new batch: G = B / P rows of every prompt, which take over the cache of the prompts.

  Args:
    numbers, limits: [B] int32, prompt-major.
  """
  samples = numbers.size // prompts.hidden.shape[0]
  hidden, cache, experts = jax.tree.map(
    lambda leaf: jnp.repeat(leaf, samples, axis=0) if leaf.ndim else leaf, tuple(prompts)
  )
  token, *log_probs = sample_tokens(policy, options, weights, hidden, row_keys(key, numbers), 0)
  state = init_rows(policy, options, cache, numbers.size)

  def first(old: Array, new: Array) -> Array:
    return old.at[:, 0].set(new.astype(old.dtype))

  length = jnp.ones_like(numbers)
  return DecodeRows(
    cache,
    token,
    _continues(options, token, length, limits),
    length,
    limits,
    numbers,
    first(state.tokens, token),
    *map(first, (state.sampler_log_prob, state.log_prob), log_probs),
    jax.tree.map(lambda old, new: first(old, new[:, -1]), state.experts, experts),
  )


def decode(
  policy: Policy,
  options: SamplingOptions,
  weights: Params,
  key: Array,
  state: DecodeRows,
  steps: Array | int,
  least: Array | int | None,
) -> DecodeRows:
  """Decodes until fewer than `least` rows run, at most `steps` tokens a row.

  Args:
    steps, least: [] int32. A `least` of None skips the check, which costs an all-reduce per token: for rows that cannot
      stop early.
  """
  probe, keys = experts_probe(options), row_keys(key, state.number)

  def body(carry):
    step, state = carry
    hidden, experts, cache = policy.decode(weights, state.token, state.running, state.cache, probe=probe)
    token, sampler_log_prob, log_prob = sample_tokens(policy, options, weights, hidden, keys, state.length)
    # A row that does not run writes beyond its record, where the write is dropped.
    position = jnp.where(state.running, state.length, options.max_new_tokens)

    def put(old: Array, new: Array) -> Array:
      """Batched over rows, so that a mesh that splits the rows moves nothing."""
      return jax.vmap(lambda row, at, entry: row.at[at].set(entry, mode="drop"))(old, position, new.astype(old.dtype))

    length = state.length + state.running
    return step + 1, DecodeRows(
      cache=cache,
      token=token,
      running=state.running & _continues(options, token, length, state.limit),
      length=length,
      limit=state.limit,
      number=state.number,
      tokens=put(state.tokens, token),
      sampler_log_prob=put(state.sampler_log_prob, sampler_log_prob),
      log_prob=put(state.log_prob, log_prob),
      experts=jax.tree.map(lambda old, new: put(old, jnp.moveaxis(new, 0, 1)), state.experts, experts),
    )

  def unfinished(carry):
    step, state = carry
    return (step < steps) if least is None else (step < steps) & (jnp.sum(state.running) >= least)

  return jax.lax.while_loop(unfinished, body, (jnp.int32(0), state))[1]


def compact(state: DecodeRows, sources: Array, active: Array) -> DecodeRows:
  """Another number of rows: row i takes over row sources[i], or is empty where active[i] is False; both [B']."""
  moved = jax.tree.map(lambda leaf: leaf[sources] if leaf.ndim else leaf, state)
  return moved._replace(running=moved.running & active)


def _continues(options: SamplingOptions, token: Array, length: Array, limit: Array) -> Array:
  """Whether a row with that many tokens, the last one `token`, samples another one."""
  return ~jnp.isin(token, jnp.asarray(options.stop_ids, jnp.int32)) & (length < limit)
