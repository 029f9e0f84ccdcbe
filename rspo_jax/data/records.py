"""Records of local files, each with its location. Needs neither `datasets` nor pandas.

  .jsonl, .json, either with .gz   one object per line; .json may also hold one list of objects
  .parquet                         one record per row
  .arrow                           one record per row, as `datasets` caches and saves

A folder is read as the files in it that belong to a split:

  dataset_dict.json, TRAIN/, TEST/      written by DatasetDict.save_to_disk
  state.json, data-00000-of-00002.arrow written by Dataset.save_to_disk
  data/train-00000-of-00002.parquet     a snapshot of the hub, or any files whose paths name the split
"""

import glob
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rspo_jax.files import read_json

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet", ".arrow")
# JSON files without records, which `datasets` writes beside the data.
_METADATA_FILES = ("dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")
_SPLITS = ("train", "test", "validation", "valid", "dev", "eval")
_CURE = "Download or write it again; a pointer of Git LFS is not the file."


class Record(NamedTuple):
  """A record, or the reason why it cannot be read.

  Attributes:
    location: 'gsm8k.jsonl, line 3', counted from 1, or 'gsm8k.parquet, row 3', counted from 0.
    fields: by name; None if unreadable.
    error: the reason; '' if readable.
  """

  location: str
  fields: dict[str, Any] | None
  error: str = ""


