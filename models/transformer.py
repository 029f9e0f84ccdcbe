"""The layers of a decoder: attention, then experts behind a float32 router, or a dense SwiGLU.

Families differ by `TransformerConfig` alone; tests/families_test.py holds every one to transformers' own model.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from models.attention import Attention, Context, LayerCache, RMSNorm
from models.config import LoraConfig, TransformerConfig
from models.expert_parallel import run_sharded_experts
from models.moe import Experts
from models.rotary import rotary_angles
from models.router import route
from models.weights import matrix, weight, zeros
from rspo_jax.types import Array, Layout, Probe, Replay, RouterOutput


class LayerInputs(NamedTuple):
  """What one layer alone gets. cache: see `models.attention`; replay: leaves [B, T, K]; window: tokens that a query
  sees, [] int32 where layers are scanned, None in a model without sliding windows."""

  cache: LayerCache | None = None
  probe_inputs: Any = None
  replay: Replay | None = None
  window: Array | int | None = None


class DenseMLP(nn.Module):
  """x [B, T, D] -> [B, T, D] through a SwiGLU of this width."""

  inner: int
  lora: LoraConfig

  @nn.compact
  def __call__(self, x: Array) -> Array:
    width, inner = x.shape[-1], self.inner
    gate = weight(self, self.lora, "gate", ("embed", "mlp"), (width, inner))
    up = weight(self, self.lora, "up", ("embed", "mlp"), (width, inner))
    down = weight(self, self.lora, "down", ("mlp", "embed"), (inner, width))
    return (jax.nn.silu(x @ gate.astype(x.dtype)) * (x @ up.astype(x.dtype))) @ down.astype(x.dtype)


class MoE(nn.Module):
  """x [B, T, D] -> ([B, T, D], what the probe saw)."""

  config: TransformerConfig
  probe: Probe
  layout: Layout | None = None

  @nn.compact
  def __call__(self, x: Array, valid: Array, probe_inputs: Any, replay: Replay | None):
    c = self.config
    if c.is_dense:
      logits, bias = jnp.zeros((*x.shape[:2], 1), jnp.float32), None
    else:
      router = weight(self, c.lora, "router", ("embed", None), (x.shape[-1], c.num_experts))
      logits = jnp.matmul(x.astype(jnp.float32), router, precision=jax.lax.Precision.HIGHEST)
      if c.router_logit_bias:
        logits = logits + self.param("router_logit_bias", zeros(None), (c.num_experts,))
      bias = self.param("router_bias", zeros(None), (c.num_experts,)) if c.router_bias else None
    expert_index, gate = route(c, logits, bias, replay, self.layout)
    probed = self.probe(RouterOutput(logits, expert_index, gate), probe_inputs)

    # A padded position names expert E: no expert at all, so no work.
    expert_index = jnp.where(valid[..., None], expert_index, c.num_experts)
    weights, down_bias = self._experts(x)
    y = run_sharded_experts(
      x, expert_index, gate, weights, swiglu_limit=c.swiglu_limit, backend=c.expert_backend, layout=self.layout
    )
    if down_bias is not None:
      share = jnp.sum(gate[..., None] * (expert_index[..., None] == jnp.arange(c.num_experts)), axis=-2)
      y = y + jnp.matmul(share, down_bias, preferred_element_type=jnp.float32).astype(x.dtype)
    if c.shared_expert_intermediate_size:
      shared = DenseMLP(c.shared_expert_intermediate_size, c.lora, name="shared")(x)
      if c.shared_expert_gate:
        kernel = weight(self, c.lora, "shared_gate", ("embed", None), (x.shape[-1], 1))
        shared = jax.nn.sigmoid(x @ kernel.astype(x.dtype)) * shared
      y = y + shared
    return y, probed

  def _experts(self, x: Array) -> tuple[Experts, Array | None]:
    """The weights in x's dtype, and the bias [E, D] float32 of what comes out of an expert."""
    c = self.config
    experts, width, inner = c.num_experts, x.shape[-1], c.moe_intermediate_size
    inward, outward = ("experts", "embed", "expert_mlp"), ("experts", "expert_mlp", "embed")
    weights = Experts(
      weight(self, c.lora, "gate", inward, (experts, width, inner), inputs=(1,)),
      weight(self, c.lora, "up", inward, (experts, width, inner), inputs=(1,)),
      weight(self, c.lora, "down", outward, (experts, inner, width), inputs=(1,)),
    )
    down_bias = None
    if c.expert_bias:
      gate_bias, up_bias = (
        self.param(name, zeros("experts", "expert_mlp"), (experts, inner)) for name in ("gate_bias", "up_bias")
      )
      weights = weights._replace(gate_bias=gate_bias, up_bias=up_bias)
      down_bias = self.param("down_bias", zeros("experts", "embed"), (experts, width))
    return jax.tree.map(lambda w: w.astype(x.dtype), weights), down_bias


