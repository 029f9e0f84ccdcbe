"""LoRA adapters in the layout of PEFT: `adapter_config.json` and `adapter_model.safetensors`."""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from safetensors.numpy import save_file

from models.config import LoraConfig, TransformerConfig
from models.huggingface.checkpoint import TensorFiles
from models.huggingface.config_json import raise_problems
from models.huggingface.tensor_map import ArrayPath, Slot, tensor_map, to_host
from models.policy import param_shapes
from rspo_jax.files import read_json
from rspo_jax.types import Params

WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"

# Entries of adapter_config.json that must be off.
_UNKNOWN = ("use_dora", "use_rslora", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "modules_to_save")


_PREFIX = "base_model.model."  # PEFT's wrapping of transformers' model


def save_adapter(folder: str | Path, config: TransformerConfig, params: Params, *, base: str = "") -> None:
  """Writes the adapters as PEFT reads them: `adapter_config.json` and `adapter_model.safetensors`, in float32.

  Experts are written one by one, under their public names. Router and expert adapters are for our own `load_adapter`
  and for merging: transformers 5 keeps those weights in fused tensors that PEFT cannot address by these names.

  Args:
    base: name or folder of the base model, for adapter_config.json.
  Raises:
    ValueError: a model without adapters, or adapters of tensors that hold several of our arrays (gpt-oss's experts).
  """
  flat = traverse_util.flatten_dict(params)
  tensors: dict[str, np.ndarray] = {}
  modules: list[str] = []
  for name, slot, a, b in _adapted(config):
    modules.append(name.removesuffix(".weight"))
    for key, path, merged in (("lora_A", a, True), ("lora_B", b, False)):
      part = to_host(flat[path])[slot.index].astype(np.float32)
      matrix = part.reshape(-1, config.lora.rank) if merged else part.reshape(config.lora.rank, -1)
      tensors[f"{_PREFIX}{modules[-1]}.{key}.weight"] = np.ascontiguousarray(matrix.T)
  folder = Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
  settings = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": base,
    "r": config.lora.rank,
    "lora_alpha": config.lora.alpha,
    "lora_dropout": 0.0,
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "target_modules": modules,
  }
  (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def load_adapter(folder: str | Path, config: TransformerConfig, params: Params) -> Params:
  """Parameters of the base model with the adapters of a folder that `save_adapter` or PEFT wrote.

  Args:
    config: with `lora` set to the rank, alpha and targets of the adapter.
  Raises:
    ValueError: another rank or alpha, or adapters of other modules than the targets; names them.
  """
  folder = Path(folder)
  settings = read_json(folder / SETTINGS)
  found = (settings.get("r"), float(settings.get("lora_alpha", 0)))
  if found != (config.lora.rank, config.lora.alpha):
    raise ValueError(
      f"{folder / SETTINGS}: rank and alpha are {found}, the configuration's are "
      f"{(config.lora.rank, config.lora.alpha)}; set lora.rank and lora.alpha to the former."
    )
  tensors = TensorFiles(folder)
  flat = traverse_util.flatten_dict(params)
  shapes = param_shapes(config)
  arrays: dict[ArrayPath, np.ndarray] = {}
  wanted: set[str] = set()
  for name, slot, a, b in _adapted(config):
    module = _PREFIX + name.removesuffix(".weight")
    for key, path in ((f"{module}.lora_A.weight", a), (f"{module}.lora_B.weight", b)):
      wanted.add(key)
      if key in tensors:
        array = arrays.setdefault(path, np.empty(shapes[path].shape, np.float32))
        array[slot.index] = tensors[key].T.reshape(array[slot.index].shape)
  raise_problems(
    f"the adapter in {folder} does not fit the configuration",
    [f"{key}: missing" for key in sorted(wanted) if key not in tensors]
    + [f"{key}: not a target" for key in tensors if key not in wanted],
    "Set lora.targets to the modules that this adapter has.",
  )
  return traverse_util.unflatten_dict({**flat, **{path: jnp.asarray(array) for path, array in arrays.items()}})


def read_adapter_config(folder: str | Path, config: TransformerConfig) -> LoraConfig:
  """Rank, alpha and targets of an adapter in PEFT's layout, for this base model.

  Raises:
    ValueError: settings that change what is computed and are not known here, or modules that the model does not have.
  """
  path = Path(folder) / SETTINGS
  settings = read_json(path)
  strange = [key for key in _UNKNOWN if settings.get(key)]
  raise_problems(f"{path} has settings that are not known here", strange, "Merge this adapter with PEFT instead.")
  slots = tensor_map(dataclasses.replace(config, lora=LoraConfig()))
  modules = sorted({name.split(".lora_")[0].removeprefix(_PREFIX) for name in TensorFiles(folder)})
  absent = [module for module in modules if f"{module}.weight" not in slots]
  raise_problems(f"the adapter in {folder} is of another model; unknown modules", absent, "Name its own base model.")
  paths = sorted({"/".join(slots[f"{module}.weight"][0].path) for module in modules})
  return LoraConfig(settings["r"], float(settings["lora_alpha"]), tuple(f"^{path}$" for path in paths))


def _adapted(config: TransformerConfig) -> list[tuple[str, Slot, ArrayPath, ArrayPath]]:
  """(tensor, its slot, paths of A and B) for every matrix of a checkpoint that has an adapter."""
  if not config.lora.rank:
    raise ValueError("lora.rank is 0: this model has no adapters.")
  shapes = param_shapes(config)
  found = []
  for name, slots in tensor_map(dataclasses.replace(config, lora=LoraConfig())).items():
    for slot in slots:
      a, b = ((*slot.path[:-1], f"{slot.path[-1]}_lora_{which}") for which in "ab")
      if a in shapes and (len(slots) > 1 or not name.endswith(".weight")):
        raise ValueError(f"{name} holds all experts at once; adapters of them can be merged, not saved on their own.")
      if a in shapes:
        found.append((name, slot, a, b))
  return found
