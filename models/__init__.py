"""Functional Flax MoE transformers of the public families. They import `rspo_jax.types` and nothing else of the
library.
"""

from models.config import LoraConfig, RopeScaling, TransformerConfig, tiny_moe
from models.policy import build_policy

__all__ = ["LoraConfig", "RopeScaling", "TransformerConfig", "build_policy", "tiny_moe"]
