"""The table of checkpoint tensors of every family: each tensor and the part of a parameter that holds its values.

Loading, saving, adapters and all checks use `tensor_map`. Tensor names are those of published checkpoint files
(`mlp.experts.3.up_proj`); transformers 5 fuses the experts in memory but reads and writes these names too.
"""

import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from models.config import TransformerConfig
from models.huggingface.families import FAMILIES, TensorNames

ParamPath = tuple[str, ...]


class ParamSlice(NamedTuple):
  """The part of a parameter that holds the values of one checkpoint tensor, or of every `step`-th column of it.

  Attributes:
    path: keys from the root of the parameter tree to the array.
    index: leading indices into that array: (layer within the scanned run,), (layer, expert), or ().
    tensor_shape: of the tensor in the checkpoint.
    shape: of `array[index]`.
    transposed: the tensor is a matrix [outputs, inputs] with merged head axes, the parameter is [inputs, outputs].
    columns: (first, step) of the tensor's columns, for tensors in which the columns of two parameters alternate.
  """

  path: ParamPath
  index: tuple[int, ...]
  tensor_shape: tuple[int, ...]
  shape: tuple[int, ...]
  transposed: bool = False
  columns: tuple[int, int] = (0, 1)

  def load(self, tensor: np.ndarray) -> np.ndarray:
    """tensor [*tensor_shape] -> part of the parameter [*shape]."""
    first, step = self.columns
    part = tensor if step == 1 else tensor[..., first::step]
    return (part.T if self.transposed else part).reshape(self.shape)

  def save(self, part: np.ndarray, into: np.ndarray | None = None) -> np.ndarray:
    """part [*shape] -> contiguous tensor [*tensor_shape]; alternating columns are written to the tensor `into`."""
    if into is None:
      tensor = part.reshape(self.tensor_shape[::-1]).T if self.transposed else part.reshape(self.tensor_shape)
      return np.ascontiguousarray(tensor)
    into[..., self.columns[0] :: self.columns[1]] = part
    return into


@functools.lru_cache(maxsize=8)
def tensor_map(config: TransformerConfig) -> dict[str, tuple[ParamSlice, ...]]:
  """The tensors of a checkpoint of this configuration by public name, in the order of the layers.

  All have one slice, except gpt-oss's tensors of gate and up projections, which have two.
  """
  return _TensorMap(config).slices


def param_slices(config: TransformerConfig) -> dict[ParamPath, dict[str, ParamSlice]]:
  """The inverse of `tensor_map`: for every parameter by its path, its slices by tensor name."""
  slices: dict[ParamPath, dict[str, ParamSlice]] = {}
  for name, of_tensor in tensor_map(config).items():
    for part in of_tensor:
      slices.setdefault(part.path, {})[name] = part
  return slices


def param_shape(slices: Mapping[str, ParamSlice]) -> tuple[int, ...]:
  """Shape of the parameter with these slices, a value of `param_slices`."""
  last = next(reversed(slices.values()))  # slices are in the order of layers and experts
  return (*(i + 1 for i in last.index), *last.shape)


