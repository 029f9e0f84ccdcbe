"""The router: selects the experts of every token from the router logits, and computes their gates."""

import jax
import jax.numpy as jnp

from models.config import TransformerConfig
from models.layers.expert_parallel import top_k
from rspo_jax.types import Array, Layout, Replay


def route(
  config: TransformerConfig, logits: Array, bias: Array | None, replay: Replay | None, layout: Layout | None
) -> tuple[Array, Array]:
  """The selected experts of every token and their gates, the multipliers of their outputs.

  score_e = softmax(logits)_e or sigmoid(logits_e). The K experts with the largest score_e + bias_e are selected, from
  the best groups only if the configuration has groups. gate_k = score of expert k, divided by the sum over the K if
  `norm_topk_prob`, times `routed_scaling_factor`. Sources: Switch Transformer (arXiv 2101.03961) and Mixtral
  (2401.04088) for softmax; DeepSeek-V2 (2405.04434) for groups ranked by their best expert; DeepSeek-V3 (2412.19437)
  for sigmoid, bias, and groups ranked by their best two experts. gpt-oss uses the softmax of the K selected logits,
  which equals softmax over all logits with norm_topk_prob.

  Args:
    logits: [B, T, E] float32.
    bias: [E] or None; enters the selection but not the gates, and has no gradient.
    replay: of this layer, leaves [B, T, K]: replaces the selection, and the gates if it contains them.
    layout: the mesh, or None on one device.
  Returns:
    expert_index [B, T, K] int32 and gate [B, T, K] float32, the largest score + bias first.
  """
  c = config
  score = jax.nn.softmax(logits, axis=-1) if c.scoring_func == "softmax" else jax.nn.sigmoid(logits)
  selection_score = score if bias is None else score + jax.lax.stop_gradient(bias)
  if replay is not None:
    expert_index = replay.expert_index.astype(jnp.int32)
  else:
    gate, expert_index = top_k(_mask_groups(c, selection_score, layout), c.num_experts_per_tok, layout)
  if replay is not None or bias is not None:
    gate = jnp.take_along_axis(score, expert_index, axis=-1)
  if c.norm_topk_prob:
    gate = gate / (jnp.sum(gate, axis=-1, keepdims=True) + 1e-20)
  if c.routed_scaling_factor != 1:
    gate = gate * c.routed_scaling_factor
  if replay is not None and replay.gate is not None:
    gate = replay.gate
  return expert_index, gate


def _mask_groups(config: TransformerConfig, score: Array, layout: Layout | None) -> Array:
  """score [B, T, E] with -inf for the experts outside the best groups."""
  if config.topk_group == config.n_group:
    return score
  groups = score.reshape(*score.shape[:-1], config.n_group, -1)
  group_score = top_k(groups, 1 if config.group_score == "max" else 2, layout)[0].sum(axis=-1)
  group_index = top_k(group_score, config.topk_group, layout)[1]
  selected = jnp.any(group_index[..., None] == jnp.arange(config.n_group), axis=-2)
  return jnp.where(selected[..., None], groups, -jnp.inf).reshape(score.shape)
