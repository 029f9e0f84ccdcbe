"""Batch-synchronous sampling as one pure function: one prefill per prompt, shared by its samples, then decoding."""

import chex
import jax.numpy as jnp

from rspo_jax.rollout import decode_rows
from rspo_jax.rollout.cacheless import with_cache
from rspo_jax.rollout.token_sampling import SamplingOptions
from rspo_jax.types import Array, Params, Policy, Rollout


def sample(
  policy: Policy,
  params: Params,
  tokens: Array,
  valid: Array,
  key: Array,
  *,
  options: SamplingOptions,
  first_row: Array | int = 0,
  numbers: Array | None = None,
  limits: Array | None = None,
) -> Rollout:
  """Samples `samples_per_prompt` completions of every prompt. Pure; jit it with `policy` and `options` closed over.

  Completion c samples its token n with `fold_in(fold_in(key, c), n)`, where row r is completion first_row + r: the
  samples depend on neither the batch size nor the sharding, and a batch cut into pieces gives the same completions if
  each piece passes its `first_row`.

  Args:
    tokens: [P, Tp] int32, left-padded prompts; valid: [P, Tp] bool, at least the last slot of every row.
    key: a random key.
    first_row: number of the first completion in the whole batch.
    numbers: [B] int32, the number of every completion; None is first_row + row.
    limits: [B] int32, most tokens of each completion, 1 to max_new_tokens; None is max_new_tokens for all.
  Returns:
    A `Rollout` of B = P * G rows (prompt-major) and T = Tp + max_new_tokens slots.
  """
  chex.assert_rank([tokens, valid], 2)
  chex.assert_equal_shape([tokens, valid])
  policy = with_cache(policy)
  samples, new = options.samples_per_prompt, options.max_new_tokens
  prompts, prompt_length = tokens.shape
  rows = prompts * samples
  weights = policy.for_decode(params, prompt_length + new)
  prefilled = decode_rows.prefill_prompts(policy, options, weights, tokens, valid)
  if numbers is None:
    numbers = (first_row + jnp.arange(rows)).astype(jnp.int32)
  state = decode_rows.start_rows(
    policy, options, weights, key, prefilled, numbers, jnp.full(rows, new, jnp.int32) if limits is None else limits
  )
  # If no row can stop early, the check is skipped; it costs an all-reduce per token.
  least = 1 if options.stop_ids or limits is not None else None
  sizes, sampled = options.cache_sizes or 1, 1
  for end in sorted({-(-new * part // sizes) for part in range(1, sizes + 1)}):
    state = state._replace(cache=policy.grow(state.cache, prompt_length + end))
    state = decode_rows.decode(policy, options, weights, key, state, end - sampled, least)
    sampled = end

  chosen = jnp.arange(new) < state.length[:, None]
  finished = jnp.any(chosen & jnp.isin(state.tokens, jnp.asarray(options.stop_ids, jnp.int32)), axis=1)

  def repeat(leaf):
    return jnp.repeat(leaf, samples, axis=0)

  def after_prompt(prompt, completion):
    return jnp.concatenate([repeat(prompt).astype(completion.dtype), completion], axis=1)

  nothing = jnp.zeros_like(tokens)
  return Rollout(
    tokens=after_prompt(tokens, state.tokens),
    valid=after_prompt(valid, chosen),
    action_mask=after_prompt(nothing, chosen),
    sampler_log_prob=after_prompt(nothing, state.sampler_log_prob),
    log_prob=after_prompt(nothing, state.log_prob),
    finished=finished,
    expert_index=after_prompt(prefilled.experts[:, :-1], state.experts) if options.record_experts else None,
  )
