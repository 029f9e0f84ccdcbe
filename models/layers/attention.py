"""Attention: grouped-query attention with the options of the public families, and multi-head latent attention."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from models.config import TransformerConfig
from models.layers.rotary import rotate, score_scale
from models.layers.weights import matrix_param, zeros_init
from rspo_jax.types import Array

# The cache of one layer: keys [B, heads, width, S] and values [B, heads, S, width], each in the layout that its matrix
# product reads (transposing all keys for every token took 7 % of decoding on a CPU); or latents [B, 1, S, width].
LayerCache = tuple[Array, ...]


class Context(NamedTuple):
  """Inputs that all layers share.

  Attributes:
    cos, sin: [B, T, head_dim / 2] float32, rotary angles.
    mask: [B, T, S] bool, True where a query may attend to a key.
    valid: [B, T] bool, False for padding.
    distance: [T, S] int32, slots from a key to the query; None without sliding windows.
    slot: [] int32, cache slot of the first token; None without a cache.
  """

  cos: Array
  sin: Array
  mask: Array
  valid: Array
  distance: Array | None = None
  slot: Array | None = None


def init_layer_cache(config: TransformerConfig, batch: int, slots: int) -> LayerCache:
  """The empty cache of one layer: keys and values; with latent attention, latents concatenated with rotary keys."""
  dtype = config.cache_dtype or config.dtype
  if config.kv_lora_rank:
    return (jnp.zeros((batch, 1, slots, config.kv_lora_rank + config.qk_rope_head_dim), dtype),)
  empty = jnp.zeros((batch, config.num_key_value_heads, slots, config.head_dim), dtype)
  return (empty.swapaxes(2, 3), empty)


def slot_axes(cache: LayerCache) -> tuple[int, ...]:
  """The slot axis of each array of a layer's cache."""
  return (3, 2) if len(cache) == 2 else (2,)


class RMSNorm(nn.Module):
  """x / sqrt(mean(x^2) + epsilon) * scale over the last axis, computed in float32."""

  epsilon: float

  @nn.compact
  def __call__(self, x: Array) -> Array:
    scale = self.param("scale", nn.with_logical_partitioning(nn.initializers.ones, ("norm",)), (x.shape[-1],))
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.epsilon)
    return normed.astype(x.dtype) * scale.astype(x.dtype)


def attend(query: Array, key: Array, value: Array, mask: Array, scale: float, sinks: Array | None = None) -> Array:
  """softmax(scale * query key^T) value over the keys that the mask allows.

  Args:
    query: [B, T, H, d]. key: [B, Hkv, S, d]. value: [B, Hkv, S, v]. H is a multiple of Hkv. mask: [B, T, S] bool.
    sinks: [H], a score per head that is added to the normaliser of the softmax only (gpt-oss).
  Returns:
    [B, T, H, v] in query's dtype; scores and softmax are float32.
  """
  (batch, length, heads, width), kv_heads, dtype = query.shape, key.shape[1], query.dtype
  groups = heads // kv_heads
  # [B, Hkv, groups * T, d]: the queries of a key/value head are rows of one batched product.
  query = query.reshape(batch, length, kv_heads, groups, width).transpose(0, 2, 3, 1, 4)
  query = query.reshape(batch, kv_heads, groups * length, width)
  scores = jnp.einsum("bhqd,bhsd->bhqs", query, key.astype(dtype), preferred_element_type=jnp.float32)
  scores = scores.reshape(batch, kv_heads, groups, length, -1) * scale
  scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
  if sinks is None:
    weights = jax.nn.softmax(scores, axis=-1)
  else:
    sink = sinks.astype(jnp.float32).reshape(kv_heads, groups, 1, 1)
    largest = jax.lax.stop_gradient(jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), sink))
    weights = jnp.exp(scores - largest)
    weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + jnp.exp(sink - largest))
  weights = weights.astype(dtype).reshape(batch, kv_heads, groups * length, -1)
  output = jnp.einsum("bhqs,bhsd->bhqd", weights, value.astype(dtype))
  return output.reshape(batch, heads, length, -1).swapaxes(1, 2)


