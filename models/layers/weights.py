"""Parameters of the layers: initialisers with logical axis names, and the low-rank updates of LoRA."""

import dataclasses
import re
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from flax import traverse_util

from models.config import LoraConfig, TransformerConfig
from rspo_jax.types import Array, Params

Axes = tuple[str | None, ...]


def matrix_init(axes: Axes, inputs: int | tuple[int, ...], outputs: int | tuple[int, ...]) -> Callable:
  """Fan-in scaled initialiser of a matrix.

  Args:
    axes: logical axis names. inputs: contracted axes, axes to their left are batch axes. outputs: output axes.
  """
  first = inputs if isinstance(inputs, int) else inputs[0]
  batch = tuple(range(first))
  scaled = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", inputs, outputs, batch_axis=batch)
  return nn.with_logical_partitioning(scaled, axes)


def zeros_init(*axes: str | None) -> Callable:
  return nn.with_logical_partitioning(nn.initializers.zeros, axes)


def matrix_param(
  module: nn.Module, lora: LoraConfig, name: str, axes: Axes, shape: tuple[int, ...], inputs: tuple[int, ...] = (0,)
) -> Array:
  """The parameter `name` of a module, a float32 matrix, plus its low-rank update if its path is a target of LoRA.

  Args:
    axes: logical names of the axes of shape.
    inputs: contracted axes; axes to their left are batch axes, axes to their right are outputs.
  """
  first, last = inputs[0], inputs[-1] + 1
  outputs = tuple(range(last, len(shape)))
  kernel = module.param(name, matrix_init(axes, inputs, outputs), shape, jnp.float32)
  if not is_target(lora, (*module.path, name)):
    return kernel
  down, up = (*shape[:last], lora.rank), (*shape[:first], lora.rank, *shape[last:])
  a = module.param(f"{name}_lora_a", matrix_init((*axes[:last], None), inputs, last), down, jnp.float32)
  b = module.param(f"{name}_lora_b", zeros_init(*axes[:first], None, *axes[last:]), up)
  return kernel + lora_update(lora, kernel.shape, a, b)


def is_target(lora: LoraConfig, path: tuple[str, ...]) -> bool:
  """Whether LoRA updates the matrix at this path, such as ("layers_0", "attention", "query")."""
  return lora.rank > 0 and any(re.search(pattern, "/".join(path)) for pattern in lora.targets)


def lora_batch_axes(matrix: tuple[int, ...], a: tuple[int, ...], b: tuple[int, ...]) -> int:
  """Number of leading batch axes that a matrix shares with its A and B, from their shapes."""
  return len(a) + len(b) - 2 - len(matrix)


def lora_update(lora: LoraConfig, shape: tuple[int, ...], a: Array, b: Array) -> Array:
  """alpha / rank * a b in the shape of the matrix, for a [batch.., inputs.., rank] and b [batch.., rank, outputs..]."""
  batch = shape[: lora_batch_axes(shape, a.shape, b.shape)]
  product = a.reshape(*batch, -1, lora.rank) @ b.reshape(*batch, lora.rank, -1)
  return (lora.alpha / lora.rank) * product.reshape(shape)


def merge_lora(config: TransformerConfig, params: Params) -> tuple[TransformerConfig, Params]:
  """Configuration and parameters of the same function without adapters: W + alpha / rank * A B replaces W."""
  if not config.lora.rank:
    return config, params
  flat = traverse_util.flatten_dict(params)
  merged = {}
  for path, leaf in flat.items():
    a, b = ((*path[:-1], f"{path[-1]}_lora_{factor}") for factor in "ab")
    if a in flat:
      merged[path] = (leaf + lora_update(config.lora, leaf.shape, flat[a], flat[b])).astype(leaf.dtype)
    elif not path[-1].endswith(("_lora_a", "_lora_b")):
      merged[path] = leaf
  return dataclasses.replace(config, lora=LoraConfig()), traverse_util.unflatten_dict(merged)
