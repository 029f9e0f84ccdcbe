"""How parameters are made: initialisers with logical axis names, and low-rank updates beside matrices."""

import dataclasses
import re
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from flax import traverse_util

from models.config import LoraConfig, TransformerConfig
from rspo_jax.types import Array, Params

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


def merge_lora(config: TransformerConfig, params: Params) -> tuple[TransformerConfig, Params]:
  """The configuration and parameters without adapters that compute the same: W + alpha / rank * A B in W's place."""
  if not config.lora.rank:
    return config, params
  flat = traverse_util.flatten_dict(params)
  merged = {}
  for path, leaf in flat.items():
    a, b = ((*path[:-1], f"{path[-1]}_lora_{which}") for which in "ab")
    if a in flat:
      merged[path] = (leaf + lora_update(config.lora, leaf.shape, flat[a], flat[b])).astype(leaf.dtype)
    elif not path[-1].endswith(("_lora_a", "_lora_b")):
      merged[path] = leaf
  return dataclasses.replace(config, lora=LoraConfig()), traverse_util.unflatten_dict(merged)
