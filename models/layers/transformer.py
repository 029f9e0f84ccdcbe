"""The decoder: layers of attention followed by routed experts or a dense SwiGLU.

Families differ by `TransformerConfig` only; tests/models/families_test.py compares each with its model in transformers.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from models.config import TransformerConfig
from models.layers.attention import Attention, Context, LayerCache, RMSNorm
from models.layers.mlp import DenseMLP, MoE
from models.layers.rotary import rotary_angles
from models.layers.weights import matrix_init
from rspo_jax.types import Array, Layout, Probe, Replay


class LayerInputs(NamedTuple):
  """Inputs of a single layer.

  Attributes:
    cache: see `models.layers.attention.LayerCache`; None without a cache.
    probe_inputs: of this layer. replay: of this layer, leaves [B, T, K].
    window: length of the sliding window in tokens, [] int32 in a scan; None in a model without sliding windows.
  """

  cache: LayerCache | None = None
  probe_inputs: Any = None
  replay: Replay | None = None
  window: Array | int | None = None


class Block(nn.Module):
  """One layer: x [B, T, D] -> (x [B, T, D], (updated cache or None, output of the probe or None))."""

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
  """tokens [B, T] -> (hidden [B, T, D] after the final norm, output of the probe with leaves [L, ...])."""

  config: TransformerConfig
  probe: Probe
  layout: Layout | None = None

  @nn.compact
  def __call__(self, tokens: Array, valid: Array, probe_inputs: Any = None, replay: Replay | None = None):
    c = self.config
    embedding = self.param("embedding", matrix_init(("vocab", "embed"), 1, 0), (c.vocab_size, c.hidden_size))
    if not c.tie_word_embeddings:
      self.param("lm_head", matrix_init(("embed", "vocab"), 0, 1), (c.hidden_size, c.vocab_size))
    x = embedding.astype(c.dtype)[tokens]
    length = tokens.shape[1]
    cos, sin = rotary_angles(c, jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0))
    # A padded query attends to itself, so that its softmax is defined.
    mask = jnp.tril(valid[:, None, :] & jnp.ones((1, length, 1), bool)) | jnp.eye(length, dtype=bool)
    slots = jnp.arange(length)
    distance = slots[:, None] - slots if c.sliding_layers else None
    context = Context(cos, sin, mask, valid, distance)

    # In a loop XLA cannot merge the recomputation with the forward pass; unrolled layers need a barrier for that.
    block = nn.remat(Block, prevent_cse=not c.scan_layers) if c.remat else Block
    outputs, layer, moe_layer = [], 0, 0
    for number, (is_moe, depth) in enumerate(c.segments):
      inputs = LayerInputs()
      if is_moe:
        part = slice(moe_layer, moe_layer + depth)
        inputs = jax.tree.map(lambda leaf, part=part: leaf[part], LayerInputs(None, probe_inputs, replay))
        moe_layer += depth
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
        outputs.append(probed)
    hidden = RMSNorm(c.rms_norm_eps, name="final_norm")(x)
    return hidden, jax.tree.map(lambda *parts: jnp.concatenate(parts), *outputs)
