"""Keeping the experts evenly loaded: auxiliary losses, and a bias on the choice that needs no gradient.

In RL all of them are off by default: they change the router, which is what router shift watches.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rspo_jax.types import Array, Probe


class BalanceSums(NamedTuple):
  """Sums over the tokens of a batch; batches add up. choices [L, E] int32; probability [L, E] float32, with gradient;
  z [L] float32, of logsumexp(router logits)^2, with gradient."""

  choices: Array
  probability: Array
  z: Array


def balance_probe(mask_positions: Array) -> Probe:
  """A probe whose output, stacked over layers, is `BalanceSums` of the positions in the mask [B, T]."""

  def probe(router, probe_inputs):
    del probe_inputs
    experts = router.logits.shape[-1]
    chosen = (router.expert_index[..., None] == jnp.arange(experts)) & mask_positions[..., None, None]
    probability = jax.nn.softmax(router.logits, axis=-1)
    return BalanceSums(
      chosen.sum(axis=(0, 1, 2), dtype=jnp.int32),
      jnp.sum(jnp.where(mask_positions[..., None], probability, 0), axis=(0, 1)),
      jnp.sum(jnp.where(mask_positions, jax.nn.logsumexp(router.logits, axis=-1) ** 2, 0)),
    )

  return probe


def load_balance_loss(probability: Array, choices: Array, tokens: Array) -> Array:
  """E * sum_e f_e P_e of every layer, averaged over layers: K when every expert gets its share.

  Linear in `probability`, which alone carries gradient: with `choices` and `tokens` of the whole minibatch, the losses
  of its microbatches add up to that of the whole.

  Args:
    probability: [L, E], sums of the router's probabilities over tokens. choices: [L, E], tokens each expert got.
    tokens: [], how many.
  Returns:
    [] float32, dimensionless, >= 0.
  Source: Switch Transformer, arXiv 2101.03961, eq. 4, with f over all K choices. transformers' function of this name
    pools all layers before the product; here a layer cannot make up for another.
  """
  tokens = jnp.maximum(tokens, 1).astype(jnp.float32)
  share = jax.lax.stop_gradient(choices.astype(jnp.float32)) / tokens
  return probability.shape[-1] * jnp.mean(jnp.sum(share * probability / tokens, axis=-1))


def router_z_loss(z: Array, tokens: Array) -> Array:
  """Mean over tokens and layers of logsumexp(router logits)^2: keeps router logits small.

  Args:
    z: [L], sums over tokens, see `BalanceSums`. tokens: [], how many.
  Returns:
    [] float32, nats^2.
  Source: ST-MoE, arXiv 2202.08906, eq. 5.
  """
  return jnp.mean(z) / jnp.maximum(tokens, 1)


def router_bias_step(load: Array, rate: float) -> Array:
  """How the bias on the expert choice changes: up by `rate` for experts below their layer's mean load, down above.

  Args:
    load: [L, E], choices of each expert. rate: per update, in the unit of the router's scores.
  Returns:
    [L, E] float32, without gradient; 0 where the load is the mean.
  Source: auxiliary-loss-free balancing, arXiv 2408.15664; DeepSeek-V3, arXiv 2412.19437, section 2.1.2.
  """
  load = load.astype(jnp.float32)
  return rate * jnp.sign(load.mean(axis=-1, keepdims=True) - load)
