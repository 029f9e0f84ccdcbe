"""The `*.safetensors` files of a checkpoint folder, read tensor by tensor."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from rspo_jax.files import read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class TensorFiles(Mapping[str, np.ndarray]):
  """The tensors of a checkpoint folder by name. Each is read from its file on access and not stored.

  Attributes:
    shapes: name -> shape.
  Raises:
    ValueError: there are no weights, a file of the index is absent, truncated or not safetensors, or a tensor is not in
      the file that the index names; names the file and the cure.
  """

  def __init__(self, folder: str | Path):
    self._folder = Path(folder)
    self._files = _read_weight_map(self._folder)
    self._handles: dict[str, Any] = {}
    self.shapes: dict[str, tuple[int, ...]] = {}
    for name, file in self._files.items():
      try:
        self.shapes[name] = tuple(self._handle(file).get_slice(name).get_shape())
      except SafetensorError as error:
        raise ValueError(
          f"{self._folder / file} does not hold {name}, but {INDEX} lists it there ({error}); download both again."
        ) from error

  def _handle(self, file: str):
    if file not in self._handles:
      self._handles[file] = _open_safetensors(self._folder / file)
    return self._handles[file]

  def __getitem__(self, name: str) -> np.ndarray:
    return self._handle(self._files[name]).get_tensor(name)

  def __iter__(self) -> Iterator[str]:
    return iter(self._files)

  def __len__(self) -> int:
    return len(self._files)


def _open_safetensors(path: Path):
  """An open handle on a file; ValueError names a file that is absent, truncated or not safetensors."""
  try:
    return safe_open(path, framework="numpy")
  except FileNotFoundError:
    raise ValueError(f"{path} is absent, but {INDEX} lists it; download that file again.") from None
  except (SafetensorError, OSError) as error:
    size = path.stat().st_size
    raise ValueError(
      f"{path} ({size} bytes) is truncated or not a safetensors file ({error}); download that file again."
    ) from error


def _read_weight_map(folder: Path) -> dict[str, str]:
  """Tensor name -> file name."""
  if (folder / INDEX).exists():
    return read_json(folder / INDEX)["weight_map"]
  files = sorted(path.name for path in folder.glob("*.safetensors"))
  if not files:
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    cure = (
      f"{pickles[0]} is a pickle; save it as safetensors with transformers."
      if pickles
      else "Name the folder of a checkpoint."
    )
    raise ValueError(f"{folder} has no *.safetensors files. {cure}")
  if len(files) > 1 and SINGLE not in files:
    raise ValueError(f"{folder} has {len(files)} safetensors files but no {INDEX}; download the index too.")
  file = SINGLE if SINGLE in files else files[0]
  return dict.fromkeys(_open_safetensors(folder / file).keys(), file)
