"""The layers: attention with query/key norms and rotary positions, SwiGLU experts behind a float32 softmax router.

Source: Qwen3 technical report (arXiv 2505.09388); tests/hf_test.py holds it to transformers' `Qwen3MoeForCausalLM`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from models.config import TransformerConfig
from models.expert_parallel import choose_experts, run_sharded_experts
from rspo_jax.types import Array, Layout, Probe, Replay, RouterOutput


class Context(NamedTuple):
  """What every layer shares. cos, sin [B, T, head_dim / 2]; mask [B, T, S] bool, True where a query may look; valid
  [B, T] bool; slot [] int32, the cache slot of the first token (None without a cache)."""

  cos: Array
  sin: Array
  mask: Array
  valid: Array
  slot: Array | None = None


class LayerInputs(NamedTuple):
  """What one layer alone gets. key_value: a pair [B, Hkv, S, head_dim], the layer's cache; replay: leaves [B, T, K]."""

  key_value: tuple[Array, Array] | None = None
  probe_inputs: Any = None
  replay: Replay | None = None


def rotary_angles(config: TransformerConfig, positions: Array) -> tuple[Array, Array]:
  """cos and sin of the rotary angles, [..., head_dim / 2] float32, for integer positions [...]."""
  half = config.head_dim // 2
  frequency = config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angles = positions[..., None].astype(jnp.float32) * frequency
  return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Array, cos: Array, sin: Array) -> Array:
  """Turns x [B, T, H, head_dim] by its position; the two halves of head_dim are the pairs (Hugging Face's order)."""
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  cos, sin = cos[:, :, None], sin[:, :, None]
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _matrix(axes: tuple[str | None, ...], inputs: int, outputs: int) -> Callable:
  """Fan-in scaled initialiser: axis `inputs` is contracted, axes left of it are batched."""
  batch = tuple(range(inputs))
  return nn.with_logical_partitioning(
    nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", inputs, outputs, batch_axis=batch),
    axes,
  )


class RMSNorm(nn.Module):
  epsilon: float

  @nn.compact
  def __call__(self, x: Array) -> Array:
    scale = self.param("scale", nn.with_logical_partitioning(nn.initializers.ones, ("norm",)), (x.shape[-1],))
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.epsilon)
    return wide.astype(x.dtype) * scale.astype(x.dtype)


