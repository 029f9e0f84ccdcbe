"""Dequantisation of published checkpoints: MXFP4 (gpt-oss) and block-scaled FP8 (DeepSeek-V3)."""

from collections.abc import Iterator, Mapping

import ml_dtypes
import numpy as np

# The sixteen values of a 4-bit float (2 exponent bits, 1 mantissa bit) by code. OCP Microscaling Formats, version 1.0.
_HALF = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
FP4_VALUES = np.concatenate([_HALF, -_HALF])
FP8_BLOCK = 128  # rows and columns with one scale


class Dequantized(Mapping[str, np.ndarray]):
  """The tensors of a checkpoint under the names of an unquantised checkpoint, dequantised on access.

  `x_blocks` and `x_scales` are read as `x` in bfloat16, `x.weight` and `x.weight_scale_inv` as `x.weight` in float32.

  Attributes:
    shapes: name -> shape after dequantisation.
  """

  def __init__(self, tensors: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]):
    self._tensors = tensors
    self.shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
      if name.endswith("_blocks"):
        *stack, rows, groups, packed = shape
        self.shapes[name.removesuffix("_blocks")] = (*stack, groups * packed * 2, rows)
      elif not name.endswith(("_scales", "weight_scale_inv")):
        self.shapes[name] = tuple(shape)

  def __getitem__(self, name: str) -> np.ndarray:
    if f"{name}_blocks" in self._tensors:
      return unpack_mxfp4(self._tensors[f"{name}_blocks"], self._tensors[f"{name}_scales"])
    if f"{name}_scale_inv" in self._tensors:
      return unpack_fp8(self._tensors[name], self._tensors[f"{name}_scale_inv"])
    return self._tensors[name]

  def __iter__(self) -> Iterator[str]:
    return iter(self.shapes)

  def __len__(self) -> int:
    return len(self.shapes)


def unpack_mxfp4(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
  """Dequantises MXFP4 exactly.

  Args:
    blocks: [E, O, I / 32, 16] uint8, two values per byte, the low four bits first.
    scales: [E, O, I / 32] uint8, exponents of 2 with bias 127.
  Returns:
    [E, I, O] bfloat16.
  """
  values = np.stack([FP4_VALUES[blocks & 15], FP4_VALUES[blocks >> 4]], axis=-1).reshape(*blocks.shape[:-1], -1)
  values = np.ldexp(values, scales[..., None].astype(np.int32) - 127).astype(ml_dtypes.bfloat16)
  return np.ascontiguousarray(values.reshape(*blocks.shape[:-2], -1).swapaxes(-1, -2))


def unpack_fp8(weight: np.ndarray, scale: np.ndarray) -> np.ndarray:
  """Dequantises block-scaled FP8.

  Args:
    weight: [O, I] float8.
    scale: [ceil(O / 128), ceil(I / 128)], one factor per block of 128 by 128.
  Returns:
    [O, I] float32.
  """
  rows, columns = weight.shape
  factors = np.repeat(np.repeat(scale, FP8_BLOCK, axis=0)[:rows], FP8_BLOCK, axis=1)[:, :columns]
  return weight.astype(np.float32) * factors
