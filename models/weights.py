"""How parameters are made: initialisers with logical axis names, and low-rank updates beside matrices."""

import re
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp

from models.config import LoraConfig
from rspo_jax.types import Array

Axes = tuple[str | None, ...]


def matrix(axes: Axes, inputs: int | tuple[int, ...], outputs: int | tuple[int, ...]) -> Callable:
  """Fan-in scaled initialiser: the axes `inputs` are contracted, axes left of them are batched."""
  first = inputs if isinstance(inputs, int) else inputs[0]
  batch = tuple(range(first))
  scaled = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", inputs, outputs, batch_axis=batch)
  return nn.with_logical_partitioning(scaled, axes)


def zeros(*axes: str | None) -> Callable:
  return nn.with_logical_partitioning(nn.initializers.zeros, axes)


def weight(module: nn.Module, lora: LoraConfig, name: str, axes: Axes, shape: tuple[int, ...], inputs=(0,)) -> Array:
  """The matrix `name` of a module, float32, with the low-rank update if its path is a target of LoRA.

  Args:
    axes: logical names of the axes of shape. inputs: the axes that are contracted; those left of them are batched,
      those right of them are outputs.
  """
  first, last = inputs[0], inputs[-1] + 1
  outputs = tuple(range(last, len(shape)))
  kernel = module.param(name, matrix(axes, inputs, outputs), shape, jnp.float32)
  if not is_target(lora, (*module.path, name)):
    return kernel
  down, up = (*shape[:last], lora.rank), (*shape[:first], lora.rank, *shape[last:])
  a = module.param(f"{name}_lora_a", matrix((*axes[:last], None), inputs, last), down, jnp.float32)
  b = module.param(f"{name}_lora_b", zeros(*axes[:first], None, *axes[last:]), up)
  return kernel + lora_update(lora, kernel.shape, a, b)


def is_target(lora: LoraConfig, path: tuple[str, ...]) -> bool:
  return lora.rank > 0 and any(re.search(pattern, "/".join(path)) for pattern in lora.targets)


def lora_batch_axes(matrix: tuple[int, ...], a: tuple[int, ...], b: tuple[int, ...]) -> int:
  """How many leading axes a matrix and its A and B, given by their shapes, have in common."""
  return len(a) + len(b) - 2 - len(matrix)


def lora_update(lora: LoraConfig, shape: tuple[int, ...], a: Array, b: Array) -> Array:
  """alpha / rank * a b, in the shape of the matrix: a [batch.., inputs.., rank], b [batch.., rank, outputs..]."""
  batch = shape[: lora_batch_axes(shape, a.shape, b.shape)]
  product = a.reshape(*batch, -1, lora.rank) @ b.reshape(*batch, lora.rank, -1)
  return (lora.alpha / lora.rank) * product.reshape(shape)