class Block(nn.Module):
  """One layer. Carries x [B, T, D] and returns (its cache if it was given one, what the probe saw)."""

  config: TransformerConfig
  is_moe: bool
  probe: Probe
  layout: Layout | None = None

  @nn.compact
  def __call__(self, x: Array, context: Context, inputs: LayerInputs):
    c = self.config
    if self.layout is not None:
      x = jax.lax.with_sharding_constraint(x, self.layout.sharding("batch", None, None))
    normed = RMSNorm(c.rms_norm_eps, name="attention_norm")(x)
    update, cache = Attention(c, name="attention")(normed, context, inputs.window, inputs.cache)
    x = x + update
    normed = RMSNorm(c.rms_norm_eps, name="mlp_norm")(x)
    if self.is_moe:
      moe = MoE(c, self.probe, self.layout, name="moe")
      update, probed = moe(normed, context.valid, inputs.probe_inputs, inputs.replay)
    else:
      update, probed = DenseMLP(c.intermediate_size, c.lora, name="mlp")(normed), None
    return x + update, (cache, probed)


class Transformer(nn.Module):
  """tokens [B, T] -> (hidden [B, T, D] after the last norm, what the probe saw, leaves [L, ...])."""

  config: TransformerConfig
  probe: Probe
  layout: Layout | None = None

  @nn.compact
  def __call__(self, tokens: Array, valid: Array, probe_inputs: Any = None, replay: Replay | None = None):
    c = self.config
    embedding = self.param("embedding", matrix(("vocab", "embed"), 1, 0), (c.vocab_size, c.hidden_size))
    if not c.tie_word_embeddings:
      self.param("lm_head", matrix(("embed", "vocab"), 0, 1), (c.hidden_size, c.vocab_size))
    x = embedding.astype(c.dtype)[tokens]
    length = tokens.shape[1]
    cos, sin = rotary_angles(c, jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0))
    # A padded query looks at itself, so that its softmax has something to sum.
    mask = jnp.tril(valid[:, None, :] & jnp.ones((1, length, 1), bool)) | jnp.eye(length, dtype=bool)
    slots = jnp.arange(length)
    distance = slots[:, None] - slots if c.sliding_layers else None
    context = Context(cos, sin, mask, valid, distance)

    block = nn.remat(Block, prevent_cse=False) if c.remat else Block
    seen, layer, first = [], 0, 0
    for number, (is_moe, depth) in enumerate(c.segments):
      inputs = LayerInputs()
      if is_moe:
        part = slice(first, first + depth)
        inputs = jax.tree.map(lambda leaf, part=part: leaf[part], LayerInputs(None, probe_inputs, replay))
        first += depth
      if c.sliding_layers:
        windows = [c.window(i) or length for i in range(layer, layer + depth)]
        inputs = inputs._replace(window=jnp.array(windows, jnp.int32))
      layers = nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast, 0),
        length=depth,
        unroll=1 if c.scan_layers else depth,
        metadata_params={nn.PARTITION_NAME: "layers"},
      )
      x, (_, probed) = layers(c, is_moe, self.probe, self.layout, name=f"layers_{number}")(x, context, inputs)
      layer += depth
      if is_moe:
        seen.append(probed)
    hidden = RMSNorm(c.rms_norm_eps, name="final_norm")(x)
    return hidden, jax.tree.map(lambda *parts: jnp.concatenate(parts), *seen)
