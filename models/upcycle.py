"""Upcycling (arXiv 2212.05055): turns a dense model into a mixture of copied experts with a new router."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from models.config import TransformerConfig
from rspo_jax.types import Array, Params

# Dense family -> mixture-of-experts family with the same attention.
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
  """Replaces the MLP of every layer by `num_experts` copies of it and a random router.

  The gates of the selected experts sum to 1, so without noise the mixture computes the dense model's function.
  Copies diverge when the router sends them different tokens. qwen2_moe requires a shared expert: it is initialised as
  another copy with a zero down projection, so its output is zero at first.

  Args:
    config, params: of a dense model of family qwen2 or qwen3.
    rng: for the router and the noise.
    num_experts: >= 2. num_experts_per_tok: in [1, num_experts].
    noise: standard deviation of Gaussian noise added to the experts' matrices, as a share of each matrix's own; >= 0.
    router_std: standard deviation of the router's weights.
  Returns:
    The configuration and parameters of the mixture. Unchanged parameters are the arrays of the dense model.
  Raises:
    ValueError: another family, or fewer than two experts.
  """
  if config.model_type not in FAMILY_OF or not config.is_dense:
    raise ValueError(
      f"model_type is {config.model_type!r}; only dense {' and '.join(FAMILY_OF)} can be upcycled; pass such a model."
    )
  if num_experts < 2:
    raise ValueError(f"num_experts is {num_experts}; want 2 or more.")
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

  def copy_experts(segment: str, dense: Mapping[str, Array]) -> dict[str, Any]:
    key = jax.random.fold_in(rng, int(segment.removeprefix("layers_")))
    moe: dict[str, Any] = {}
    for number, (name, matrix) in enumerate(sorted(dense.items())):
      copies = jnp.repeat(matrix, num_experts, axis=1)
      if noise:
        sample = jax.random.normal(jax.random.fold_in(key, number), copies.shape, jnp.float32)
        copies = copies + (noise * jnp.std(matrix, axis=(-2, -1), keepdims=True) * sample).astype(copies.dtype)
      moe[name] = copies
    layers, _, width, _ = dense["gate"].shape
    router = jax.random.normal(jax.random.fold_in(key, len(dense)), (layers, width, num_experts), jnp.float32)
    moe["router"] = (router_std * router).astype(dense["gate"].dtype)
    if shared:
      moe["shared"] = {name: matrix[:, 0] for name, matrix in dense.items()}
      moe["shared"]["down"] = jnp.zeros_like(moe["shared"]["down"])
      moe["shared_gate"] = jnp.zeros((layers, width, 1), dense["gate"].dtype)
    return moe

  return mixture, {
    name: value | {"moe": copy_experts(name, value["moe"])} if name.startswith("layers_") else value
    for name, value in params.items()
  }
