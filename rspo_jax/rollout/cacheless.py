"""Sampling without a key/value cache, and a `Policy` made of a forward function alone.

To sample a token the forward runs over the whole row: O(T) more work than with a cache, and nothing to write beyond the
forward that training needs anyway. The "cache" holds the last S tokens of every row, the newest one in the last slot.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rspo_jax.types import Array, Params, Policy, Probe, Replay, RouterOutput, router_logits_probe

_CACHE_FUNCTIONS = ("for_decode", "init_cache", "prefill", "decode", "grow", "insert")


class TokenCache(NamedTuple):
  """tokens [B, S] int32 and valid [B, S] bool: what every row has seen, right-aligned."""

  tokens: Array
  valid: Array


def with_cache(policy: Policy) -> Policy:
  """The policy itself if it has a cache, else the same policy with one of tokens.

  Raises:
    ValueError: some functions of the cache are given and others are not.
  """
  missing = [name for name in _CACHE_FUNCTIONS if getattr(policy, name) is None]
  if not missing:
    return policy
  if len(missing) < len(_CACHE_FUNCTIONS):
    raise ValueError(
      f"the policy has no {', '.join(missing)}; want all of {', '.join(_CACHE_FUNCTIONS)}, or none of them to sample "
      "without a cache."
    )

  def prefill(params, tokens, valid, cache: TokenCache, *, probe: Probe = router_logits_probe):
    length = tokens.shape[1]
    cache = TokenCache(*(_push(old, new) for old, new in zip(cache, (tokens, valid), strict=True)))
    hidden, probed = policy.forward(params, *cache, probe=probe)
    return hidden[:, -length:], jax.tree.map(lambda leaf: leaf[:, :, -length:], probed), cache

  def decode(params, token, valid, cache: TokenCache, *, probe: Probe = router_logits_probe):
    pushed = TokenCache(_push(cache.tokens, token[:, None]), _push(cache.valid, valid[:, None]))
    cache = jax.tree.map(lambda new, old: jnp.where(valid[:, None], new, old), pushed, cache)
    hidden, probed = policy.forward(params, *cache, probe=probe)
    return hidden[:, -1], jax.tree.map(lambda leaf: leaf[:, :, -1], probed), cache

  def grow(cache: TokenCache, slots: int) -> TokenCache:
    more = slots - cache.tokens.shape[1]
    return jax.tree.map(lambda leaf: jnp.pad(leaf, ((0, 0), (more, 0))), cache)

  def insert(cache: TokenCache, rows, prompts: TokenCache, sources) -> TokenCache:
    wide = grow(prompts, cache.tokens.shape[1])
    return jax.tree.map(lambda old, new: old.at[rows].set(new[sources], mode="drop"), cache, wide)

  return policy._replace(
    for_decode=lambda params, slots: params,
    init_cache=lambda batch, slots: TokenCache(jnp.zeros((batch, slots), jnp.int32), jnp.zeros((batch, slots), bool)),
    prefill=prefill,
    decode=decode,
    grow=grow,
    insert=insert,
  )


def policy_from_forward(
  init: Callable[[Array], Params],
  forward: Callable[[Params, Array, Array], tuple[Array, Array]],
  *,
  experts_per_token: int,
  logical_axes: Callable[[], Params] | None = None,
  router_log_prob: Callable[[Array], Array] | None = None,
) -> Policy:
  """A `Policy` made of a forward function alone: sampling without a cache, scoring and training as with any other.

  Args:
    init: key -> params.
    forward: (params, tokens [B, T] int32, valid [B, T] bool) -> (logits [B, T, V], router logits [L, B, T, E]).
      Position t sees the valid positions up to t; prompts are left-padded.
    experts_per_token: K. The K largest router logits are taken for the experts that a position used.
    logical_axes, router_log_prob: see `Policy`.
  Returns:
    A policy whose "hidden" are the logits: [B, T, V] is held at once, so this is for models with a small vocabulary or
    for a first try. Routing replay is refused, since the forward cannot pin experts.
  """
  params = jax.eval_shape(init, jax.random.key(0))
  one = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  logits, router = jax.eval_shape(forward, params, one, jax.ShapeDtypeStruct((1, 1), bool))
  if logits.ndim != 3 or router.ndim != 4:
    raise ValueError(
      f"forward returned shapes {logits.shape} and {router.shape}; want logits [B, T, V] and router logits "
      "[L, B, T, E]."
    )
  layers, experts = router.shape[0], router.shape[-1]
  if not 1 <= experts_per_token <= experts:
    raise ValueError(f"experts_per_token is {experts_per_token}; want 1 to the number of experts, {experts}.")

  def probed_forward(
    params, tokens, valid, *, probe: Probe = router_logits_probe, probe_inputs=None, replay: Replay | None = None
  ):
    if replay is not None:
      raise ValueError("this policy is made of a forward alone, which cannot replay experts; set replay to 'none'.")
    logits, router = forward(params, tokens, valid)

    def one_layer(layer):
      router_logits, inputs = layer
      score, index = jax.lax.top_k(jax.nn.softmax(router_logits.astype(jnp.float32)), experts_per_token)
      return probe(RouterOutput(router_logits.astype(jnp.float32), index, score), inputs)

    return logits, jax.lax.map(one_layer, (router, probe_inputs))

  optional = {} if router_log_prob is None else {"router_log_prob": router_log_prob}
  return Policy(
    init=init,
    forward=probed_forward,
    unembed=lambda params, hidden: hidden.astype(jnp.float32),
    num_moe_layers=layers,
    num_experts=experts,
    experts_per_token=experts_per_token,
    vocab_size=logits.shape[-1],
    logical_axes=logical_axes,
    **optional,
  )


def _push(rows: Array, new: Array) -> Array:
  """[B, S] shifted left by the n columns [B, n] that are appended; S >= n."""
  return jnp.concatenate([rows[:, new.shape[1] :], new.astype(rows.dtype)], axis=1)
