"""Attention: grouped queries with the options of the public families, and DeepSeek's latent attention."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from models.config import TransformerConfig
from models.layers.rotary import rotate, score_scale
from models.layers.weights import weight, zeros
from rspo_jax.types import Array

# What a layer remembers of the tokens before: keys [B, heads, width, S] and values [B, heads, S, width], each the way
# its product reads it (turning all keys for every token was 7 % of decoding on a CPU); or latents [B, 1, S, width].
LayerCache = tuple[Array, ...]


class Context(NamedTuple):
  """What every layer shares. cos, sin [B, T, head_dim / 2]; mask [B, T, S] bool, True where a query may look; valid
  [B, T] bool; distance [T, S] int32, slots from a key to the query (None without sliding windows); slot [] int32, the
  cache slot of the first token (None without a cache)."""

  cos: Array
  sin: Array
  mask: Array
  valid: Array
  distance: Array | None = None
  slot: Array | None = None


def init_layer_cache(config: TransformerConfig, batch: int, slots: int) -> LayerCache:
  """One layer's empty cache: keys and values, or with latent attention the latent and the rotary key side by side."""
  dtype = config.cache_dtype or config.dtype
  if config.kv_lora_rank:
    return (jnp.zeros((batch, 1, slots, config.kv_lora_rank + config.qk_rope_head_dim), dtype),)
  empty = jnp.zeros((batch, config.num_key_value_heads, slots, config.head_dim), dtype)
  return (empty.swapaxes(2, 3), empty)


def slot_axes(cache: LayerCache) -> tuple[int, ...]:
  """Along which axis each array of a layer's cache holds the tokens."""
  return (3, 2) if len(cache) == 2 else (2,)


class RMSNorm(nn.Module):
  epsilon: float

  @nn.compact
  def __call__(self, x: Array) -> Array:
    scale = self.param("scale", nn.with_logical_partitioning(nn.initializers.ones, ("norm",)), (x.shape[-1],))
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.epsilon)
    return wide.astype(x.dtype) * scale.astype(x.dtype)


def attend(query: Array, key: Array, value: Array, mask: Array, scale: float, sinks: Array | None = None) -> Array:
  """softmax(scale * query key^T) value over the keys that mask allows.

  Args:
    query: [B, T, H, d]. key: [B, Hkv, S, d]. value: [B, Hkv, S, v]. H is a multiple of Hkv. mask: [B, T, S] bool.
    sinks: [H] float32, a score per head that enters the softmax's sum and nothing else (gpt-oss).
  Returns:
    [B, T, H, v] in query's dtype; products and softmax are float32.
  """
  (batch, length, heads, width), shared, dtype = query.shape, key.shape[1], query.dtype
  groups = heads // shared
  # [B, Hkv, groups * T, d]: the queries of a key/value head are rows of one batched product.
  query = query.reshape(batch, length, shared, groups, width).transpose(0, 2, 3, 1, 4)
  query = query.reshape(batch, shared, groups * length, width)
  scores = jnp.einsum("bhqd,bhsd->bhqs", query, key.astype(dtype), preferred_element_type=jnp.float32)
  scores = scores.reshape(batch, shared, groups, length, -1) * scale
  scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
  if sinks is None:
    weights = jax.nn.softmax(scores, axis=-1)
  else:
    sink = sinks.astype(jnp.float32).reshape(shared, groups, 1, 1)
    top = jax.lax.stop_gradient(jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), sink))
    weights = jnp.exp(scores - top)
    weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + jnp.exp(sink - top))
  weights = weights.astype(dtype).reshape(batch, shared, groups * length, -1)
  mixed = jnp.einsum("bhqs,bhsd->bhqd", weights, value.astype(dtype))
  return mixed.reshape(batch, heads, length, -1).swapaxes(1, 2)