class Attention(nn.Module):
  """x [B, T, D] -> ([B, T, D], the layer's cache with the new tokens; None without a cache)."""

  config: TransformerConfig

  @nn.compact
  def __call__(self, x: Array, context: Context, window: Array | int | None, cache: LayerCache | None):
    mask = context.mask if window is None else context.mask & (context.distance < window)
    attended, cache = (self._latent if self.config.kv_lora_rank else self._grouped)(x, context, mask, cache)
    batch, length, heads, width = attended.shape
    shape = (heads, width, x.shape[-1])
    kernel = matrix_param(self, self.config.lora, "out", ("heads", "head_dim", "embed"), shape, inputs=(0, 1))
    out = attended.reshape(batch, length, -1) @ kernel.astype(x.dtype).reshape(-1, x.shape[-1])
    if self.config.attention_out_bias:
      out = out + self.param("out_bias", zeros_init("embed"), (x.shape[-1],)).astype(x.dtype)
    return out, cache

  def _grouped(self, x: Array, context: Context, mask: Array, cache: LayerCache | None):
    c = self.config

    def project(name: str, heads: int, axis: str, normed: bool) -> Array:
      y = self._project(x, name, (heads, c.head_dim), axis, c.qkv_bias)
      if normed and c.qk_norm != "none":
        norm = RMSNorm(c.rms_norm_eps, name=f"{name}_norm")
        y = norm(y) if c.qk_norm == "head" else norm(y.reshape(*y.shape[:2], -1)).reshape(y.shape)
      return y if c.clip_qkv is None else jnp.clip(y, -c.clip_qkv, c.clip_qkv)

    query = project("query", c.num_attention_heads, "heads", True)
    key = project("key", c.num_key_value_heads, "kv_heads", True)
    value = project("value", c.num_key_value_heads, "kv_heads", False).swapaxes(1, 2)  # [B, Hkv, T, d]
    query = rotate(query, context.cos, context.sin, interleaved=c.rope_interleave)
    key = rotate(key, context.cos, context.sin, interleaved=c.rope_interleave).transpose(0, 2, 3, 1)  # [B, Hkv, d, T]
    if cache is not None:
      cache = key, value = _write_cache(cache, (key, value), context.slot)
    sinks = self.param("sinks", zeros_init("heads"), (c.num_attention_heads,)) if c.attention_sinks else None
    return attend(query, key.swapaxes(2, 3), value, mask, score_scale(c), sinks), cache

  def _latent(self, x: Array, context: Context, mask: Array, cache: LayerCache | None):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

    Keys and values are projected from one latent per token. Without a cache they are computed explicitly. With a cache,
    which stores the latents, the projections are applied to queries and outputs instead of to all cached latents.
    """
    c = self.config
    heads, nope, rank = c.num_attention_heads, c.qk_nope_head_dim, c.kv_lora_rank
    rotary = {"cos": context.cos, "sin": context.sin, "interleaved": c.rope_interleave}

    query_input, input_axis = x, "embed"
    if c.q_lora_rank:
      query_input = self._project(x, "query_down", (c.q_lora_rank,), None, c.qkv_bias)
      query_input, input_axis = RMSNorm(1e-6, name="query_norm")(query_input), None
    query = self._project(query_input, "query", (heads, c.qk_head_dim), "heads", False, input_axis)
    query_nope, query_rope = query[..., :nope], rotate(query[..., nope:], **rotary)

    down = self._project(x, "latent", (rank + c.qk_rope_head_dim,), None, c.qkv_bias)
    latent = RMSNorm(1e-6, name="latent_norm")(down[..., :rank])
    key_rope = rotate(down[..., None, rank:], **rotary)
    shape = (rank, heads, nope + c.v_head_dim)
    up = matrix_param(self, c.lora, "key_value", (None, "heads", "head_dim"), shape).astype(x.dtype)

    if cache is None:
      key_value = jnp.einsum("btr,rhd->bthd", latent, up)
      key_rope = jnp.broadcast_to(key_rope, (*key_value.shape[:3], c.qk_rope_head_dim))
      key = jnp.concatenate([key_value[..., :nope], key_rope], axis=-1).swapaxes(1, 2)
      query = jnp.concatenate([query_nope, query_rope], axis=-1)
      return attend(query, key, key_value[..., nope:].swapaxes(1, 2), mask, score_scale(c)), None

    new = jnp.concatenate([latent, key_rope[:, :, 0]], axis=-1)[:, None]
    cache = (latents,) = _write_cache(cache, (new,), context.slot)
    query = jnp.concatenate([jnp.einsum("bthd,rhd->bthr", query_nope, up[..., :nope]), query_rope], axis=-1)
    attended = attend(query, latents, latents, mask, score_scale(c))[..., :rank]
    return jnp.einsum("bthr,rhd->bthd", attended, up[..., nope:]), cache

  def _project(
    self, x: Array, name: str, shape: tuple[int, ...], axis: str | None, bias: bool, input_axis: str | None = "embed"
  ) -> Array:
    """x [B, T, I] times the parameter `name` [I, *shape]: [B, T, *shape].

    Args:
      axis, input_axis: logical names of the first axis of shape and of the axis I.
    """
    axes = (axis, "head_dim")[: len(shape)]
    kernel = matrix_param(self, self.config.lora, name, (input_axis, *axes), (x.shape[-1], *shape))
    y = (x @ kernel.astype(x.dtype).reshape(x.shape[-1], -1)).reshape(*x.shape[:2], *shape)
    if bias:
      y = y + self.param(f"{name}_bias", zeros_init(*axes), shape).astype(x.dtype)
    return y


def _write_cache(cache: LayerCache, new: LayerCache, slot: Array) -> LayerCache:
  return tuple(
    jax.lax.dynamic_update_slice_in_dim(old, tokens.astype(old.dtype), slot, axis)
    for old, tokens, axis in zip(cache, new, slot_axes(cache), strict=True)
  )
