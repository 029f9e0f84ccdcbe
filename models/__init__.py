"""Mixture-of-experts transformers of the public families, in Flax linen, as implementations of `rspo_jax.types.Policy`.

`models.layers` has the linen modules and `models.huggingface` the checkpoint formats. This package imports
`rspo_jax.types` and `rspo_jax.files` and no other module of the library; training and sampling belong in `rspo_jax`.
"""

from models.config import LoraConfig, RopeScaling, TransformerConfig, tiny_moe
from models.lora import add_lora, merge_lora
from models.policy import build_policy

__all__ = [
  "LoraConfig",
  "RopeScaling",
  "TransformerConfig",
  "add_lora",
  "build_policy",
  "merge_lora",
  "tiny_moe",
]