def find_files(root: Path, paths: str | Sequence[str], split: str) -> list[Path]:
  """The files of a split.

  Args:
    root: folder that relative paths start from.
    paths: one or several files, patterns of `glob` (including **), or folders (this module's docstring).
    split: 'train' or 'test', selects files in folders.
  Returns:
    At least one file, in the order of the paths, sorted by name within a pattern or folder.
  Raises:
    ValueError: no file, none of this split, or an ambiguous folder; lists the files there are.
  """
  files: list[Path] = []
  for name in [paths] if isinstance(paths, str) else paths:
    path = root / Path(name).expanduser()
    # The name of an existing file may contain the characters of a pattern.
    matches = [path] if path.exists() else [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
    if not matches:
      raise ValueError(f"{path} is no file, folder or pattern that matches one; {_describe(path.parent)}")
    for match in matches:
      files += _files_in(match, split) if match.is_dir() else [match]
  for path in files:
    _reader(path)  # raises for an unknown format
  if len(set(files)) < len(files):
    raise ValueError(f"{split} names {next(path for path in files if files.count(path) > 1)} twice; name it once.")
  return files


def splits_in(folder: Path) -> list[str]:
  """Those of 'train' and 'test' that a folder has files of. A data set saved without splits is 'train'.

  Raises:
    ValueError: neither, or not a folder.
  """
  if not folder.is_dir():
    raise ValueError(f"{folder} is not a folder. Name the files with train= and test=, or correct data_dir.")
  if (folder / "state.json").is_file():
    return ["test" if read_json(folder / "state.json", cure=_CURE).get("_split") == "test" else "train"]
  if (folder / "dataset_dict.json").is_file():
    named = read_json(folder / "dataset_dict.json", cure=_CURE).get("splits", [])
  else:
    named = [split for split in ("train", "test") if any(_names(path, folder, split) for path in _data_files(folder))]
  if splits := [split for split in ("train", "test") if split in named]:
    return splits
  raise ValueError(f"No path in {folder} names train or test; {_describe(folder)} List its files in train= and test=.")


def read_records(path: Path) -> Iterator[Record]:
  """The records of a file in order; a broken one has an error and no fields.

  A truncated .gz yields the lines before the cut, then one broken record for the rest.

  Raises:
    ValueError: the file as a whole cannot be read.
  """
  try:
    yield from _reader(path)(path)
  except OSError as error:
    raise ValueError(f"{path} cannot be read: {error}. {_CURE}") from error


def _reader(path: Path) -> Callable[[Path], Iterator[Record]]:
  readers = {".jsonl": _read_lines, ".json": _read_list, ".parquet": _read_parquet, ".arrow": _read_arrow}
  suffix = _suffix(path)
  if suffix is None:
    raise ValueError(f"{path} has an unknown format; want one of {', '.join(SUFFIXES)}. Rename or convert it.")
  return readers[suffix.removesuffix(".gz")]


def _suffix(path: Path) -> str | None:
  return next((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), None)


def _files_in(folder: Path, split: str) -> list[Path]:
  if (folder / "dataset_dict.json").is_file():
    splits = read_json(folder / "dataset_dict.json", cure=_CURE).get("splits", [])
    if split not in splits:
      raise ValueError(f"{folder} has {', '.join(splits)}, but no {split}; name one as {split}='{folder}/SPLIT'.")
    return _files_in(folder / split, split)
  if (folder / "state.json").is_file():
    state = read_json(folder / "state.json", cure=_CURE)
    if state.get("_indices_data_files"):
      raise ValueError(
        f"{folder} stores a selection of its rows in a separate file. Save it again after flatten_indices()."
      )
    return [folder / file["filename"] for file in state.get("_data_files", [])]
  files = _data_files(folder)
  named = [path for path in files if _names(path, folder, split)]
  # No path names any split: the folder as a whole is the split.
  if not named and not any(_names(path, folder, other) for path in files for other in _SPLITS):
    named = files
  if not named:
    raise ValueError(f"{folder} has no files of {split}; {_describe(folder)}")
  if len(folders := sorted({str(path.parent) for path in named})) > 1:
    raise ValueError(f"{folder} has files of {split} in several folders: {', '.join(folders)}. Name one of them.")
  return named


def _data_files(folder: Path) -> list[Path]:
  """Files with records under a folder, sorted, without hidden ones."""
  return sorted(
    path
    for path in folder.rglob("*")
    if path.is_file()
    and _suffix(path)
    and path.name not in _METADATA_FILES
    and not any(part.startswith(".") for part in path.relative_to(folder).parts)
  )


def _names(path: Path, folder: Path, split: str) -> bool:
  """Whether the split is a word of the path below the folder."""
  return bool(re.search(rf"(?<![a-zA-Z]){split}(?![a-zA-Z])", path.relative_to(folder).as_posix()))


def _describe(folder: Path) -> str:
  """A folder's content, for messages."""
  if not folder.is_dir():
    return f"there is no folder {folder}."
  names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
  return f"{folder} has {', '.join(names[:10]) or 'no files'}{', ...' if len(names) > 10 else ''}."


def _open(path: Path):
  return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else open(path, "rb")


def _read_lines(path: Path) -> Iterator[Record]:
  number = 0
  try:
    with _open(path) as file:
      for number, line in enumerate(file, start=1):
        if line.strip():
          yield _parse_json(f"{path}, line {number}", line)
  except (EOFError, zlib.error, gzip.BadGzipFile) as error:
    yield Record(f"{path}, after line {number}", None, f"the rest cannot be decompressed: {error}")


def _parse_json(location: str, text: bytes) -> Record:
  try:
    fields = json.loads(text.decode("utf-8-sig"))
  except (ValueError, RecursionError) as error:
    return Record(location, None, f"not JSON: {error}; it begins with {text[:40]!r}")
  return _check_fields(location, fields)


def _check_fields(location: str, fields: Any) -> Record:
  if isinstance(fields, dict):
    return Record(location, fields)
  return Record(location, None, f"a {type(fields).__name__}; want an object with fields")


def _read_list(path: Path) -> Iterator[Record]:
  """Records of a JSON list; a file that does not begin with a bracket is read as JSON lines."""
  with _open(path) as file:
    is_list = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
  if not is_list:
    yield from _read_lines(path)
    return
  try:
    with _open(path) as file:
      records = json.loads(file.read().decode("utf-8-sig"))
  except (ValueError, RecursionError, EOFError, zlib.error) as error:
    raise ValueError(f"{path} is not a JSON list: {error}. Correct it there.") from error
  for number, fields in enumerate(records):
    yield _check_fields(f"{path}, row {number}", fields)


def _read_parquet(path: Path) -> Iterator[Record]:
  import pyarrow
  import pyarrow.parquet

  try:
    yield from _from_batches(path, pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024))
  except (pyarrow.ArrowException, OSError) as error:
    raise ValueError(f"{path} cannot be read as parquet: {error}. {_CURE}") from error


def _read_arrow(path: Path) -> Iterator[Record]:
  """Arrow's stream format, which `datasets` writes, or its file format."""
  import pyarrow

  try:
    with pyarrow.memory_map(str(path)) as source:
      if source.read(6) == b"ARROW1":
        file = pyarrow.ipc.open_file(source)
        batches = (file.get_batch(number) for number in range(file.num_record_batches))
      else:
        source.seek(0)
        batches = iter(pyarrow.ipc.open_stream(source))
      yield from _from_batches(path, batches)
  except (pyarrow.ArrowException, OSError) as error:
    raise ValueError(f"{path} cannot be read as Arrow: {error}. {_CURE}") from error


def _from_batches(path: Path, batches: Iterator[Any]) -> Iterator[Record]:
  row = 0
  for batch in batches:
    for fields in batch.to_pylist():
      yield Record(f"{path}, row {row}", fields)
      row += 1