class Attention(nn.Module):
  """x [B, T, D] -> ([B, T, D], the layer's cache with the new tokens, or None if it was given none)."""

  config: TransformerConfig

  @nn.compact
  def __call__(self, x: Array, context: Context, window: Array | int | None, cache: LayerCache | None):
    mask = context.mask if window is None else context.mask & (context.distance < window)
    mixed, cache = (self._latent if self.config.kv_lora_rank else self._grouped)(x, context, mask, cache)
    batch, length, heads, width = mixed.shape
    shape = (heads, width, x.shape[-1])
    kernel = weight(self, self.config.lora, "out", ("heads", "head_dim", "embed"), shape, inputs=(0, 1))
    out = mixed.reshape(batch, length, -1) @ kernel.astype(x.dtype).reshape(-1, x.shape[-1])
    if self.config.attention_out_bias:
      out = out + self.param("out_bias", zeros("embed"), (x.shape[-1],)).astype(x.dtype)
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
      cache = key, value = _extend(cache, (key, value), context.slot)
    sinks = self.param("sinks", zeros("heads"), (c.num_attention_heads,)) if c.attention_sinks else None
    return attend(query, key.swapaxes(2, 3), value, mask, score_scale(c), sinks), cache

  def _latent(self, x: Array, context: Context, mask: Array, cache: LayerCache | None):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

    Keys and values are made from one latent per token. Without a cache they are spelled out; with one, the cache holds
    the latents, and the matrices that would make keys and values of them are applied to queries and results instead.
    """
    c = self.config
    heads, nope, rank = c.num_attention_heads, c.qk_nope_head_dim, c.kv_lora_rank
    rotary = {"cos": context.cos, "sin": context.sin, "interleaved": c.rope_interleave}

    source = x
    if c.q_lora_rank:
      source = self._project(x, "query_down", (c.q_lora_rank,), None, c.qkv_bias)
      source = RMSNorm(1e-6, name="query_norm")(source)
    width = None if c.q_lora_rank else "embed"
    query = self._project(source, "query", (heads, c.qk_head_dim), "heads", False, width)
    query_nope, query_rope = query[..., :nope], rotate(query[..., nope:], **rotary)

    down = self._project(x, "latent", (rank + c.qk_rope_head_dim,), None, c.qkv_bias)
    latent = RMSNorm(1e-6, name="latent_norm")(down[..., :rank])
    key_rope = rotate(down[..., None, rank:], **rotary)
    shape = (rank, heads, nope + c.v_head_dim)
    up = weight(self, c.lora, "key_value", (None, "heads", "head_dim"), shape).astype(x.dtype)

    if cache is None:
      key_value = jnp.einsum("btr,rhd->bthd", latent, up)
      key_rope = jnp.broadcast_to(key_rope, (*key_value.shape[:3], c.qk_rope_head_dim))
      key = jnp.concatenate([key_value[..., :nope], key_rope], axis=-1).swapaxes(1, 2)
      query = jnp.concatenate([query_nope, query_rope], axis=-1)
      return attend(query, key, key_value[..., nope:].swapaxes(1, 2), mask, score_scale(c)), None

    new = jnp.concatenate([latent, key_rope[:, :, 0]], axis=-1)[:, None]
    cache = (remembered,) = _extend(cache, (new,), context.slot)
    query = jnp.concatenate([jnp.einsum("bthd,rhd->bthr", query_nope, up[..., :nope]), query_rope], axis=-1)
    mixed = attend(query, remembered, remembered, mask, score_scale(c))[..., :rank]
    return jnp.einsum("bthr,rhd->bthd", mixed, up[..., nope:]), cache

  def _project(
    self, x: Array, name: str, shape: tuple[int, ...], axis: str | None, bias: bool, axis_in: str | None = "embed"
  ) -> Array:
    """x [B, T, I] times the parameter `name` [I, *shape]: [B, T, *shape]. The first axis of shape is called `axis`."""
    axes = (axis, "head_dim")[: len(shape)]
    kernel = weight(self, self.config.lora, name, (axis_in, *axes), (x.shape[-1], *shape))
    y = (x @ kernel.astype(x.dtype).reshape(x.shape[-1], -1)).reshape(*x.shape[:2], *shape)
    if bias:
      y = y + self.param(f"{name}_bias", zeros(*axes), shape).astype(x.dtype)
    return y


def _extend(cache: LayerCache, new: LayerCache, slot: Array) -> LayerCache:
  return tuple(
    jax.lax.dynamic_update_slice_in_dim(old, tokens.astype(old.dtype), slot, axis)
    for old, tokens, axis in zip(cache, new, slot_axes(cache), strict=True)
  )
