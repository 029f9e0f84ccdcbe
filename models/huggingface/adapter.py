"""LoRA adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`."""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from safetensors.numpy import save_file

from models.config import LoraConfig, TransformerConfig
from models.huggingface.config_json import raise_problems
from models.huggingface.parameters import to_host
from models.huggingface.tensor_files import TensorFiles
from models.huggingface.tensor_map import ParamPath, ParamSlice, tensor_map
from models.policy import param_shapes
from rspo_jax.files import read_json
from rspo_jax.types import Params

WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"

# Settings of adapter_config.json that change the update and are not supported; they must be off.
_UNSUPPORTED = ("use_dora", "use_rslora", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "modules_to_save")

_PREFIX = "base_model.model."  # PEFT's name of transformers' model


def save_adapter(folder: str | Path, config: TransformerConfig, params: Params, *, base: str = "") -> None:
  """Writes the adapters of a model in float32, in the format that PEFT loads.

  Adapters of experts are written expert by expert under their public names. Router and expert adapters can be loaded by
  `load_adapter` and merged; PEFT cannot load them, because transformers 5 fuses those weights in memory.

  Args:
    config, params: with adapters, `config.lora.rank` >= 1.
    base: name or folder of the base model, for adapter_config.json.
  Raises:
    ValueError: a model without adapters, or adapters of fused tensors (gpt-oss's experts).
  """
  flat = traverse_util.flatten_dict(params)
  tensors: dict[str, np.ndarray] = {}
  modules: list[str] = []
  for name, part, a, b in _adapted_tensors(config):
    modules.append(name.removesuffix(".weight"))
    for key, path in (("lora_A", a), ("lora_B", b)):
      array = to_host(flat[path])[part.index].astype(np.float32)
      matrix = array.reshape(-1, config.lora.rank) if path == a else array.reshape(config.lora.rank, -1)
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
  """The parameters of a base model, with the adapters of a folder that `save_adapter` or PEFT wrote.

  Args:
    config: with `lora` set to the rank, alpha and targets of the adapter, see `read_adapter_config`.
    params: of the base model.
  Raises:
    ValueError: another rank or alpha, or adapters of other modules than the targets; lists them.
  """
  folder = Path(folder)
  settings = read_json(folder / SETTINGS)
  rank_alpha = (settings.get("r"), float(settings.get("lora_alpha", 0)))
  if rank_alpha != (config.lora.rank, config.lora.alpha):
    raise ValueError(
      f"{folder / SETTINGS}: rank and alpha are {rank_alpha}, but {(config.lora.rank, config.lora.alpha)} in the "
      "configuration; set lora.rank and lora.alpha to those of the adapter."
    )
  tensors = TensorFiles(folder)
  flat = traverse_util.flatten_dict(params)
  shapes = param_shapes(config)
  arrays: dict[ParamPath, np.ndarray] = {}
  expected: set[str] = set()
  for name, part, a, b in _adapted_tensors(config):
    module = _PREFIX + name.removesuffix(".weight")
    for key, path in ((f"{module}.lora_A.weight", a), (f"{module}.lora_B.weight", b)):
      expected.add(key)
      if key in tensors:
        array = arrays.setdefault(path, np.empty(shapes[path].shape, np.float32))
        array[part.index] = tensors[key].T.reshape(array[part.index].shape)
  raise_problems(
    f"the adapter in {folder} does not fit the configuration",
    [f"{key}: missing" for key in sorted(expected) if key not in tensors]
    + [f"{key}: not a target" for key in tensors if key not in expected],
    "Set lora.targets to the modules of this adapter.",
  )
  return traverse_util.unflatten_dict({**flat, **{path: jnp.asarray(array) for path, array in arrays.items()}})


def read_adapter_config(folder: str | Path, config: TransformerConfig) -> LoraConfig:
  """Rank, alpha and targets of an adapter in PEFT's format.

  Args:
    config: of the base model.
  Raises:
    ValueError: unsupported settings, or modules that the base model does not have; lists them.
  """
  path = Path(folder) / SETTINGS
  settings = read_json(path)
  unsupported = [key for key in _UNSUPPORTED if settings.get(key)]
  raise_problems(f"{path} has settings that are not supported", unsupported, "Merge this adapter with PEFT instead.")
  slices = tensor_map(dataclasses.replace(config, lora=LoraConfig()))
  modules = sorted({name.split(".lora_")[0].removeprefix(_PREFIX) for name in TensorFiles(folder)})
  unknown = [module for module in modules if f"{module}.weight" not in slices]
  raise_problems(
    f"the adapter in {folder} has modules that the base model does not have", unknown, "Name the adapter's base model."
  )
  paths = sorted({"/".join(slices[f"{module}.weight"][0].path) for module in modules})
  return LoraConfig(settings["r"], float(settings["lora_alpha"]), tuple(f"^{path}$" for path in paths))


def _adapted_tensors(config: TransformerConfig) -> list[tuple[str, ParamSlice, ParamPath, ParamPath]]:
  """(name, slice, path of A, path of B) for every checkpoint tensor that has an adapter."""
  if not config.lora.rank:
    raise ValueError("lora.rank is 0, so the model has no adapters; want a rank of 1 or more.")
  shapes = param_shapes(config)
  adapted = []
  for name, slices in tensor_map(dataclasses.replace(config, lora=LoraConfig())).items():
    for part in slices:
      a, b = ((*part.path[:-1], f"{part.path[-1]}_lora_{factor}") for factor in "ab")
      if a in shapes and (len(slices) > 1 or not name.endswith(".weight")):
        raise ValueError(f"{name} has the weights of all experts; their adapters cannot be saved, merge them instead.")
      if a in shapes:
        adapted.append((name, part, a, b))
  return adapted
