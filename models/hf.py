"""Qwen3-MoE weights and configurations of Hugging Face, to and from ours. Numpy only.

`tensor_map` is the one table that says which tensor of a checkpoint lies where in our parameters; loading, saving and
every check below walk it. Names are the public per-expert ones that checkpoints on disk have (`mlp.experts.3.up_proj`);
transformers 5 fuses the experts in memory but still reads and writes these.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from models.config import TransformerConfig
from rspo_jax.types import Params


class Slot(NamedTuple):
  """Where one tensor of a checkpoint lies in our parameters.

  Attributes:
    path: keys from the root of the parameter tree to the array.
    index: place within that array: (layer of the scanned run,), or with the expert behind it, or ().
    shape: of the tensor in the checkpoint. ours: of `array[index]`.
    transposed: matrices are [outputs, inputs] there and [inputs, outputs] here; their head axes are merged there.
  """

  path: tuple[str, ...]
  index: tuple[int, ...]
  shape: tuple[int, ...]
  ours: tuple[int, ...]
  transposed: bool

  def load(self, tensor: np.ndarray) -> np.ndarray:
    """A checkpoint's tensor [*shape] as ours [*ours]."""
    return (tensor.T if self.transposed else tensor).reshape(self.ours)

  def save(self, array: np.ndarray) -> np.ndarray:
    """Our array [*ours] as the checkpoint's tensor [*shape], contiguous."""
    return np.ascontiguousarray(array.reshape(self.shape[::-1]).T if self.transposed else array.reshape(self.shape))


def tensor_map(config: TransformerConfig) -> dict[str, Slot]:
  """Every tensor of a checkpoint of this configuration, by its public name, in the order of the layers."""
  width, head = config.hidden_size, config.head_dim
  slots: dict[str, Slot] = {}

  def put(name: str, path: tuple[str, ...], index: tuple[int, ...], ours: tuple[int, ...], shape=None):
    """shape is given for what the checkpoint holds transposed, and is `ours` for all else."""
    slots[f"{name}.weight"] = Slot(path, index, shape or ours, ours, shape is not None)

  def put_mlp(name: str, path: tuple[str, ...], index: tuple[int, ...], inner: int):
    put(f"{name}.gate_proj", (*path, "gate"), index, (width, inner), (inner, width))
    put(f"{name}.up_proj", (*path, "up"), index, (width, inner), (inner, width))
    put(f"{name}.down_proj", (*path, "down"), index, (inner, width), (width, inner))

  put("model.embed_tokens", ("embedding",), (), (config.vocab_size, width))
  layer = 0
  for number, (is_moe, length) in enumerate(config.segments):
    run = f"layers_{number}"
    for at in range(length):
      name, attention = f"model.layers.{layer}", (run, "attention")
      put(f"{name}.input_layernorm", (run, "attention_norm", "scale"), (at,), (width,))
      put(f"{name}.post_attention_layernorm", (run, "mlp_norm", "scale"), (at,), (width,))
      for key, ours, heads in (
        ("q", "query", config.num_attention_heads),
        ("k", "key", config.num_key_value_heads),
        ("v", "value", config.num_key_value_heads),
      ):
        put(f"{name}.self_attn.{key}_proj", (*attention, ours), (at,), (width, heads, head), (heads * head, width))
      heads = config.num_attention_heads
      put(f"{name}.self_attn.o_proj", (*attention, "out"), (at,), (heads, head, width), (width, heads * head))
      put(f"{name}.self_attn.q_norm", (*attention, "query_norm", "scale"), (at,), (head,))
      put(f"{name}.self_attn.k_norm", (*attention, "key_norm", "scale"), (at,), (head,))
      if is_moe:
        experts = config.num_experts
        put(f"{name}.mlp.gate", (run, "moe", "router"), (at,), (width, experts), (experts, width))
        for expert in range(experts):
          put_mlp(f"{name}.mlp.experts.{expert}", (run, "moe"), (at, expert), config.moe_intermediate_size)
      else:
        put_mlp(f"{name}.mlp", (run, "mlp"), (at,), config.intermediate_size)
      layer += 1
  put("model.norm", ("final_norm", "scale"), (), (width,))
  if not config.tie_word_embeddings:
    put("lm_head", ("lm_head",), (), (width, config.vocab_size), (config.vocab_size, width))
  return slots


