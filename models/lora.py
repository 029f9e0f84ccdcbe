"""LoRA adapters (arXiv 2106.09685): low-rank updates beside the matrices of a model, added and merged.

With `TransformerConfig.lora.rank` above 0 a policy has parameters `W_lora_a` and `W_lora_b` beside every target matrix
W, and computes with W + alpha / rank * A B. Freeze all other parameters with the pattern `BASE`. `models.huggingface`
saves and loads adapters in PEFT's layout.
"""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util

from models.config import TransformerConfig
from models.layers.weights import lora_batch_axes, merge_lora
from models.policy import param_shapes
from rspo_jax.types import Array, Params

__all__ = ["BASE", "add_lora", "merge_lora"]

BASE = r"^(?!.*_lora_[ab]$)"  # matches the path of every parameter except the adapters


def add_lora(config: TransformerConfig, params: Params, rng: Array) -> Params:
  """The parameters of a base model with new adapters, which leave its function unchanged because B is zero.

  Args:
    config: with `lora` set. params: of the same model without adapters. rng: for A.
  """
  shapes = param_shapes(config)
  flat = dict(traverse_util.flatten_dict(params))
  for number, path in enumerate(path for path in shapes if path[-1].endswith("_lora_a")):
    base, b = (*path[:-1], path[-1].removesuffix("_lora_a")), (*path[:-1], path[-1].removesuffix("a") + "b")
    shape = shapes[path].shape
    batch = lora_batch_axes(shapes[base].shape, shape, shapes[b].shape)
    init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", batch_axis=tuple(range(batch)))
    a = init(jax.random.fold_in(rng, number), (*shape[:batch], math.prod(shape[batch:-1]), shape[-1]))
    flat[path] = a.reshape(shape)
    flat[b] = jnp.zeros(shapes[b].shape, jnp.float32)
  return traverse_util.unflatten_dict(flat)
