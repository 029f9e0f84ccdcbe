"""Load balance of the experts: auxiliary losses, and a bias on the expert choice that needs no gradient.

In RL all of them are off by default, because they change the router and therefore router shift.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rspo_jax.router.trace import expert_load
from rspo_jax.types import Array, Probe


class BalanceSums(NamedTuple):
  """Sums over the tokens of a batch; those of several batches add up.

  Attributes:
    choices: [L, E] int32, choices of each expert.
    probability: [L, E] float32, of the router's probabilities, with gradient.
    z: [L] float32, of logsumexp(router logits)^2, with gradient.
  """

  choices: Array
  probability: Array
  z: Array


def balance_probe(mask_positions: Array) -> Probe:
  """A probe whose output, stacked over layers, is `BalanceSums` of the positions in the mask [B, T]."""

  def probe(router, probe_inputs):
    del probe_inputs
    probability = jax.nn.softmax(router.logits, axis=-1)
    return BalanceSums(
      expert_load(router.expert_index, mask_positions, router.logits.shape[-1]),
      jnp.sum(jnp.where(mask_positions[..., None], probability, 0), axis=(0, 1)),
      jnp.sum(jnp.where(mask_positions, jax.nn.logsumexp(router.logits, axis=-1) ** 2, 0)),
    )

  return probe


def load_balance_loss(probability: Array, choices: Array, tokens: Array) -> Array:
  """E * sum_e f_e P_e of every layer, averaged over layers: K for an even load.

  Linear in `probability`, which alone carries gradient: with `choices` and `tokens` of the whole minibatch, the losses
  of its microbatches add up to the loss of the minibatch.

  Args:
    probability: [L, E], sums of the router's probabilities over tokens. choices: [L, E], choices of each expert.
    tokens: [], number of tokens.
  Returns:
    [] float32, dimensionless, >= 0.
  Source: Switch Transformer, arXiv 2101.03961, eq. 4, with f over all K choices. The function of this name in
    transformers pools all layers before the product, so that uneven layers can cancel; here they cannot.
  """
  tokens = jnp.maximum(tokens, 1).astype(jnp.float32)
  share = jax.lax.stop_gradient(choices.astype(jnp.float32)) / tokens
  return probability.shape[-1] * jnp.mean(jnp.sum(share * probability / tokens, axis=-1))


def router_z_loss(z: Array, tokens: Array) -> Array:
  """Mean over tokens and layers of logsumexp(router logits)^2; penalises large router logits.

  Args:
    z: [L], sums over tokens, see `BalanceSums`. tokens: [], number of tokens.
  Returns:
    [] float32, nats^2.
  Source: ST-MoE, arXiv 2202.08906, eq. 5.
  """
  return jnp.mean(z) / jnp.maximum(tokens, 1)


def router_bias_step(load: Array, rate: float) -> Array:
  """The step of the bias on the expert choice: +rate for experts below their layer's mean load, -rate above it.

  Args:
    load: [L, E], choices of each expert. rate: per update, in the unit of the router's scores.
  Returns:
    [L, E] float32, without gradient; 0 where the load equals the mean.
  Source: auxiliary-loss-free balancing, arXiv 2408.15664; DeepSeek-V3, arXiv 2412.19437, section 2.1.2.
  """
  load = load.astype(jnp.float32)
  return rate * jnp.sign(load.mean(axis=-1, keepdims=True) - load)