def param_shapes(config: TransformerConfig) -> dict[tuple[str, ...], tuple[int, ...]]:
  """Shape of every array of our parameters, by its path."""
  shapes: dict[tuple[str, ...], tuple[int, ...]] = {}
  for slot in tensor_map(config).values():
    # The last slot of a path has the highest index: the table runs through layers and experts in order.
    shapes[slot.path] = (*(i + 1 for i in slot.index), *slot.ours)
  return shapes


def params_from_hf(config: TransformerConfig, tensors: Mapping[str, np.ndarray]) -> Params:
  """A checkpoint's tensors as our parameters, float32.

  Args:
    tensors: by public name, any floating dtype (bfloat16 through ml_dtypes). Each is looked up once and not kept, so
      a mapping that reads from disk on access streams. With tied embeddings a copy in "lm_head.weight" is welcome if
      it equals the embedding.
  Raises:
    ValueError: tensors that are missing, not expected, or of another shape; all of them named.
  """
  slots = tensor_map(config)
  extra = [name for name in tensors if name not in slots]
  if config.tie_word_embeddings and "lm_head.weight" in extra:
    if not np.array_equal(tensors["lm_head.weight"], tensors.get("model.embed_tokens.weight")):
      raise ValueError(
        "tie_word_embeddings is true but lm_head.weight differs from model.embed_tokens.weight; "
        "set tie_word_embeddings to false to keep both."
      )
    extra.remove("lm_head.weight")
  problems = [f"{name}: missing, wanted {slot.shape}" for name, slot in slots.items() if name not in tensors]
  problems += [f"{name}: not expected by this configuration" for name in extra]

  flat = {path: np.empty(shape, np.float32) for path, shape in param_shapes(config).items()}
  for name, slot in slots.items():
    if name not in tensors:
      continue
    tensor = np.asarray(tensors[name])
    if tensor.shape != slot.shape:
      problems.append(f"{name}: found {tensor.shape}, wanted {slot.shape}")
    else:
      flat[slot.path][slot.index] = slot.load(tensor)
  fused = any(name.endswith(("experts.gate_up_proj", "experts.down_proj")) for name in extra)
  cure = (
    "These are transformers' fused in-memory names; save_pretrained writes the per-expert ones wanted here."
    if fused
    else "Check that the configuration is this checkpoint's own."
  )
  _refuse("the checkpoint does not fit the configuration", problems, cure)
  return _nest(flat)


def params_to_hf(config: TransformerConfig, params: Params) -> dict[str, np.ndarray]:
  """Our parameters (or their gradients) as a checkpoint's tensors by public name, in our dtype.

  Raises:
    ValueError: arrays that are missing, not expected, or of another shape; all of them named.
  """
  shapes, flat = param_shapes(config), _flatten(params)
  problems = [f"{'/'.join(path)}: missing, wanted {shapes[path]}" for path in shapes if path not in flat]
  problems += [f"{'/'.join(path)}: not expected by this configuration" for path in flat if path not in shapes]
  problems += [
    f"{'/'.join(path)}: found {flat[path].shape}, wanted {shape}"
    for path, shape in shapes.items()
    if path in flat and flat[path].shape != shape
  ]
  _refuse("the parameters do not fit the configuration", problems, "Pass the configuration they were made with.")
  return {name: slot.save(flat[slot.path][slot.index]) for name, slot in tensor_map(config).items()}


# Hugging Face's names that are ours too, with the value its Qwen3MoeConfig takes when config.json leaves it out.
_DEFAULTS = {
  "vocab_size": 151936,
  "hidden_size": 2048,
  "num_hidden_layers": 24,
  "num_attention_heads": 32,
  "num_key_value_heads": 4,
  "num_experts_per_tok": 8,
  "moe_intermediate_size": 768,
  "intermediate_size": 6144,
  "decoder_sparse_step": 1,
  "norm_topk_prob": False,
  "rms_norm_eps": 1e-6,
  "tie_word_embeddings": False,
}
_DEFAULT_NUM_EXPERTS, _DEFAULT_ROPE_THETA = 128, 10_000.0

