"""Folders of Hugging Face checkpoints: `config.json` and `*.safetensors`, loaded and saved tensor by tensor."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from flax import traverse_util
from safetensors.numpy import save_file

from models.config import TransformerConfig
from models.huggingface.config_json import config_from_hf, config_to_hf
from models.huggingface.parameters import iterate_tensors, params_from_hf, tensor_groups
from models.huggingface.quantized import Dequantized
from models.huggingface.tensor_files import INDEX, SINGLE, TensorFiles
from models.huggingface.tensor_map import ParamPath, tensor_map
from models.policy import build_policy
from rspo_jax.files import read_json
from rspo_jax.types import Layout, Params

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}

Progress = Callable[[int], None]  # called with the number of bytes of every finished array or tensor


def read_config(folder: str | Path, **changes: Any) -> TransformerConfig:
  """The configuration of a checkpoint folder.

  Args:
    changes: fields of the configuration to set, see `models.huggingface.config_json.config_from_hf`.
  Raises:
    ValueError: an absent or unsupported `config.json`; names the file.
  """
  path = Path(folder) / "config.json"
  try:
    return config_from_hf(read_json(path), **changes)
  except ValueError as error:
    raise ValueError(f"{path}: {error}") if str(path) not in str(error) else error from None


def load_pretrained(
  folder: str | Path,
  layout: Layout | None = None,
  *,
  dtype: str = "float32",
  progress: Progress = lambda done: None,
  **changes: Any,
) -> tuple[TransformerConfig, Params]:
  """The configuration and the parameters of a checkpoint.

  Each parameter is assembled from its tensors and moved to its devices before the next is read, so the host needs
  memory for one parameter beside those on its devices. A process reads only the parts for its own devices.

  Args:
    folder: with `config.json` and one safetensors file, or several and an index.
    layout: the mesh over which parameters are sharded; None places them on the default device.
    dtype: of the parameters, "float32" or "bfloat16".
    progress: called with the number of bytes of every loaded parameter.
    changes: fields of the configuration to set, see `config_from_hf`.
  Raises:
    ValueError: names the file or the tensors with errors, and the cure.
  """
  config = read_config(folder, **changes)
  files = TensorFiles(folder)
  shardings = _shardings(config, layout)

  def put(path: ParamPath, shape: tuple[int, ...], read: Callable) -> jax.Array:
    parts: dict[Any, np.ndarray] = {}

    def part(index: tuple[slice, ...]) -> np.ndarray:
      key = tuple((s.start, s.stop) for s in index)
      if key not in parts:  # the callback is called once per device, also for replicas
        parts[key] = read(index)
      return parts[key]

    array = jax.make_array_from_callback(shape, shardings[path], part)
    array.block_until_ready()
    progress(array.nbytes)
    return array

  tensors = Dequantized(files, files.shapes)
  try:
    return config, params_from_hf(config, tensors, dtype=DTYPES[dtype], put=put)
  except ValueError as error:
    raise ValueError(f"{folder}: {error}") from error


def _shardings(config: TransformerConfig, layout: Layout | None) -> dict[ParamPath, jax.sharding.Sharding]:
  axes = traverse_util.flatten_dict(build_policy(config).logical_axes())
  if layout is None:
    return dict.fromkeys(axes, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
  return {path: layout.sharding(*names) for path, names in axes.items()}


def save_pretrained(
  folder: str | Path,
  config: TransformerConfig,
  params: Params,
  *,
  source: str | Path | None = None,
  dtype: str | None = None,
  shard_bytes: int = 5 * 10**9,
  progress: Progress = lambda done: None,
) -> None:
  """Writes a checkpoint that transformers, vLLM and SGLang load: public names, split into files with an index.

  The folder is renamed into place when all of its files are on disk, so it is complete or absent. All processes must
  call this; the first one writes.

  Args:
    source: the folder that the parameters were loaded from. Its tokenizer, templates and other small files are copied,
      and entries of its `config.json` that do not concern the model are kept.
    dtype: of the tensors; None is that of the source's `config.json`, or else of the parameters.
    shard_bytes: maximum size of a file in bytes.
    progress: called with the number of bytes of every gathered tensor.
  Raises:
    ValueError: the folder is not empty, or the parameters do not fit the configuration.
  """
  folder = Path(folder)
  if folder.exists() and any(folder.iterdir()):
    raise ValueError(f"{folder} is not empty; name a new folder.")
  entries = config_to_hf(config)
  if source is not None:
    entries = _merge_entries(read_json(Path(source) / "config.json"), entries)
  name = dtype or (source and source_dtype(source)) or str(np.dtype(jax.tree.leaves(params)[0].dtype))
  entries["torch_dtype"] = name
  slices = tensor_map(config)
  sizes = {
    key: int(np.prod(slices[key][0].tensor_shape)) * np.dtype(DTYPES[name]).itemsize
    for group in tensor_groups(config)
    for key in group
  }
  shards = _shards(sizes, shard_bytes)

  writes = jax.process_index() == 0
  if writes:
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
  try:
    tensors = iterate_tensors(config, params, DTYPES[name])
    for file, names in shards.items():
      shard = {}
      for _ in names:
        key, tensor = next(tensors)
        shard[key] = tensor
        progress(tensor.nbytes)
      if writes:
        save_file(shard, partial / file, metadata={"format": "pt"})
    if writes:
      if len(shards) > 1:
        weight_map = {key: file for file, names in shards.items() for key in names}
        _write_json(partial / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map})
      if source is not None:
        _copy_small_files(Path(source), partial)
      _write_json(partial / "config.json", entries)
      _move_into_place(partial, folder)
  finally:
    if writes:
      shutil.rmtree(partial, ignore_errors=True)


def _move_into_place(partial: Path, folder: Path) -> None:
  """Renames a complete folder, after its files are on disk."""
  for path in partial.iterdir():
    _sync(path)
  if folder.exists():
    folder.rmdir()
  partial.chmod(0o755)
  os.replace(partial, folder)
  _sync(folder.parent)


def _shards(sizes: Mapping[str, int], limit: int) -> dict[str, list[str]]:
  """File name -> names of its tensors, in the given order. sizes: name -> bytes; limit: bytes per file."""
  groups: list[list[str]] = [[]]
  used = 0
  for name, size in sizes.items():
    if groups[-1] and used + size > limit:
      groups.append([])
      used = 0
    groups[-1].append(name)
    used += size
  if len(groups) == 1:
    return {SINGLE: groups[0]}
  return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, start=1)}


def source_dtype(source: str | Path) -> str | None:
  """The dtype of the weights according to a folder's `config.json`; None if it is none of `DTYPES`."""
  entries = read_json(Path(source) / "config.json")
  name = str(entries.get("dtype") or entries.get("torch_dtype") or "").removeprefix("torch.")
  return name if name in DTYPES else None