class Attention(nn.Module):
  config: TransformerConfig

  @nn.compact
  def __call__(self, x: Array, context: Context, key_value: tuple[Array, Array] | None):
    c = self.config
    batch, length, width = x.shape
    groups = c.num_attention_heads // c.num_key_value_heads

    def project(name: str, heads: int, axis: str) -> Array:
      kernel = self.param(
        name, _matrix(("embed", axis, "head_dim"), 0, (1, 2)), (width, heads, c.head_dim), jnp.float32
      )
      flat = x @ kernel.astype(x.dtype).reshape(width, heads * c.head_dim)
      return flat.reshape(batch, length, heads, c.head_dim)

    query = RMSNorm(c.rms_norm_eps, name="query_norm")(project("query", c.num_attention_heads, "heads"))
    key = RMSNorm(c.rms_norm_eps, name="key_norm")(project("key", c.num_key_value_heads, "kv_heads"))
    value = project("value", c.num_key_value_heads, "kv_heads").swapaxes(1, 2)
    query = rotate(query, context.cos, context.sin)
    key = rotate(key, context.cos, context.sin).swapaxes(1, 2)

    if key_value is not None:
      key_value = key, value = tuple(
        jax.lax.dynamic_update_slice_in_dim(cache, new.astype(cache.dtype), context.slot, axis=2)
        for cache, new in zip(key_value, (key, value), strict=True)
      )
    # [B, Hkv, groups * T, head_dim]: the queries of a key/value head are rows of one batched product.
    query = query.reshape(batch, length, c.num_key_value_heads, groups, c.head_dim).transpose(0, 2, 3, 1, 4)
    query = query.reshape(batch, c.num_key_value_heads, groups * length, c.head_dim)
    scores = jnp.einsum("bhqd,bhsd->bhqs", query, key.astype(query.dtype), preferred_element_type=jnp.float32)
    scores = scores.reshape(batch, c.num_key_value_heads, groups, length, -1) * c.head_dim**-0.5
    scores = jnp.where(context.mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(x.dtype)
    weights = weights.reshape(batch, c.num_key_value_heads, groups * length, -1)
    mixed = jnp.einsum("bhqs,bhsd->bhqd", weights, value.astype(x.dtype))
    mixed = mixed.reshape(batch, c.num_attention_heads, length, c.head_dim).swapaxes(1, 2)

    shape = (c.num_attention_heads, c.head_dim, width)
    init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", (0, 1), 2)
    kernel = self.param("out", nn.with_logical_partitioning(init, ("heads", "head_dim", "embed")), shape, jnp.float32)
    out = mixed.reshape(batch, length, -1) @ kernel.astype(x.dtype).reshape(-1, width)
    return out, key_value


class DenseMLP(nn.Module):
  config: TransformerConfig

  @nn.compact
  def __call__(self, x: Array) -> Array:
    width, inner = x.shape[-1], self.config.intermediate_size
    gate = self.param("gate", _matrix(("embed", "mlp"), 0, 1), (width, inner), jnp.float32)
    up = self.param("up", _matrix(("embed", "mlp"), 0, 1), (width, inner), jnp.float32)
    down = self.param("down", _matrix(("mlp", "embed"), 0, 1), (inner, width), jnp.float32)
    return (jax.nn.silu(x @ gate.astype(x.dtype)) * (x @ up.astype(x.dtype))) @ down.astype(x.dtype)


class MoE(nn.Module):
  config: TransformerConfig
  probe: Probe
  layout: Layout | None = None

  @nn.compact
  def __call__(self, x: Array, valid: Array, probe_inputs: Any, replay: Replay | None):
    c = self.config
    width, inner, experts = x.shape[-1], c.moe_intermediate_size, c.num_experts
    router = self.param("router", _matrix(("embed", None), 0, 1), (width, experts), jnp.float32)
    logits = jnp.matmul(x.astype(jnp.float32), router, precision=jax.lax.Precision.HIGHEST)
    probability = jax.nn.softmax(logits, axis=-1)
    score = probability
    if c.router_bias:
      bias = self.param("router_bias", nn.with_logical_partitioning(nn.initializers.zeros, (None,)), (experts,))
      score = probability + jax.lax.stop_gradient(bias)
    if replay is not None:
      expert_index = replay.expert_index.astype(jnp.int32)
    else:
      gate, expert_index = choose_experts(score, c.num_experts_per_tok, self.layout)
    if replay is not None or c.router_bias:
      gate = jnp.take_along_axis(probability, expert_index, axis=-1)
    if c.norm_topk_prob:
      gate = gate / jnp.sum(gate, axis=-1, keepdims=True)
    if replay is not None and replay.gate is not None:
      gate = replay.gate
    probed = self.probe(RouterOutput(logits, expert_index, gate), probe_inputs)

    inward, outward = ("experts", "embed", "expert_mlp"), ("experts", "expert_mlp", "embed")
    weights = (
      self.param("gate", _matrix(inward, 1, 2), (experts, width, inner), jnp.float32),
      self.param("up", _matrix(inward, 1, 2), (experts, width, inner), jnp.float32),
      self.param("down", _matrix(outward, 1, 2), (experts, inner, width), jnp.float32),
    )
    # A padded position names expert E: no expert at all, so no work.
    expert_index = jnp.where(valid[..., None], expert_index, experts)
    weights = tuple(w.astype(x.dtype) for w in weights)
    return run_sharded_experts(x, expert_index, gate, weights, backend=c.expert_backend, layout=self.layout), probed


class Block(nn.Module):
  """One layer. Carries x [B, T, D] and returns (its cache if it was given one, what the probe saw)."""

  config: TransformerConfig
  is_moe: bool
  probe: Probe
  layout: Layout | None = None

  @nn.compact
  def __call__(self, x: Array, context: Context, inputs: LayerInputs):
    if self.layout is not None:
      x = jax.lax.with_sharding_constraint(x, self.layout.sharding("batch", None, None))
    normed = RMSNorm(self.config.rms_norm_eps, name="attention_norm")(x)
    update, key_value = Attention(self.config, name="attention")(normed, context, inputs.key_value)
    x = x + update
    normed = RMSNorm(self.config.rms_norm_eps, name="mlp_norm")(x)
    if self.is_moe:
      moe = MoE(self.config, self.probe, self.layout, name="moe")
      update, probed = moe(normed, context.valid, inputs.probe_inputs, inputs.replay)
    else:
      update, probed = DenseMLP(self.config, name="mlp")(normed), None
    return x + update, (key_value, probed)


class Transformer(nn.Module):
  """tokens [B, T] -> (hidden [B, T, D] after the last norm, what the probe saw, leaves [L, ...])."""

  config: TransformerConfig
  probe: Probe
  layout: Layout | None = None

  @nn.compact
  def __call__(self, tokens: Array, valid: Array, probe_inputs: Any = None, replay: Replay | None = None):
    c = self.config
    embedding = self.param("embedding", _matrix(("vocab", "embed"), 1, 0), (c.vocab_size, c.hidden_size))
    if not c.tie_word_embeddings:
      self.param("lm_head", _matrix(("embed", "vocab"), 0, 1), (c.hidden_size, c.vocab_size))
    x = embedding.astype(c.dtype)[tokens]
    cos, sin = rotary_angles(c, jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0))
    # A padded query looks at itself, so that its softmax has something to sum.
    mask = jnp.tril(valid[:, None, :] & jnp.ones((1, tokens.shape[1], 1), bool)) | jnp.eye(tokens.shape[1], dtype=bool)
    context = Context(cos, sin, mask, valid)

    block = nn.remat(Block, prevent_cse=False) if c.remat else Block
    seen, first = [], 0
    for number, (is_moe, length) in enumerate(c.segments):
      inputs = LayerInputs()
      if is_moe:
        part = slice(first, first + length)
        inputs = jax.tree.map(lambda leaf, part=part: leaf[part], LayerInputs(None, probe_inputs, replay))
        first += length
      layers = nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast, 0),
        length=length,
        metadata_params={nn.PARTITION_NAME: "layers"},
      )
      x, (_, probed) = layers(c, is_moe, self.probe, self.layout, name=f"layers_{number}")(x, context, inputs)
      if is_moe:
        seen.append(probed)
    hidden = RMSNorm(c.rms_norm_eps, name="final_norm")(x)
    return hidden, jax.tree.map(lambda *parts: jnp.concatenate(parts), *seen)
