"""Rotary positions: frequencies, stretched or not, and the turning of queries and keys by them."""

import math

import jax.numpy as jnp
import numpy as np

from models.config import RopeScaling, TransformerConfig
from rspo_jax.types import Array


def rotary_angles(config: TransformerConfig, positions: Array) -> tuple[Array, Array]:
  """cos and sin of the rotary angles, [..., head_dim / 2] float32, for integer positions [...].

  Both carry YaRN's attention factor where the configuration asks for one.
  """
  half, scaling = config.head_dim // 2, config.rope_scaling
  frequency = config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  if scaling.rope_type == "linear":
    frequency = frequency / scaling.factor
  elif scaling.rope_type == "yarn":
    kept = _yarn_kept(scaling, config.rope_theta, half)
    frequency = frequency * (kept + (1 - kept) / scaling.factor)
  angles = positions[..., None].astype(jnp.float32) * frequency
  cos, sin, factor = jnp.cos(angles), jnp.sin(angles), attention_factor(scaling)
  return (cos, sin) if factor == 1 else (cos * factor, sin * factor)


def rotate(x: Array, cos: Array, sin: Array, *, interleaved: bool = False) -> Array:
  """Turns x [B, T, H, d] by its position: cos, sin [B, T, d / 2].

  The pairs are (i, i + d / 2), Hugging Face's order; interleaved, they are (2 i, 2 i + 1) and come out in the first
  order, which changes no score as long as queries and keys do the same.
  """
  wide = x.astype(jnp.float32)
  first, second = (wide[..., 0::2], wide[..., 1::2]) if interleaved else jnp.split(wide, 2, axis=-1)
  cos, sin = cos[:, :, None], sin[:, :, None]
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def attention_factor(scaling: RopeScaling) -> float:
  """What YaRN multiplies cosines and sines by (arXiv 2309.00071, section 3.4; DeepSeek splits it by mscale)."""
  if scaling.rope_type != "yarn":
    return 1.0
  if scaling.attention_factor is not None:
    return scaling.attention_factor
  if scaling.mscale and scaling.mscale_all_dim:
    return _mscale(scaling.factor, scaling.mscale) / _mscale(scaling.factor, scaling.mscale_all_dim)
  return _mscale(scaling.factor, 1.0)


def score_scale(config: TransformerConfig) -> float:
  """What attention scores are multiplied by: 1 / sqrt(width of a query), and DeepSeek's part of YaRN squared."""
  scaling, scale = config.rope_scaling, config.qk_head_dim**-0.5
  if config.kv_lora_rank and scaling.rope_type != "default" and scaling.mscale_all_dim:
    scale *= _mscale(scaling.factor, scaling.mscale_all_dim) ** 2
  return scale


def _mscale(factor: float, weight: float) -> float:
  return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _yarn_kept(scaling: RopeScaling, theta: float, half: int) -> np.ndarray:
  """[half] in [0, 1]: how much of a frequency stays as it is; the rest is divided by the factor."""

  def pair_with(turns: float) -> float:
    """The (fractional) pair that turns so often within the original context."""
    return half * math.log(scaling.original_max_position_embeddings / (turns * 2 * math.pi)) / math.log(theta)

  low, high = pair_with(scaling.beta_fast), pair_with(scaling.beta_slow)
  if scaling.truncate:
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, 2 * half - 1)
  ramp = (np.arange(half, dtype=np.float32) - low) / (high - low if high != low else 0.001)
  return 1 - np.clip(ramp, 0, 1)
