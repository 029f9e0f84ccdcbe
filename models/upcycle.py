"""A dense checkpoint as a mixture of experts: copied experts behind a fresh router (arXiv 2212.05055)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from models.config import TransformerConfig
from rspo_jax.types import Array, Params

# The dense family -> the family of experts that has the same attention.
FAMILY_OF = {"qwen2": "qwen2_moe", "qwen3": "qwen3_moe"}


def upcycle(
  config: TransformerConfig,
  params: Params,
  rng: Array,
  *,
  num_experts: int,
  num_experts_per_tok: int,
  noise: float = 0.0,
  router_std: float = 0.02,
) -> tuple[TransformerConfig, Params]:
  """Every layer's MLP becomes `num_experts` copies of itself behind a router.

  The chosen experts' weights sum to 1, so without noise the new model computes the same function as the dense one. The
  copies part as soon as the router sends them different tokens. qwen2_moe always has a shared expert beside them: it
  begins as another copy with a down projection of zeros, and so adds nothing at first.

  Args:
    config, params: of a dense model, family qwen2 or qwen3.
    noise: standard deviation of what is added to the experts' matrices, as a share of each matrix's own.
    router_std: standard deviation of the router's weights.
  Returns:
    the configuration and parameters of the mixture; parameters of the dense one are shared where they are the same.
  Raises:
    ValueError: not a dense family, or fewer than two experts.
  """
  if config.model_type not in FAMILY_OF or not config.is_dense:
    raise ValueError(f"model_type is {config.model_type!r}; only dense {' and '.join(FAMILY_OF)} can be upcycled.")
  if num_experts < 2:
    raise ValueError(f"num_experts is {num_experts}; want at least 2.")
  shared = config.model_type == "qwen2"
  mixture = dataclasses.replace(
    config,
    model_type=FAMILY_OF[config.model_type],
    num_experts=num_experts,
    num_experts_per_tok=num_experts_per_tok,
    intermediate_size=config.moe_intermediate_size,
    shared_expert_intermediate_size=config.moe_intermediate_size if shared else 0,
    shared_expert_gate=shared,
    norm_topk_prob=True,
  )

  def experts_of(run: str, dense: Mapping[str, Array]) -> dict[str, Any]:
    key = jax.random.fold_in(rng, int(run.removeprefix("layers_")))
    moe: dict[str, Any] = {}
    for number, (name, matrix) in enumerate(sorted(dense.items())):
      copies = jnp.repeat(matrix, num_experts, axis=1)
      if noise:
        draw = jax.random.normal(jax.random.fold_in(key, number), copies.shape, jnp.float32)
        copies = copies + (noise * jnp.std(matrix, axis=(-2, -1), keepdims=True) * draw).astype(copies.dtype)
      moe[name] = copies
    layers, _, width, _ = dense["gate"].shape
    router = jax.random.normal(jax.random.fold_in(key, len(dense)), (layers, width, num_experts), jnp.float32)
    moe["router"] = (router_std * router).astype(dense["gate"].dtype)
    if shared:
      moe["shared"] = {name: matrix[:, 0] for name, matrix in dense.items()}
      moe["shared"]["down"] = jnp.zeros_like(moe["shared"]["down"])
      moe["shared_gate"] = jnp.zeros((layers, width, 1), dense["gate"].dtype)
    return moe

  new = {
    name: value | {"moe": experts_of(name, value["moe"])} if name.startswith("layers_") else value
    for name, value in params.items()
  }
  return mixture, new
