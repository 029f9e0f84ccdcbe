"""Which tensor of a Hugging Face checkpoint lies where in our parameters, for every family.

`tensor_map` is the one table: loading, saving and every check walk it. Names are the public ones that checkpoints on
disk have (`mlp.experts.3.up_proj`); transformers 5 fuses the experts in memory but still reads and writes these.
"""

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import traverse_util
from jax.experimental import multihost_utils

from models.config import TransformerConfig
from models.huggingface.config_json import raise_problems
from models.huggingface.families import FAMILIES, Names
from rspo_jax.types import Array, Params

ArrayPath = tuple[str, ...]


class Slot(NamedTuple):
  """Where one tensor of a checkpoint, or every `step`-th column of it, lies in our parameters.

  Attributes:
    path: keys from the root of the parameter tree to the array.
    index: place within that array: (layer of the scanned run,), or with the expert behind it, or ().
    shape: of the tensor in the checkpoint. ours: of `array[index]`.
    transposed: matrices are [outputs, inputs] there and [inputs, outputs] here; their head axes are merged there.
    columns: first column and step, where two of our arrays alternate along the tensor's last axis.
  """

  path: ArrayPath
  index: tuple[int, ...]
  shape: tuple[int, ...]
  ours: tuple[int, ...]
  transposed: bool = False
  columns: tuple[int, int] = (0, 1)

  def load(self, tensor: np.ndarray) -> np.ndarray:
    """A checkpoint's tensor [*shape] as ours [*ours]."""
    first, step = self.columns
    part = tensor if step == 1 else tensor[..., first::step]
    return (part.T if self.transposed else part).reshape(self.ours)

  def save(self, array: np.ndarray, into: np.ndarray | None = None) -> np.ndarray:
    """Our array [*ours] as the checkpoint's tensor [*shape], contiguous; alternating columns go into `into`."""
    if into is None:
      merged = array.reshape(self.shape[::-1]).T if self.transposed else array.reshape(self.shape)
      return np.ascontiguousarray(merged)
    into[..., self.columns[0] :: self.columns[1]] = array
    return into


