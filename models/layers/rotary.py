"""Rotary position embeddings: scaled frequencies, and the rotation of queries and keys."""

import math

import jax.numpy as jnp
import numpy as np

from models.config import RopeScaling, TransformerConfig
from rspo_jax.types import Array


def rotary_angles(config: TransformerConfig, positions: Array) -> tuple[Array, Array]:
  """Cosines and sines of the rotary angles, each [..., head_dim / 2] float32, for integer positions [...].

  Both are multiplied by the attention factor of YaRN, if the configuration uses YaRN.
  """
  half, scaling = config.head_dim // 2, config.rope_scaling
  frequency = config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  if scaling.rope_type == "linear":
    frequency = frequency / scaling.factor
  elif scaling.rope_type == "yarn":
    unscaled = _yarn_unscaled(scaling, config.rope_theta, half)
    frequency = frequency * (unscaled + (1 - unscaled) / scaling.factor)
  angles = positions[..., None].astype(jnp.float32) * frequency
  cos, sin, factor = jnp.cos(angles), jnp.sin(angles), attention_factor(scaling)
  return (cos, sin) if factor == 1 else (cos * factor, sin * factor)


def rotate(x: Array, cos: Array, sin: Array, *, interleaved: bool = False) -> Array:
  """Rotates x [B, T, H, d] by its position, given as cos and sin [B, T, d / 2].

  Pairs are (i, i + d / 2), the order of Hugging Face. Interleaved pairs are (2 i, 2 i + 1) and are returned in the
  order of Hugging Face; attention scores do not change, because queries and keys are permuted alike.
  """
  x32 = x.astype(jnp.float32)
  first, second = (x32[..., 0::2], x32[..., 1::2]) if interleaved else jnp.split(x32, 2, axis=-1)
  cos, sin = cos[:, :, None], sin[:, :, None]
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def attention_factor(scaling: RopeScaling) -> float:
  """YaRN's multiplier of cosines and sines (arXiv 2309.00071, section 3.4; DeepSeek splits it by mscale)."""
  if scaling.rope_type != "yarn":
    return 1.0
  if scaling.attention_factor is not None:
    return scaling.attention_factor
  if scaling.mscale and scaling.mscale_all_dim:
    return _mscale(scaling.factor, scaling.mscale) / _mscale(scaling.factor, scaling.mscale_all_dim)
  return _mscale(scaling.factor, 1.0)


def score_scale(config: TransformerConfig) -> float:
  """Scale of attention scores: 1 / sqrt(width of a query), times the square of DeepSeek's part of YaRN."""
  scaling, scale = config.rope_scaling, config.qk_head_dim**-0.5
  if config.kv_lora_rank and scaling.rope_type != "default" and scaling.mscale_all_dim:
    scale *= _mscale(scaling.factor, scaling.mscale_all_dim) ** 2
  return scale


def _mscale(factor: float, weight: float) -> float:
  return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _yarn_unscaled(scaling: RopeScaling, theta: float, half: int) -> np.ndarray:
  """[half] in [0, 1]: weight of the unscaled frequency; the frequency divided by factor has the remaining weight."""

  def pair_index(rotations: float) -> float:
    """The (fractional) index of the pair with this many rotations within the original context."""
    return half * math.log(scaling.original_max_position_embeddings / (rotations * 2 * math.pi)) / math.log(theta)

  low, high = pair_index(scaling.beta_fast), pair_index(scaling.beta_slow)
  if scaling.truncate:
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, 2 * half - 1)
  ramp = (np.arange(half, dtype=np.float32) - low) / (high - low if high != low else 0.001)
  return 1 - np.clip(ramp, 0, 1)
