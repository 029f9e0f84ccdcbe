"""The router: from its logits to the experts of every token and their weights."""

import jax
import jax.numpy as jnp

from models.config import TransformerConfig
from models.layers.expert_parallel import choose
from rspo_jax.types import Array, Layout, Replay


def route(
  config: TransformerConfig, logits: Array, bias: Array | None, replay: Replay | None, layout: Layout | None
) -> tuple[Array, Array]:
  """The experts of every token, and what their outputs are multiplied by.

  score_e = softmax(logits)_e, or sigmoid(logits_e); the K experts with the largest score_e + bias_e are chosen, among
  the best groups only where the configuration has groups; gate_k = score of the chosen expert, divided by the sum of
  the K if `norm_topk_prob`, times `routed_scaling_factor`. Sources: Switch Transformer (arXiv 2101.03961) and Mixtral
  (2401.04088) for softmax; DeepSeek-V2 (2405.04434) for groups by their best expert; DeepSeek-V3 (2412.19437) for
  sigmoid, bias, and groups by their best two. gpt-oss takes the softmax of the K chosen logits, which is softmax over
  all of them and norm_topk_prob.

  Args:
    logits: [B, T, E] float32. bias: [E] or None; moves the choice alone, and gets no gradient.
    replay: this layer's, leaves [B, T, K]: the choice (and the gates, if it holds them) is given.
  Returns:
    expert_index [B, T, K] int32 and gate [B, T, K] float32, the largest score + bias first.
  """
  c = config
  score = jax.nn.softmax(logits, axis=-1) if c.scoring_func == "softmax" else jax.nn.sigmoid(logits)
  wanted = score if bias is None else score + jax.lax.stop_gradient(bias)
  if replay is not None:
    expert_index = replay.expert_index.astype(jnp.int32)
  else:
    gate, expert_index = choose(_best_groups(c, wanted, layout), c.num_experts_per_tok, layout)
  if replay is not None or bias is not None:
    gate = jnp.take_along_axis(score, expert_index, axis=-1)
  if c.norm_topk_prob:
    gate = gate / (jnp.sum(gate, axis=-1, keepdims=True) + 1e-20)
  if c.routed_scaling_factor != 1:
    gate = gate * c.routed_scaling_factor
  if replay is not None and replay.gate is not None:
    gate = replay.gate
  return expert_index, gate


def _best_groups(config: TransformerConfig, wanted: Array, layout: Layout | None) -> Array:
  """wanted [B, T, E], -inf outside the groups that experts are chosen from."""
  if config.topk_group == config.n_group:
    return wanted
  groups = wanted.reshape(*wanted.shape[:-1], config.n_group, -1)
  best = choose(groups, 1 if config.group_score == "max" else 2, layout)[0].sum(axis=-1)
  chosen = choose(best, config.topk_group, layout)[1]
  kept = jnp.any(chosen[..., None] == jnp.arange(config.n_group), axis=-2)
  return jnp.where(kept[..., None], groups, -jnp.inf).reshape(wanted.shape)
