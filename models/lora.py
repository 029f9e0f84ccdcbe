"""Low-rank adapters (LoRA, arXiv 2106.09685): added to a model. `models.layers.weights.merge_lora` merges them;
`models.huggingface.adapter` keeps them in PEFT's layout.

With `TransformerConfig.lora.rank` above 0 a policy has, beside every matrix W that is a target, parameters `W_lora_a`
and `W_lora_b`, and computes with W + alpha / rank * A B. Freeze everything else with the pattern `BASE`.
"""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util

from models.config import TransformerConfig
from models.layers.weights import lora_batch_axes
from models.policy import param_shapes
from rspo_jax.types import Array, Params

BASE = r"^(?!.*_lora_[ab]$)"  # a parameter pattern: everything but the adapters


def add_lora(config: TransformerConfig, params: Params, rng: Array) -> Params:
  """Parameters of a base model with fresh adapters beside them: the same function, for B is zero.

  Args:
    config: with `lora` set. params: of the same model without.
  """
  shapes = param_shapes(config)
  flat = dict(traverse_util.flatten_dict(params))
  for number, path in enumerate(path for path in shapes if path[-1].endswith("_lora_a")):
    base, b = (*path[:-1], path[-1].removesuffix("_lora_a")), (*path[:-1], path[-1].removesuffix("a") + "b")
    down = shapes[path].shape
    batch = lora_batch_axes(shapes[base].shape, down, shapes[b].shape)
    init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", batch_axis=tuple(range(batch)))
    flat[path] = init(jax.random.fold_in(rng, number), (*down[:batch], math.prod(down[batch:-1]), down[-1]))
    flat[path] = flat[path].reshape(down)
    flat[b] = jnp.zeros(shapes[b].shape, jnp.float32)
  return traverse_util.unflatten_dict(flat)