def _merge_entries(source: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
  """The source's entries if they describe the configuration of `new`; else `new` with neutral entries of the source.

  Entries about quantisation are dropped, because weights are written unpacked.
  """
  source = {key: value for key, value in source.items() if key not in ("quantization_config", "dtype", "torch_dtype")}
  if "num_nextn_predict_layers" in source:
    source["num_nextn_predict_layers"] = 0  # layers of multi-token prediction are not loaded
  same = source.get("model_type") == new["model_type"] and config_from_hf(source) == config_from_hf(
    {key: value for key, value in new.items() if key != "torch_dtype"}
  )
  if same:
    return source
  neutral = ("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings", "initializer_range")
  return new | {key: source[key] for key in neutral if key in source}


def _copy_small_files(source: Path, target: Path) -> None:
  """Copies all files except weights, hidden files and `config.json`."""
  for path in sorted(source.iterdir()):
    is_weights = path.name.endswith((".safetensors", ".bin", ".pt", ".pth", ".gguf", INDEX))
    if path.is_file() and not is_weights and not path.name.startswith(".") and path.name != "config.json":
      shutil.copyfile(path, target / path.name)
  if (source / "additional_chat_templates").is_dir():
    shutil.copytree(source / "additional_chat_templates", target / "additional_chat_templates")


def _write_json(path: Path, value: Any) -> None:
  path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _sync(path: Path) -> None:
  handle = os.open(path, os.O_RDONLY)
  try:
    os.fsync(handle)
  finally:
    os.close(handle)