@functools.lru_cache(maxsize=8)
def tensor_map(config: TransformerConfig) -> dict[str, tuple[Slot, ...]]:
  """Every tensor of a checkpoint of this configuration, by its public name, in the order of the layers."""
  slots: dict[str, tuple[Slot, ...]] = {}

  def vector(name: str, path: ArrayPath, index: tuple[int, ...], shape: tuple[int, ...], heads: tuple[int, ...] = ()):
    """heads: our shape, where the checkpoint merges the heads."""
    slots[name] = (Slot(path, index, shape, heads or shape),)

  def matrix(name: str, path: ArrayPath, index: tuple[int, ...], inputs: tuple[int, ...], outputs: tuple[int, ...]):
    shape = (int(np.prod(outputs)), int(np.prod(inputs)))
    slots[f"{name}.weight"] = (Slot(path, index, shape, (*inputs, *outputs), True),)

  def bias(name: str, path: ArrayPath, index: tuple[int, ...], outputs: tuple[int, ...]):
    vector(f"{name}.bias", path, index, (int(np.prod(outputs)),), outputs)

  def mlp(name: str, names: tuple[str, str, str], path: ArrayPath, index: tuple[int, ...], inner: int):
    gate, up, down = names
    matrix(f"{name}.{gate}", (*path, "gate"), index, (width,), (inner,))
    matrix(f"{name}.{up}", (*path, "up"), index, (width,), (inner,))
    matrix(f"{name}.{down}", (*path, "down"), index, (inner,), (width,))

  def grouped_attention(name: str, path: ArrayPath, at: tuple[int]):
    c = config
    for key, ours, heads in (
      ("q", "query", c.num_attention_heads),
      ("k", "key", c.num_key_value_heads),
      ("v", "value", c.num_key_value_heads),
    ):
      shape = (heads, c.head_dim)
      matrix(f"{name}.{key}_proj", (*path, ours), at, (width,), shape)
      if c.qkv_bias:
        bias(f"{name}.{key}_proj", (*path, f"{ours}_bias"), at, shape)
      if c.qk_norm != "none" and key != "v":
        normed = c.head_dim if c.qk_norm == "head" else heads * c.head_dim
        vector(f"{name}.{key}_norm.weight", (*path, f"{ours}_norm", "scale"), at, (normed,))
    if c.attention_sinks:
      vector(f"{name}.sinks", (*path, "sinks"), at, (c.num_attention_heads,))

  def latent_attention(name: str, path: ArrayPath, at: tuple[int]):
    c, query = config, (config.num_attention_heads, config.qk_head_dim)
    if c.q_lora_rank:
      matrix(f"{name}.q_a_proj", (*path, "query_down"), at, (width,), (c.q_lora_rank,))
      if c.qkv_bias:
        bias(f"{name}.q_a_proj", (*path, "query_down_bias"), at, (c.q_lora_rank,))
      vector(f"{name}.q_a_layernorm.weight", (*path, "query_norm", "scale"), at, (c.q_lora_rank,))
      matrix(f"{name}.q_b_proj", (*path, "query"), at, (c.q_lora_rank,), query)
    else:
      matrix(f"{name}.q_proj", (*path, "query"), at, (width,), query)
    latent = (c.kv_lora_rank + c.qk_rope_head_dim,)
    matrix(f"{name}.kv_a_proj_with_mqa", (*path, "latent"), at, (width,), latent)
    if c.qkv_bias:
      bias(f"{name}.kv_a_proj_with_mqa", (*path, "latent_bias"), at, latent)
    vector(f"{name}.kv_a_layernorm.weight", (*path, "latent_norm", "scale"), at, (c.kv_lora_rank,))
    made = (c.num_attention_heads, c.qk_nope_head_dim + c.v_head_dim)
    matrix(f"{name}.kv_b_proj", (*path, "key_value"), at, (c.kv_lora_rank,), made)

  def attention(name: str, path: ArrayPath, at: tuple[int]):
    c = config
    (latent_attention if c.kv_lora_rank else grouped_attention)(name, path, at)
    mixed = (c.num_attention_heads, c.v_head_dim if c.kv_lora_rank else c.head_dim)
    matrix(f"{name}.o_proj", (*path, "out"), at, mixed, (width,))
    if c.attention_out_bias:
      bias(f"{name}.o_proj", (*path, "out_bias"), at, (width,))

  def experts(name: str, path: ArrayPath, at: tuple[int], names: Names):
    c, inner = config, config.moe_intermediate_size
    if c.is_dense:
      mlp(name, names.projections, path, (*at, 0), inner)
      return
    matrix(f"{name}.{names.router}", (*path, "router"), at, (width,), (c.num_experts,))
    if c.router_logit_bias:
      bias(f"{name}.{names.router}", (*path, "router_logit_bias"), at, (c.num_experts,))
    if c.router_bias:
      vector(f"{name}.{names.router_bias}", (*path, "router_bias"), at, (c.num_experts,))
    if names.fused:
      fused_experts(f"{name}.experts", path, at)
    else:
      for expert in range(c.num_experts):
        mlp(f"{name}.experts.{expert}", names.projections, path, (*at, expert), inner)
    if c.shared_expert_intermediate_size:
      mlp(f"{name}.{names.shared}", names.projections, (*path, "shared"), at, c.shared_expert_intermediate_size)
    if c.shared_expert_gate:
      matrix(f"{name}.{names.shared}_gate", (*path, "shared_gate"), at, (width,), (1,))

  def fused_experts(name: str, path: ArrayPath, at: tuple[int]):
    experts, inner = config.num_experts, config.moe_intermediate_size
    for suffix, ending, rows in (("", "", (width,)), ("_bias", "_bias", ())):
      both = (experts, *rows, 2 * inner)
      slots[f"{name}.gate_up_proj{suffix}"] = tuple(
        Slot((*path, f"{half}{ending}"), at, both, (experts, *rows, inner), columns=(first, 2))
        for first, half in enumerate(("gate", "up"))
      )
    vector(f"{name}.down_proj", (*path, "down"), at, (experts, inner, width))
    vector(f"{name}.down_proj_bias", (*path, "down_bias"), at, (experts, width))

  width, names = config.hidden_size, FAMILIES[config.model_type].names
  vector("model.embed_tokens.weight", ("embedding",), (), (config.vocab_size, width))
  layer = 0
  for number, (is_moe, length) in enumerate(config.segments):
    run = f"layers_{number}"
    for at in range(length):
      name = f"model.layers.{layer}"
      vector(f"{name}.input_layernorm.weight", (run, "attention_norm", "scale"), (at,), (width,))
      vector(f"{name}.post_attention_layernorm.weight", (run, "mlp_norm", "scale"), (at,), (width,))
      attention(f"{name}.self_attn", (run, "attention"), (at,))
      if is_moe:
        experts(f"{name}.{names.block}", (run, "moe"), (at,), names)
      else:
        mlp(f"{name}.mlp", names.projections, (run, "mlp"), (at,), config.intermediate_size)
      layer += 1
  vector("model.norm.weight", ("final_norm", "scale"), (), (width,))
  if not config.tie_word_embeddings:
    matrix("lm_head", ("lm_head",), (), (width,), (config.vocab_size,))
  return slots


