"""Conversion between the tensors of a checkpoint and our parameters, tensor by tensor."""

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from jax.experimental import multihost_utils

from models.config import TransformerConfig
from models.huggingface.config_json import raise_problems
from models.huggingface.tensor_map import ParamPath, ParamSlice, param_shape, param_slices, tensor_map
from rspo_jax.types import Array, Params


def params_from_hf(
  config: TransformerConfig,
  tensors: Mapping[str, np.ndarray],
  *,
  dtype: Any = np.float32,
  put: Callable[[ParamPath, tuple[int, ...], Callable], Any] | None = None,
) -> Params:
  """Converts the tensors of a checkpoint to our parameters.

  Args:
    tensors: by public name, of any floating dtype (bfloat16 is that of ml_dtypes). They are accessed parameter by
      parameter and not stored, so a mapping may read each tensor from disk on access. If it has an attribute `shapes`
      (name -> shape), shapes are checked before any tensor is read. Rotary frequencies and layers of multi-token
      prediction are ignored. With tied embeddings, "lm_head.weight" is accepted if it equals the embedding.
    dtype: of the parameters.
    put: (path, shape, read) -> the parameter, where read(index) returns the part at a tuple of slices. By default the
      whole array in numpy.
  Raises:
    ValueError: tensors that are missing, unexpected, or of another shape; lists all of them.
  """
  shapes = getattr(tensors, "shapes", None)
  check_tensors(config, {name: np.shape(tensors[name]) for name in tensors} if shapes is None else shapes)
  tied = config.tie_word_embeddings and "lm_head.weight" in tensors
  if tied and not np.array_equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"]):
    raise ValueError(
      "tie_word_embeddings is true but lm_head.weight differs from model.embed_tokens.weight; "
      "set tie_word_embeddings to false to keep both."
    )
  flat = {}
  for path, slices in param_slices(config).items():
    shape, read = param_shape(slices), functools.partial(_read_part, tensors, slices, dtype)
    flat[path] = read((slice(None),) * len(shape)) if put is None else put(path, shape, read)
  return traverse_util.unflatten_dict(flat)


def _read_part(
  tensors: Mapping[str, np.ndarray], slices: Mapping[str, ParamSlice], dtype: Any, index: tuple[slice, ...]
) -> np.ndarray:
  """The part of a parameter at `index`; reads only the tensors that overlap with it."""
  bounds = [part.indices(size) for part, size in zip(index, param_shape(slices), strict=True)]
  out = np.empty([stop - start for start, stop, _ in bounds], dtype)
  for name, part in slices.items():
    depth = len(part.index)
    if all(start <= i < stop for i, (start, stop, _) in zip(part.index, bounds, strict=False)):
      target = tuple(i - start for i, (start, _, _) in zip(part.index, bounds, strict=False))
      out[target] = part.load(np.asarray(tensors[name]))[index[depth:]]
  return out


def check_tensors(config: TransformerConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
  """Checks the tensors of a checkpoint, name -> shape.

  Raises:
    ValueError: tensors that are missing, unexpected, or of another shape; lists all of them.
  """
  expected = {name: slices[0].tensor_shape for name, slices in tensor_map(config).items()}
  unexpected = [name for name in shapes if name not in expected and not _is_ignored(config, name)]
  problems = [f"{name}: missing, want {shape}" for name, shape in expected.items() if name not in shapes]
  problems += [f"{name}: not expected by this configuration, is {tuple(shapes[name])}" for name in unexpected]
  problems += [
    f"{name}: is {tuple(shapes[name])}, want {shape}"
    for name, shape in expected.items()
    if name in shapes and tuple(shapes[name]) != shape
  ]
  cure = "Check that the configuration belongs to this checkpoint."
  if any(name.endswith(("experts.gate_up_proj", "experts.down_proj")) for name in unexpected):
    cure = "These are transformers' fused in-memory names; save_pretrained writes the per-expert tensors wanted here."
  elif len(problems) == 1 and problems[0].startswith("lm_head.weight: missing"):
    cure = "If the head is tied to the embedding, set tie_word_embeddings to true in config.json."
  raise_problems("the checkpoint does not fit the configuration", problems, cure)


def _is_ignored(config: TransformerConfig, name: str) -> bool:
  """Whether it is a tensor that some public checkpoints have and the model does not use."""
  if name == "lm_head.weight":
    return config.tie_word_embeddings
  layer = re.match(r"model\.layers\.(\d+)\.", name)
  prediction = layer is not None and int(layer[1]) >= config.num_hidden_layers and config.model_type == "deepseek_v3"
  return prediction or name.endswith("rotary_emb.inv_freq")


def params_to_hf(config: TransformerConfig, params: Params, dtype: Any = None) -> dict[str, np.ndarray]:
  """Converts our parameters (or their gradients) to the tensors of a checkpoint by public name.

  Args:
    dtype: of the tensors; None keeps that of the parameters.
  Raises:
    ValueError: parameters that are missing, unexpected, or of another shape; lists all of them.
  """
  tensors = dict(iterate_tensors(config, params, dtype))
  return {name: tensors[name] for name in tensor_map(config)}


def tensor_groups(config: TransformerConfig) -> list[list[str]]:
  """Names of all tensors, grouped by parameter, in the order of `iterate_tensors`."""
  groups, listed = [], set()
  for slices in param_slices(config).values():
    names = [name for name in slices if name not in listed]
    listed.update(names)
    if names:
      groups.append(names)
  return groups


def iterate_tensors(config: TransformerConfig, params: Params, dtype: Any = None) -> Iterator[tuple[str, np.ndarray]]:
  """`params_to_hf` one tensor at a time, grouped by parameter, with at most two parameters on the host.

  Raises:
    ValueError: as `params_to_hf`.
  """
  flat = traverse_util.flatten_dict(params)
  _check_params(config, flat)
  slices = tensor_map(config)
  for names in tensor_groups(config):
    paths = {part.path for name in names for part in slices[name]}
    arrays = {path: to_host(flat[path], dtype) for path in paths}
    for name in names:
      tensor = None
      for part in slices[name]:
        array = arrays[part.path]
        if part.columns[1] > 1 and tensor is None:
          tensor = np.empty(part.tensor_shape, array.dtype)
        tensor = part.save(array[part.index], tensor)
      yield name, tensor


def _check_params(config: TransformerConfig, flat: Mapping[ParamPath, Any]) -> None:
  expected = {path: param_shape(slices) for path, slices in param_slices(config).items()}
  problems = [f"{'/'.join(path)}: missing, want {shape}" for path, shape in expected.items() if path not in flat]
  problems += [f"{'/'.join(path)}: not expected by this configuration" for path in flat if path not in expected]
  problems += [
    f"{'/'.join(path)}: is {flat[path].shape}, want {shape}"
    for path, shape in expected.items()
    if path in flat and flat[path].shape != shape
  ]
  cure = "Pass the configuration that they were initialised with."
  raise_problems("the parameters do not fit the configuration", problems, cure)


def to_host(array: Array | np.ndarray, dtype: Any = None) -> np.ndarray:
  """The whole array in numpy, gathered from all processes if it is distributed."""
  if isinstance(array, jax.Array) and not array.is_fully_addressable:
    array = multihost_utils.process_allgather(array, tiled=True)
  array = np.asarray(array)
  return array if dtype is None else array.astype(dtype, copy=False)