class _TensorMap:
  """Builds `tensor_map`. Methods add the tensors of one part of a layer; `layer` is its index in the scanned run."""

  def __init__(self, config: TransformerConfig):
    self.config = config
    self.names: TensorNames = FAMILIES[config.model_type].names
    self.slices: dict[str, tuple[ParamSlice, ...]] = {}
    width = config.hidden_size
    self._vector("model.embed_tokens.weight", ("embedding",), (), (config.vocab_size, width))
    number = 0
    for segment, (is_moe, length) in enumerate(config.segments):
      for layer in range(length):
        self._layer(f"model.layers.{number}", f"layers_{segment}", (layer,), is_moe)
        number += 1
    self._vector("model.norm.weight", ("final_norm", "scale"), (), (width,))
    if not config.tie_word_embeddings:
      self._matrix("lm_head", ("lm_head",), (), (width,), (config.vocab_size,))

  def _vector(self, name: str, path: ParamPath, index: tuple[int, ...], shape: tuple[int, ...]):
    """A tensor with the same axes as its parameter."""
    self.slices[name] = (ParamSlice(path, index, shape, shape),)

  def _matrix(
    self, name: str, path: ParamPath, index: tuple[int, ...], inputs: tuple[int, ...], outputs: tuple[int, ...]
  ):
    tensor_shape = (math.prod(outputs), math.prod(inputs))
    self.slices[f"{name}.weight"] = (ParamSlice(path, index, tensor_shape, (*inputs, *outputs), True),)

  def _bias(self, name: str, path: ParamPath, index: tuple[int, ...], outputs: tuple[int, ...]):
    self.slices[f"{name}.bias"] = (ParamSlice(path, index, (math.prod(outputs),), outputs),)

  def _layer(self, name: str, segment: str, layer: tuple[int], is_moe: bool):
    c = self.config
    self._vector(f"{name}.input_layernorm.weight", (segment, "attention_norm", "scale"), layer, (c.hidden_size,))
    self._vector(f"{name}.post_attention_layernorm.weight", (segment, "mlp_norm", "scale"), layer, (c.hidden_size,))
    self._attention(f"{name}.self_attn", (segment, "attention"), layer)
    if is_moe:
      self._experts(f"{name}.{self.names.block}", (segment, "moe"), layer)
    else:
      self._mlp(f"{name}.mlp", (segment, "mlp"), layer, c.intermediate_size)

  def _attention(self, name: str, path: ParamPath, layer: tuple[int]):
    c = self.config
    (self._latent_attention if c.kv_lora_rank else self._grouped_attention)(name, path, layer)
    heads = (c.num_attention_heads, c.v_head_dim if c.kv_lora_rank else c.head_dim)
    self._matrix(f"{name}.o_proj", (*path, "out"), layer, heads, (c.hidden_size,))
    if c.attention_out_bias:
      self._bias(f"{name}.o_proj", (*path, "out_bias"), layer, (c.hidden_size,))

  def _grouped_attention(self, name: str, path: ParamPath, layer: tuple[int]):
    c = self.config
    for letter, param, heads in (
      ("q", "query", c.num_attention_heads),
      ("k", "key", c.num_key_value_heads),
      ("v", "value", c.num_key_value_heads),
    ):
      outputs = (heads, c.head_dim)
      self._matrix(f"{name}.{letter}_proj", (*path, param), layer, (c.hidden_size,), outputs)
      if c.qkv_bias:
        self._bias(f"{name}.{letter}_proj", (*path, f"{param}_bias"), layer, outputs)
      if c.qk_norm != "none" and letter != "v":
        normed = c.head_dim if c.qk_norm == "head" else heads * c.head_dim
        self._vector(f"{name}.{letter}_norm.weight", (*path, f"{param}_norm", "scale"), layer, (normed,))
    if c.attention_sinks:
      self._vector(f"{name}.sinks", (*path, "sinks"), layer, (c.num_attention_heads,))

  def _latent_attention(self, name: str, path: ParamPath, layer: tuple[int]):
    c = self.config
    width, query = c.hidden_size, (c.num_attention_heads, c.qk_head_dim)
    if c.q_lora_rank:
      self._matrix(f"{name}.q_a_proj", (*path, "query_down"), layer, (width,), (c.q_lora_rank,))
      if c.qkv_bias:
        self._bias(f"{name}.q_a_proj", (*path, "query_down_bias"), layer, (c.q_lora_rank,))
      self._vector(f"{name}.q_a_layernorm.weight", (*path, "query_norm", "scale"), layer, (c.q_lora_rank,))
      self._matrix(f"{name}.q_b_proj", (*path, "query"), layer, (c.q_lora_rank,), query)
    else:
      self._matrix(f"{name}.q_proj", (*path, "query"), layer, (width,), query)
    latent = (c.kv_lora_rank + c.qk_rope_head_dim,)
    self._matrix(f"{name}.kv_a_proj_with_mqa", (*path, "latent"), layer, (width,), latent)
    if c.qkv_bias:
      self._bias(f"{name}.kv_a_proj_with_mqa", (*path, "latent_bias"), layer, latent)
    self._vector(f"{name}.kv_a_layernorm.weight", (*path, "latent_norm", "scale"), layer, (c.kv_lora_rank,))
    key_value = (c.num_attention_heads, c.qk_nope_head_dim + c.v_head_dim)
    self._matrix(f"{name}.kv_b_proj", (*path, "key_value"), layer, (c.kv_lora_rank,), key_value)

  def _mlp(self, name: str, path: ParamPath, index: tuple[int, ...], inner: int):
    gate, up, down = self.names.projections
    width = self.config.hidden_size
    self._matrix(f"{name}.{gate}", (*path, "gate"), index, (width,), (inner,))
    self._matrix(f"{name}.{up}", (*path, "up"), index, (width,), (inner,))
    self._matrix(f"{name}.{down}", (*path, "down"), index, (inner,), (width,))

  def _experts(self, name: str, path: ParamPath, layer: tuple[int]):
    c, names = self.config, self.names
    if c.is_dense:
      self._mlp(name, path, (*layer, 0), c.moe_intermediate_size)
      return
    self._matrix(f"{name}.{names.router}", (*path, "router"), layer, (c.hidden_size,), (c.num_experts,))
    if c.router_logit_bias:
      self._bias(f"{name}.{names.router}", (*path, "router_logit_bias"), layer, (c.num_experts,))
    if c.router_bias:
      self._vector(f"{name}.{names.router_bias}", (*path, "router_bias"), layer, (c.num_experts,))
    if names.fused:
      self._fused_experts(f"{name}.experts", path, layer)
    else:
      for expert in range(c.num_experts):
        self._mlp(f"{name}.experts.{expert}", path, (*layer, expert), c.moe_intermediate_size)
    if c.shared_expert_intermediate_size:
      self._mlp(f"{name}.{names.shared}", (*path, "shared"), layer, c.shared_expert_intermediate_size)
    if c.shared_expert_gate:
      self._matrix(f"{name}.{names.shared}_gate", (*path, "shared_gate"), layer, (c.hidden_size,), (1,))

  def _fused_experts(self, name: str, path: ParamPath, layer: tuple[int]):
    """gpt-oss: one tensor for all experts of a layer, gate and up projections in alternating columns."""
    experts, width, inner = self.config.num_experts, self.config.hidden_size, self.config.moe_intermediate_size
    for suffix, inputs in (("", (width,)), ("_bias", ())):
      self.slices[f"{name}.gate_up_proj{suffix}"] = tuple(
        ParamSlice(
          (*path, f"{half}{suffix}"),
          layer,
          (experts, *inputs, 2 * inner),
          (experts, *inputs, inner),
          columns=(first, 2),
        )
        for first, half in enumerate(("gate", "up"))
      )
    self._vector(f"{name}.down_proj", (*path, "down"), layer, (experts, inner, width))
    self._vector(f"{name}.down_proj_bias", (*path, "down_bias"), layer, (experts, width))
