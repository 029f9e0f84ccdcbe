"""Draws completions from a policy: one prefill a prompt, shared by its samples, then jitted decoding."""

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp

from rspo_jax.router.trace import index_dtype, record_experts
from rspo_jax.types import Array, Params, Policy, Probe, Rollout


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
  """How completions are drawn.

  Attributes:
    max_new_tokens: longest completion, in tokens, the stop token included.
    samples_per_prompt: G, completions drawn of each prompt.
    temperature: divides the logits; 0 takes the most likely token.
    top_k: keep this many of the most likely tokens; 0 keeps all.
    top_p: then keep the smallest set of tokens whose probability reaches this, in (0, 1]; 1 keeps all.
    stop_ids: tokens that end a completion (and belong to it).
    record_experts: keep the experts every token was sampled with, in `Rollout.expert_index`.
    cache_sizes: in how many steps the cache of `sample` grows to all its slots. Decoding a token reads the whole cache:
      with more sizes less is read, and one decode loop is compiled for each. `rspo_jax.rollout.continuous` keeps one
      size.
  """

  max_new_tokens: int
  samples_per_prompt: int = 1
  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  stop_ids: tuple[int, ...] = ()
  record_experts: bool = False
  cache_sizes: int = 1

  def __post_init__(self):
    if self.max_new_tokens < 1 or self.samples_per_prompt < 1:
      raise ValueError(
        f"max_new_tokens is {self.max_new_tokens} and samples_per_prompt {self.samples_per_prompt}; both start at 1."
      )
    if self.cache_sizes < 1:
      raise ValueError(f"cache_sizes is {self.cache_sizes}; want at least 1, which is the whole cache from the start.")
    if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
      raise ValueError(
        f"temperature is {self.temperature}, top_k {self.top_k}, top_p {self.top_p}; want temperature >= 0 (0 is "
        "greedy), top_k >= 0 (0 keeps all tokens) and top_p in (0, 1] (1 keeps all tokens)."
      )


def truncated_log_prob(logits: Array, options: SamplingOptions) -> Array:
  """Log-probabilities of the distribution that is drawn from.

  Args:
    logits: [..., V] float32.
  Returns:
    [..., V] float32, nats; -inf for tokens that temperature 0, top-k or top-p rule out.
  """
  if options.temperature == 0:
    best = jnp.argmax(logits, axis=-1, keepdims=True)
    return jnp.where(jnp.arange(logits.shape[-1]) == best, 0.0, -jnp.inf)
  log_prob = jax.nn.log_softmax(logits / options.temperature, axis=-1)
  if 0 < options.top_k < logits.shape[-1]:
    smallest = jax.lax.top_k(log_prob, options.top_k)[0][..., -1:]
    log_prob = jax.nn.log_softmax(jnp.where(log_prob < smallest, -jnp.inf, log_prob), axis=-1)
  if options.top_p < 1:
    descending = jnp.sort(log_prob, axis=-1, descending=True)
    mass_before = jnp.cumsum(jnp.exp(descending), axis=-1) - jnp.exp(descending)
    smallest = jnp.min(jnp.where(mass_before < options.top_p, descending, jnp.inf), axis=-1, keepdims=True)
    log_prob = jax.nn.log_softmax(jnp.where(log_prob < smallest, -jnp.inf, log_prob), axis=-1)
  return log_prob


def row_keys(key: Array, number: Array) -> Array:
  """The random keys [B] of completions whose numbers in the whole batch are [B] int32."""
  return jax.vmap(jax.random.fold_in, (None, 0))(key, number)


def sample_tokens(
  policy: Policy, options: SamplingOptions, weights: Params, hidden: Array, keys: Array, step: Array
) -> tuple[Array, Array, Array]:
  """Draws the next token of every row.

  Args:
    hidden: [B, D]. keys: [B], `row_keys` the rows. step: [B] int32 or [], tokens drawn before.
  Returns:
    token [B] int32; its log-probability [B] under what it was drawn from, and at temperature 1 without truncation.
  """
  logits = policy.unembed(weights, hidden)
  drawn_from = truncated_log_prob(logits, options)
  if options.temperature == 0:
    token = jnp.argmax(drawn_from, axis=-1).astype(jnp.int32)
  else:
    token = jax.vmap(_draw_one)(keys, jnp.broadcast_to(step, keys.shape), drawn_from)
  chosen = jnp.arange(logits.shape[-1]) == token[:, None]
  raw = jnp.sum(jnp.where(chosen, jax.nn.log_softmax(logits, axis=-1), 0.0), axis=-1)
  return token, jnp.sum(jnp.where(chosen, drawn_from, 0.0), axis=-1), raw


def _draw_one(key: Array, step: Array, log_prob: Array) -> Array:
  """`jax.random.categorical`: the largest of log p + Gumbel noise is drawn with probability p.

  Its argmax would take the noise's logarithms into its loop, which runs a number at a time on CPUs: 3.6 times as long.
  The tolerance is for compilers that compute the scores once for each of the two reductions, and far below the grain
  of the noise in float32; V - 1 is what a row of NaNs draws.
  """
  scores = log_prob + jax.random.gumbel(jax.random.fold_in(key, step), log_prob.shape, log_prob.dtype)
  token = jnp.arange(scores.size, dtype=jnp.int32)
  return jnp.min(jnp.where(scores >= jnp.max(scores) - 1e-5, token, scores.size - 1))


def experts_probe(options: SamplingOptions) -> Probe:
  """The sampler's probe: the chosen experts if they are asked for, else nothing."""
  return lambda router, probe_inputs: record_experts(router, probe_inputs) if options.record_experts else ()


