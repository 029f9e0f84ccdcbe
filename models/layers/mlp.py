"""The feed-forward part of a layer: one dense MLP, or a router with its experts."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from models.config import LoraConfig, TransformerConfig
from models.layers.expert_parallel import run_sharded_experts
from models.layers.experts import Experts
from models.layers.router import route
from models.layers.weights import matrix_param, zeros_init
from rspo_jax.types import Array, Layout, Probe, Replay, RouterOutput


class DenseMLP(nn.Module):
  """x [B, T, D] -> [B, T, D], a SwiGLU of width `inner`."""

  inner: int
  lora: LoraConfig

  @nn.compact
  def __call__(self, x: Array) -> Array:
    width, inner = x.shape[-1], self.inner
    gate = matrix_param(self, self.lora, "gate", ("embed", "mlp"), (width, inner))
    up = matrix_param(self, self.lora, "up", ("embed", "mlp"), (width, inner))
    down = matrix_param(self, self.lora, "down", ("mlp", "embed"), (inner, width))
    return (jax.nn.silu(x @ gate.astype(x.dtype)) * (x @ up.astype(x.dtype))) @ down.astype(x.dtype)


class MoE(nn.Module):
  """x [B, T, D] -> ([B, T, D], output of the probe)."""

  config: TransformerConfig
  probe: Probe
  layout: Layout | None = None

  @nn.compact
  def __call__(self, x: Array, valid: Array, probe_inputs: Any, replay: Replay | None):
    c = self.config
    if c.is_dense:
      logits, bias = jnp.zeros((*x.shape[:2], 1), jnp.float32), None
    else:
      router = matrix_param(self, c.lora, "router", ("embed", None), (x.shape[-1], c.num_experts))
      logits = jnp.matmul(x.astype(jnp.float32), router, precision=jax.lax.Precision.HIGHEST)
      if c.router_logit_bias:
        logits = logits + self.param("router_logit_bias", zeros_init(None), (c.num_experts,))
      bias = self.param("router_bias", zeros_init(None), (c.num_experts,)) if c.router_bias else None
    expert_index, gate = route(c, logits, bias, replay, self.layout)
    probed = self.probe(RouterOutput(logits, expert_index, gate), probe_inputs)

    # Padded positions get the index E, which no expert has, so that they cost no work.
    expert_index = jnp.where(valid[..., None], expert_index, c.num_experts)
    weights, down_bias = self._experts(x)
    y = run_sharded_experts(
      x, expert_index, gate, weights, swiglu_limit=c.swiglu_limit, backend=c.expert_backend, layout=self.layout
    )
    if down_bias is not None:
      expert_gate = jnp.sum(gate[..., None] * (expert_index[..., None] == jnp.arange(c.num_experts)), axis=-2)
      y = y + jnp.matmul(expert_gate, down_bias, preferred_element_type=jnp.float32).astype(x.dtype)
    if c.shared_expert_intermediate_size:
      shared = DenseMLP(c.shared_expert_intermediate_size, c.lora, name="shared")(x)
      if c.shared_expert_gate:
        kernel = matrix_param(self, c.lora, "shared_gate", ("embed", None), (x.shape[-1], 1))
        shared = jax.nn.sigmoid(x @ kernel.astype(x.dtype)) * shared
      y = y + shared
    return y, probed

  def _experts(self, x: Array) -> tuple[Experts, Array | None]:
    """The experts' weights in x's dtype, and the bias [E, D] float32 of their outputs (None without biases)."""
    c = self.config
    experts, width, inner = c.num_experts, x.shape[-1], c.moe_intermediate_size
    up_axes, down_axes = ("experts", "embed", "expert_mlp"), ("experts", "expert_mlp", "embed")
    weights = Experts(
      matrix_param(self, c.lora, "gate", up_axes, (experts, width, inner), inputs=(1,)),
      matrix_param(self, c.lora, "up", up_axes, (experts, width, inner), inputs=(1,)),
      matrix_param(self, c.lora, "down", down_axes, (experts, inner, width), inputs=(1,)),
    )
    down_bias = None
    if c.expert_bias:
      gate_bias, up_bias = (
        self.param(name, zeros_init("experts", "expert_mlp"), (experts, inner)) for name in ("gate_bias", "up_bias")
      )
      weights = weights._replace(gate_bias=gate_bias, up_bias=up_bias)
      down_bias = self.param("down_bias", zeros_init("experts", "embed"), (experts, width))
    return jax.tree.map(lambda w: w.astype(x.dtype), weights), down_bias
