"""Folders of Hugging Face checkpoints: `config.json` and `*.safetensors`, read and written tensor by tensor."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from flax import traverse_util
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from models.config import TransformerConfig
from models.huggingface.config_json import config_from_hf, config_to_hf
from models.huggingface.quantized import Dequantized
from models.huggingface.tensor_map import ArrayPath, by_array, params_from_hf, tensor_map, tensors_of
from models.policy import build_policy
from rspo_jax.files import read_json
from rspo_jax.types import Layout, Params

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}

Progress = Callable[[int], None]  # told the bytes of every array or tensor that is done


class TensorFiles(Mapping[str, np.ndarray]):
  """The tensors of a checkpoint folder by name; each is read from its file when it is asked for, and not kept.

  Attributes:
    shapes: name -> shape.
  Raises:
    ValueError: no weights; a file of the index that is absent, truncated or something else; or a tensor that is not in
      the file the index names.
  """

  def __init__(self, folder: str | Path):
    self._folder = Path(folder)
    self._files = _weight_map(self._folder)
    self._open: dict[str, Any] = {}
    self.shapes: dict[str, tuple[int, ...]] = {}
    for name, file in self._files.items():
      try:
        self.shapes[name] = tuple(self._handle(file).get_slice(name).get_shape())
      except SafetensorError as error:
        raise ValueError(
          f"{self._folder / file} does not hold {name}, though {INDEX} says so ({error}); download both again."
        ) from error

  def _handle(self, file: str):
    if file not in self._open:
      self._open[file] = open_safetensors(self._folder / file)
    return self._open[file]

  def __getitem__(self, name: str) -> np.ndarray:
    return self._handle(self._files[name]).get_tensor(name)

  def __iter__(self) -> Iterator[str]:
    return iter(self._files)

  def __len__(self) -> int:
    return len(self._files)


def open_safetensors(path: Path):
  """A handle on a file; ValueError names it if it is absent, truncated or something else."""
  try:
    return safe_open(path, framework="numpy")
  except FileNotFoundError:
    raise ValueError(f"{path} is absent, though {INDEX} names it; download that file again.") from None
  except (SafetensorError, OSError) as error:
    size = path.stat().st_size
    raise ValueError(
      f"{path} ({size} bytes) is truncated or not a safetensors file ({error}); download that file again."
    ) from error


def _weight_map(folder: Path) -> dict[str, str]:
  """tensor name -> file name."""
  if (folder / INDEX).exists():
    return read_json(folder / INDEX)["weight_map"]
  files = sorted(path.name for path in folder.glob("*.safetensors"))
  if not files:
    other = sorted(path.name for path in folder.glob("*.bin"))
    cure = (
      f"{other[0]} is a pickle; save it as safetensors with transformers."
      if other
      else "Is this a checkpoint's folder?"
    )
    raise ValueError(f"{folder} holds no *.safetensors. {cure}")
  if len(files) > 1 and SINGLE not in files:
    raise ValueError(f"{folder} holds {len(files)} safetensors files but no {INDEX}; download the index too.")
  file = SINGLE if SINGLE in files else files[0]
  return {name: file for name in open_safetensors(folder / file).keys()}  # noqa: SIM118, a handle is no mapping


def read_config(folder: str | Path, **ours: Any) -> TransformerConfig:
  """The configuration in a checkpoint's folder; see `models.huggingface.config_json.config_from_hf`."""
  path = Path(folder) / "config.json"
  try:
    return config_from_hf(read_json(path), **ours)
  except ValueError as error:
    raise ValueError(f"{path}: {error}") if str(path) not in str(error) else error from None


def load_pretrained(
  folder: str | Path,
  layout: Layout | None = None,
  *,
  dtype: str = "float32",
  progress: Progress = lambda done: None,
  **ours: Any,
) -> tuple[TransformerConfig, Params]:
  """A checkpoint's configuration and parameters.

  Every array is put together from its tensors, moved to its devices, and forgotten on the host before the next: beside
  the parameters themselves the host holds one array at a time. A process reads what its own devices hold.

  Args:
    folder: with `config.json` and safetensors, one file or several with an index.
    layout: the mesh that parameters are split over; None puts them on the default device.
    dtype: of the parameters, "float32" or "bfloat16".
    progress: told the bytes of every array when it is in place.
    ours: fields of the configuration to set, see `config_from_hf`.
  Raises:
    ValueError: names the file or the tensors at fault, and the cure.
  """
  config = read_config(folder, **ours)
  tensors = TensorFiles(folder)
  shardings = _shardings(config, layout)

  def put(path: ArrayPath, shape: tuple[int, ...], read: Callable) -> jax.Array:
    parts: dict[Any, np.ndarray] = {}

    def part(index: tuple[slice, ...]) -> np.ndarray:
      key = tuple((s.start, s.stop) for s in index)
      if key not in parts:  # replicas ask for the same part again
        parts[key] = read(index)
      return parts[key]

    array = jax.make_array_from_callback(shape, shardings[path], part)
    array.block_until_ready()
    progress(array.nbytes)
    return array

  found = Dequantized(tensors, tensors.shapes)
  try:
    return config, params_from_hf(config, found, dtype=DTYPES[dtype], put=put)
  except ValueError as error:
    raise ValueError(f"{folder}: {error}") from error