def experts_by_slot(experts: Any) -> Any:
  """[L, P, Tp, K] by position of a prompt -> [P, Tp + 1, L, K] by slot; the last entry is of the first new token."""
  return jax.tree.map(lambda x: jnp.pad(jnp.moveaxis(x, 0, 2), ((0, 0), (1, 0), (0, 0), (0, 0))), experts)


def sample(
  policy: Policy,
  params: Params,
  tokens: Array,
  valid: Array,
  key: Array,
  *,
  options: SamplingOptions,
  first_row: Array | int = 0,
  limits: Array | None = None,
) -> Rollout:
  """Draws `samples_per_prompt` completions of every prompt. Pure; jit it with `policy` and `options` closed over.

  Row r draws its token n with `fold_in(fold_in(key, first_row + r), n)`: the draws depend on neither the batch size nor
  the sharding, and a batch cut into pieces gives the same completions if each piece passes its `first_row`.

  Args:
    tokens: [P, Tp] int32, left-padded prompts; valid: [P, Tp] bool, at least the last slot of every row.
    key: a random key.
    first_row: number of the first completion in the whole batch.
    limits: [B] int32, most tokens of each completion, 1 to max_new_tokens; None is max_new_tokens for all.
  Returns:
    A `Rollout` of B = P * G rows (prompt-major) and T = Tp + max_new_tokens slots.
  """
  chex.assert_rank([tokens, valid], 2)
  chex.assert_equal_shape([tokens, valid])
  samples, new = options.samples_per_prompt, options.max_new_tokens
  prompts, prompt_length = tokens.shape
  rows = prompts * samples
  stop_ids = jnp.asarray(options.stop_ids, jnp.int32)
  keys = row_keys(key, first_row + jnp.arange(rows))

  def repeat(leaf):
    return jnp.repeat(leaf, samples, axis=0) if leaf.ndim else leaf

  def draw(hidden, step):
    return sample_tokens(policy, options, weights, hidden, keys, step)

  look = experts_probe(options)
  weights = policy.for_decode(params, prompt_length + new)
  cache = policy.init_cache(prompts, prompt_length)
  hidden, prompt_experts, cache = policy.prefill(weights, tokens, valid, cache, probe=look)
  cache = jax.tree.map(repeat, cache)

  def record(written, drawn, step, running):
    """Writes one column; rows that are through keep their zeros."""
    return tuple(
      jax.lax.dynamic_update_slice_in_dim(w, jnp.where(running, d, 0).astype(w.dtype)[:, None], step, axis=1)
      for w, d in zip(written, drawn, strict=True)
    )

  def body(carry):
    step, token, running, length, cache, written, experts = carry
    hidden, chosen, cache = policy.decode(weights, token, running, cache, probe=look)
    drawn = draw(hidden, step)
    written = record(written, drawn, step, running)
    # [L, B, K]: what routed this token, whose logits the token at `step` is drawn from
    experts = jax.tree.map(
      lambda kept, new: jax.lax.dynamic_update_index_in_dim(kept, jnp.moveaxis(new, 0, 1), step, axis=1),
      experts,
      chosen,
    )
    return step + 1, drawn[0], *advance(drawn[0], running, length), cache, written, experts

  def advance(token, running, length):
    length = length + running
    running = running & ~jnp.isin(token, stop_ids)
    return running if limits is None else running & (length < limits), length

  drawn = draw(repeat(hidden[:, -1]), 0)
  everyone = jnp.ones(rows, bool)
  empty = (jnp.zeros((rows, new), jnp.int32), jnp.zeros((rows, new)), jnp.zeros((rows, new)))
  running, length = advance(drawn[0], everyone, jnp.zeros(rows, jnp.int32))
  by_slot = jax.tree.map(repeat, experts_by_slot(prompt_experts))  # [B, Tp + 1, L, K]
  experts = jax.tree.map(
    lambda x: jnp.zeros((rows, new, *x.shape[2:]), index_dtype(policy.num_experts)).at[:, 0].set(x[:, -1]), by_slot
  )
  # Where nothing can end early, nobody looks: to look, all devices wait for each other.
  may_stop = len(options.stop_ids) > 0 or limits is not None
  carry = (jnp.int32(1), drawn[0], running, length, cache, record(empty, drawn, 0, everyone), experts)
  for end in sorted({-(-new * part // options.cache_sizes) for part in range(1, options.cache_sizes + 1)}):
    *others, cache, written, experts = carry
    carry = (*others, policy.grow(cache, prompt_length + end), written, experts)
    carry = jax.lax.while_loop(
      lambda carry, end=end: (carry[0] < end) & (jnp.any(carry[2]) if may_stop else True), body, carry
    )
  _, _, _, length, _, (completions, sampler_log_prob, raw_log_prob), experts = carry

  chosen = jnp.arange(new) < length[:, None]
  ended = jnp.any(chosen & jnp.isin(completions, stop_ids), axis=1)

  def after_prompt(prompt, completion):
    return jnp.concatenate([repeat(prompt).astype(completion.dtype), completion], axis=1)

  nothing = jnp.zeros_like(tokens)
  return Rollout(
    tokens=after_prompt(tokens, completions),
    valid=after_prompt(valid, chosen),
    action_mask=after_prompt(nothing, chosen),
    sampler_log_prob=after_prompt(nothing, sampler_log_prob),
    log_prob=after_prompt(nothing, raw_log_prob),
    finished=ended,
    expert_index=jnp.concatenate([by_slot[:, :-1], experts], axis=1) if options.record_experts else None,
  )