def arrays(config: TransformerConfig) -> dict[ArrayPath, dict[str, Slot]]:
  """The other way round: for every array of our parameters, by its path, the tensors it is made of."""
  found: dict[ArrayPath, dict[str, Slot]] = {}
  for name, slots in tensor_map(config).items():
    for slot in slots:
      found.setdefault(slot.path, {})[name] = slot
  return found


def array_shape(slots: Mapping[str, Slot]) -> tuple[int, ...]:
  """Shape of the array that these slots (a value of `arrays`) fill."""
  last = next(reversed(slots.values()))  # the table runs through layers and experts in order
  return (*(i + 1 for i in last.index), *last.ours)


def params_from_hf(
  config: TransformerConfig,
  tensors: Mapping[str, np.ndarray],
  *,
  dtype: Any = np.float32,
  put: Callable[[ArrayPath, tuple[int, ...], Callable], Any] | None = None,
) -> Params:
  """A checkpoint's tensors as our parameters.

  Args:
    tensors: by public name, any floating dtype (bfloat16 through ml_dtypes). A mapping with an attribute `shapes` (name
      -> shape) is checked before anything is read. Tensors are read array by array and not kept, so a mapping that
      reads from disk on access streams. With tied embeddings a copy in "lm_head.weight" is welcome if it equals the
      embedding; rotary frequencies and the extra layers of multi-token prediction are left aside.
    dtype: of the parameters.
    put: (path, shape, read) -> the array; read(index) gives the part of it that a tuple of slices names. By default
      all of it, in numpy.
  Raises:
    ValueError: tensors that are missing, not expected, or of another shape; all of them named.
  """
  found = getattr(tensors, "shapes", None)
  check_tensors(config, found if found is not None else {name: np.shape(tensors[name]) for name in tensors})
  tied = config.tie_word_embeddings and "lm_head.weight" in tensors
  if tied and not np.array_equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"]):
    raise ValueError(
      "tie_word_embeddings is true but lm_head.weight differs from model.embed_tokens.weight; "
      "set tie_word_embeddings to false to keep both."
    )

  def read(slots: Mapping[str, Slot], index: tuple[slice, ...]) -> np.ndarray:
    shape = array_shape(slots)
    bounds = [part.indices(size) for part, size in zip(index, shape, strict=True)]
    out = np.empty([stop - start for start, stop, _ in bounds], dtype)
    for name, slot in slots.items():
      depth = len(slot.index)
      if all(start <= i < stop for i, (start, stop, _) in zip(slot.index, bounds, strict=False)):
        at = tuple(i - start for i, (start, _, _) in zip(slot.index, bounds, strict=False))
        out[at] = slot.load(np.asarray(tensors[name]))[index[depth:]]
    return out

  flat = {}
  for path, slots in arrays(config).items():
    shape, part = array_shape(slots), functools.partial(read, slots)
    flat[path] = part((slice(None),) * len(shape)) if put is None else put(path, shape, part)
  return traverse_util.unflatten_dict(flat)