# What would change the numbers and is not built: (key, values that mean it is off).
_UNSUPPORTED = (
  ("attention_bias", (False, None)),
  ("use_sliding_window", (False, None)),
  ("hidden_act", ("silu", None)),
  ("attention_dropout", (0, None)),
)


def config_from_hf(hf: Mapping[str, Any], **ours: Any) -> TransformerConfig:
  """A parsed `config.json` of a Qwen3-MoE model as our configuration.

  Both spellings are read: the public one (`num_experts`, `rope_theta`, `torch_dtype`) and the one transformers 5 writes
  (`num_local_experts`, `rope_parameters`, `dtype`). What is left out has transformers' default, `norm_topk_prob`
  False and `head_dim` hidden_size / num_attention_heads among them.

  Args:
    ours: fields of `TransformerConfig` to set instead of what the file says, for instance dtype or remat.
  Raises:
    ValueError: another model family, or a setting that this model does not have.
  """
  if hf.get("model_type") != "qwen3_moe":
    raise ValueError(f"model_type is {hf.get('model_type')!r}; only 'qwen3_moe' checkpoints can be read.")
  problems = [f"{key} is {hf[key]!r}, supported: {off[0]!r}" for key, off in _UNSUPPORTED if hf.get(key) not in off]
  fields = {name: default if hf.get(name) is None else hf[name] for name, default in _DEFAULTS.items()}
  fields["head_dim"] = hf.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"]
  fields["mlp_only_layers"] = tuple(hf.get("mlp_only_layers") or ())
  fields["num_experts"] = _either(hf, "num_experts", "num_local_experts", _DEFAULT_NUM_EXPERTS, problems)

  rope = {**(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}
  kind = rope.get("rope_type", rope.get("type", "default"))
  if kind != "default" or rope.get("partial_rotary_factor", 1) != 1:
    problems.append(f"rotary positions are {rope}, supported: rope_type 'default' over the whole head")
  fields["rope_theta"] = float(rope.get("rope_theta") or hf.get("rope_theta") or _DEFAULT_ROPE_THETA)

  dtype = str(_either(hf, "dtype", "torch_dtype", "float32", problems)).removeprefix("torch.")
  # A float16 checkpoint loads (parameters become float32), but to compute in its range is no option.
  fields["dtype"] = "float32" if dtype == "float16" else dtype
  _refuse("this configuration cannot be run", problems, "Use a checkpoint without these settings.")
  return TransformerConfig(**{**fields, **ours})


def _either(hf: Mapping[str, Any], first: str, second: str, default: Any, problems: list[str]) -> Any:
  """The value of a key that has two spellings."""
  given = [hf[key] for key in (first, second) if hf.get(key) is not None]
  if len(given) == 2 and given[0] != given[1]:
    problems.append(f"{first} is {given[0]!r} but {second} is {given[1]!r}, supported: one value")
  return given[0] if given else default


def _refuse(what: str, problems: list[str], cure: str, shown: int = 20) -> None:
  if problems:
    more = [f"... and {len(problems) - shown} more"] if len(problems) > shown else []
    raise ValueError("\n  ".join([f"{what}:", *problems[:shown], *more, cure]))


def _nest(flat: Mapping[tuple[str, ...], np.ndarray]) -> dict[str, Any]:
  tree: dict[str, Any] = {}
  for path, leaf in flat.items():
    branch = tree
    for key in path[:-1]:
      branch = branch.setdefault(key, {})
    branch[path[-1]] = leaf
  return tree


def _flatten(tree: Mapping[str, Any], above: tuple[str, ...] = ()) -> dict[tuple[str, ...], np.ndarray]:
  flat: dict[tuple[str, ...], np.ndarray] = {}
  items: Iterable[tuple[str, Any]] = tree.items()
  for key, value in items:
    if isinstance(value, Mapping):
      flat.update(_flatten(value, (*above, key)))
    else:
      flat[(*above, key)] = np.asarray(value)
  return flat