def _shardings(config: TransformerConfig, layout: Layout | None) -> dict[ArrayPath, jax.sharding.Sharding]:
  axes = traverse_util.flatten_dict(build_policy(config).logical_axes())
  if layout is None:
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return dict.fromkeys(axes, here)
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
  """Writes parameters as a checkpoint that transformers, vLLM and SGLang load: public names, sharded, with an index.

  The folder appears under its name when all of it is on disk, or not at all. All processes take part, the first writes.

  Args:
    source: the folder the parameters came from: its tokenizer, templates and other small files come along, and what
      its `config.json` says of things that are none of ours.
    dtype: of the tensors; by default that of the source's `config.json`, or of the parameters.
    shard_bytes: largest size of a file.
    progress: told the bytes of every tensor when it is written.
  Raises:
    ValueError: the folder holds something already; the parameters do not fit the configuration.
  """
  folder = Path(folder)
  if folder.exists() and any(folder.iterdir()):
    raise ValueError(f"{folder} is not empty; name a new folder.")
  settings = config_to_hf(config)
  if source is not None:
    settings = _carried_settings(read_json(Path(source) / "config.json"), settings)
  name = dtype or (source and source_dtype(source)) or str(np.dtype(jax.tree.leaves(params)[0].dtype))
  settings["torch_dtype"] = name
  size = np.dtype(DTYPES[name]).itemsize
  slots = tensor_map(config)
  ordered = {key: slots[key][0].shape for group in by_array(config) for key in group}
  shards = _shards(ordered, size, shard_bytes)

  writes = jax.process_index() == 0
  if writes:
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
  try:
    tensors = tensors_of(config, params, DTYPES[name])
    for file, names in shards.items():
      held = {}
      for _ in names:
        key, tensor = next(tensors)
        held[key] = tensor
        progress(tensor.nbytes)
      if writes:
        save_file(held, partial / file, metadata={"format": "pt"})
    if writes:
      if len(shards) > 1:
        index = {key: file for file, names in shards.items() for key in names}
        total = sum(int(np.prod(shape)) * size for shape in ordered.values())
        _write_json(partial / INDEX, {"metadata": {"total_size": total}, "weight_map": index})
      if source is not None:
        _carry_files(Path(source), partial)
      _write_json(partial / "config.json", settings)
      for path in partial.iterdir():
        _sync(path)
      if folder.exists():
        folder.rmdir()
      partial.chmod(0o755)
      os.replace(partial, folder)
      _sync(folder.parent)
  finally:
    if writes:
      shutil.rmtree(partial, ignore_errors=True)


def _shards(shapes: Mapping[str, tuple[int, ...]], itemsize: int, limit: int) -> dict[str, list[str]]:
  """file name -> the tensors in it, in the order given."""
  groups: list[list[str]] = [[]]
  used = 0
  for name, shape in shapes.items():
    size = int(np.prod(shape)) * itemsize
    if groups[-1] and used + size > limit:
      groups.append([])
      used = 0
    groups[-1].append(name)
    used += size
  if len(groups) == 1:
    return {SINGLE: groups[0]}
  return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, start=1)}


def source_dtype(source: str | Path) -> str | None:
  """The type that a folder's `config.json` gives for its weights, if it is one of `DTYPES`."""
  found = read_json(Path(source) / "config.json")
  name = str(found.get("dtype") or found.get("torch_dtype") or "").removeprefix("torch.")
  return name if name in DTYPES else None


def _carried_settings(found: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
  """The source's `config.json` where it says the same as our configuration, else ours with the source's other entries.

  Weights are written unpacked, so what it says of quantization is dropped.
  """
  found = {key: value for key, value in found.items() if key not in ("quantization_config", "dtype", "torch_dtype")}
  if "num_nextn_predict_layers" in found:
    found["num_nextn_predict_layers"] = 0  # multi-token prediction is left aside when loading
  same = found.get("model_type") == ours["model_type"] and config_from_hf(found) == config_from_hf(
    {key: value for key, value in ours.items() if key != "torch_dtype"}
  )
  if same:
    return found
  neutral = ("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings", "initializer_range")
  return ours | {key: found[key] for key in neutral if key in found}


def _carry_files(source: Path, target: Path) -> None:
  for path in sorted(source.iterdir()):
    weights = path.name.endswith((".safetensors", ".bin", ".pt", ".pth", ".gguf", INDEX))
    if path.is_file() and not weights and not path.name.startswith(".") and path.name != "config.json":
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