def check_tensors(config: TransformerConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
  """ValueError that lists every tensor which is missing, not expected, or of another shape than wanted."""
  slots = tensor_map(config)
  extra = [name for name in shapes if name not in slots and not _left_aside(config, name)]
  problems = [f"{name}: missing, wanted {slot[0].shape}" for name, slot in slots.items() if name not in shapes]
  problems += [f"{name}: not expected by this configuration, found {tuple(shapes[name])}" for name in extra]
  problems += [
    f"{name}: found {tuple(shapes[name])}, wanted {slot[0].shape}"
    for name, slot in slots.items()
    if name in shapes and tuple(shapes[name]) != slot[0].shape
  ]
  cure = "Check that the configuration is this checkpoint's own."
  if any(name.endswith(("experts.gate_up_proj", "experts.down_proj")) for name in extra):
    cure = "These are transformers' fused in-memory names; save_pretrained writes the per-expert ones wanted here."
  elif len(problems) == 1 and problems[0].startswith("lm_head.weight: missing"):
    cure = "Is the head tied to the embedding? Then set tie_word_embeddings to true in config.json."
  raise_problems("the checkpoint does not fit the configuration", problems, cure)


def _left_aside(config: TransformerConfig, name: str) -> bool:
  """Tensors that some public checkpoints hold and the model has no use for."""
  if name == "lm_head.weight":
    return config.tie_word_embeddings
  layer = re.match(r"model\.layers\.(\d+)\.", name)
  prediction = layer is not None and int(layer[1]) >= config.num_hidden_layers and config.model_type == "deepseek_v3"
  return prediction or name.endswith("rotary_emb.inv_freq")


def params_to_hf(config: TransformerConfig, params: Params, dtype: Any = None) -> dict[str, np.ndarray]:
  """Our parameters (or their gradients) as a checkpoint's tensors by public name.

  Args:
    dtype: of the tensors; by default that of the arrays.
  Raises:
    ValueError: arrays that are missing, not expected, or of another shape; all of them named.
  """
  found = dict(tensors_of(config, params, dtype))
  return {name: found[name] for name in tensor_map(config)}


def by_array(config: TransformerConfig) -> list[list[str]]:
  """Names of all tensors, each once, those of one array together: the order in which `tensors_of` gives them."""
  groups, seen = [], set()
  for slots in arrays(config).values():
    names = [name for name in slots if name not in seen]
    seen.update(names)
    if names:
      groups.append(names)
  return groups


def tensors_of(config: TransformerConfig, params: Params, dtype: Any = None) -> Iterator[tuple[str, np.ndarray]]:
  """`params_to_hf` one tensor at a time, array by array: no more than two of our arrays are on the host at once.

  Raises: as `params_to_hf`.
  """
  wanted, flat = arrays(config), traverse_util.flatten_dict(params)
  problems = [
    f"{'/'.join(path)}: missing, wanted {array_shape(slots)}" for path, slots in wanted.items() if path not in flat
  ]
  problems += [f"{'/'.join(path)}: not expected by this configuration" for path in flat if path not in wanted]
  problems += [
    f"{'/'.join(path)}: found {flat[path].shape}, wanted {array_shape(slots)}"
    for path, slots in wanted.items()
    if path in flat and flat[path].shape != array_shape(slots)
  ]
  raise_problems("the parameters do not fit the configuration", problems, "Pass the configuration they were made with.")
  slots, held = tensor_map(config), {}
  for names in by_array(config):
    together = {slot.path for name in names for slot in slots[name]}
    held = {path: to_host(flat[path], dtype) for path in together}
    for name in names:
      into = None
      for slot in slots[name]:
        array = held[slot.path]
        into = np.empty(slot.shape, array.dtype) if slot.columns[1] > 1 and into is None else into
        into = slot.save(array[slot.index], into)
      yield name, into


def to_host(array: Array | np.ndarray, dtype: Any = None) -> np.ndarray:
  """The whole array on this host, gathered from all of them where it is spread."""
  if isinstance(array, jax.Array) and not array.is_fully_addressable:
    array = multihost_utils.process_allgather(array, tiled=True)
  array = np.asarray(array)
  return array if dtype is None else array.astype(dtype, copy=False)
