"""The records of local files, each with the place it stands at. Neither `datasets` nor pandas is needed.

  .jsonl, .json, either with .gz   an object on each line; .json may also hold one list of objects
  .parquet                         a row a record
  .arrow                           likewise; what `datasets` caches and saves

A folder stands for the files in it that belong to a split:

  dataset_dict.json, TRAIN/, TEST/      what DatasetDict.save_to_disk writes
  state.json, data-00000-of-00002.arrow what Dataset.save_to_disk writes
  data/train-00000-of-00002.parquet     a snapshot of the hub, or anything whose names say the split
"""

import glob
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet", ".arrow")
# What else `datasets` puts beside data, in JSON too.
_ABOUT = ("dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")
_SPLITS = ("train", "test", "validation", "valid", "dev", "eval")
_AGAIN = "Download or write it again; a pointer of Git LFS is not the file."


class Record(NamedTuple):
  """place: 'gsm8k.jsonl, line 3', or row 3, counted from 0. fields: by name; None if unreadable, and error says why."""

  place: str
  fields: dict[str, Any] | None
  error: str = ""


def find_files(root: Path, paths: str | Sequence[str], split: str) -> list[Path]:
  """The files of a split.

  Args:
    root: what relative paths are relative to.
    paths: one or several files, patterns as for `glob` (** too), or folders (this module's docstring).
    split: 'train' or 'test', to be looked for in folders.
  Returns:
    At least one file, in the order of the paths, and of their names where one path stands for several.
  Raises:
    ValueError: nothing is there, or not for this split, or a folder may mean several things; says what there is.
  """
  found: list[Path] = []
  for name in [paths] if isinstance(paths, str) else paths:
    path = root / Path(name).expanduser()
    # A name may hold the characters of a pattern.
    matches = [path] if path.exists() else [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
    if not matches:
      raise ValueError(f"{path} is no file, folder or pattern that matches one; {_there_is(path.parent)}")
    for match in matches:
      found += _files_in(match, split) if match.is_dir() else [match]
  for path in found:
    _reader(path)
  if len(set(found)) < len(found):
    raise ValueError(f"{split} names {next(path for path in found if found.count(path) > 1)} twice; name it once.")
  return found


def splits_in(folder: Path) -> list[str]:
  """Which of 'train' and 'test' a folder has files of. A data set saved without splits is 'train'.

  Raises:
    ValueError: neither, or it is no folder.
  """
  if not folder.is_dir():
    raise ValueError(f"{folder} is not a folder. Name the files with train= and test=, or correct data_dir.")
  if (folder / "state.json").is_file():
    return ["test" if _read_json(folder / "state.json").get("_split") == "test" else "train"]
  if (folder / "dataset_dict.json").is_file():
    named = _read_json(folder / "dataset_dict.json").get("splits", [])
  else:
    named = [split for split in ("train", "test") if any(_names(path, folder, split) for path in _data_files(folder))]
  if splits := [split for split in ("train", "test") if split in named]:
    return splits
  raise ValueError(
    f"No name in {folder} says train or test; {_there_is(folder)} Name the files with train= and test=, relative to it."
  )


def read_records(path: Path) -> Iterator[Record]:
  """The records of a file in order; a broken one has an error and no fields.

  Raises:
    ValueError: the file as a whole cannot be read. Of a .gz that ends too early the lines before that are read, and
      the rest is one broken record.
  """
  try:
    yield from _reader(path)(path)
  except OSError as error:
    raise ValueError(f"{path} cannot be read: {error}. {_AGAIN}") from error


def _reader(path: Path) -> Callable[[Path], Iterator[Record]]:
  readers = {".jsonl": _read_lines, ".json": _read_list, ".parquet": _read_parquet, ".arrow": _read_arrow}
  suffix = _suffix(path)
  if suffix is None:
    raise ValueError(f"{path} is of no known kind; want one of {', '.join(SUFFIXES)}. Rename or convert it.")
  return readers[suffix.removesuffix(".gz")]


def _suffix(path: Path) -> str | None:
  return next((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), None)


def _files_in(folder: Path, split: str) -> list[Path]:
  if (folder / "dataset_dict.json").is_file():
    splits = _read_json(folder / "dataset_dict.json").get("splits", [])
    if split not in splits:
      raise ValueError(f"{folder} has no {split} but {', '.join(splits)}; name one as {split}='{folder}/SPLIT'.")
    return _files_in(folder / split, split)
  if (folder / "state.json").is_file():
    state = _read_json(folder / "state.json")
    if state.get("_indices_data_files"):
      raise ValueError(f"{folder} keeps a selection of its rows apart. Save it again after flatten_indices().")
    return [folder / file["filename"] for file in state.get("_data_files", [])]
  files = _data_files(folder)
  named = [path for path in files if _names(path, folder, split)]
  # Names that say no split at all: the folder itself was named as the split.
  if not named and not any(_names(path, folder, other) for path in files for other in _SPLITS):
    named = files
  if not named:
    raise ValueError(f"{folder} has no files of {split}; {_there_is(folder)}")
  if len(folders := sorted({str(path.parent) for path in named})) > 1:
    raise ValueError(f"{folder} has files of {split} in several folders: {', '.join(folders)}. Name one of them.")
  return named


def _data_files(folder: Path) -> list[Path]:
  """Files with records under a folder, sorted. Hidden ones do not count."""
  return sorted(
    path
    for path in folder.rglob("*")
    if path.is_file()
    and _suffix(path)
    and path.name not in _ABOUT
    and not any(part.startswith(".") for part in path.relative_to(folder).parts)
  )


def _names(path: Path, folder: Path, split: str) -> bool:
  """Whether the split is a word of the path below the folder."""
  return bool(re.search(rf"(?<![a-zA-Z]){split}(?![a-zA-Z])", path.relative_to(folder).as_posix()))


def _there_is(folder: Path) -> str:
  if not folder.is_dir():
    return f"there is no folder {folder}."
  names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
  return f"{folder} has {', '.join(names[:10]) or 'no files'}{', ...' if len(names) > 10 else ''}."


def _read_json(path: Path) -> dict[str, Any]:
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
      raise ValueError(f"it holds a {type(value).__name__}, not an object")
  except ValueError as error:
    raise ValueError(f"{path} cannot be read: {error}. {_AGAIN}") from error
  return value


def _open(path: Path):
  return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else open(path, "rb")


def _read_lines(path: Path) -> Iterator[Record]:
  number = 0
  try:
    with _open(path) as file:
      for number, line in enumerate(file, start=1):
        if line.strip():
          yield _of_json(f"{path}, line {number}", line)
  except (EOFError, zlib.error, gzip.BadGzipFile) as error:
    yield Record(f"{path}, after line {number}", None, f"the rest cannot be decompressed: {error}")


def _of_json(place: str, text: bytes) -> Record:
  try:
    fields = json.loads(text.decode("utf-8-sig"))
  except (ValueError, RecursionError) as error:
    return Record(place, None, f"not JSON: {error}; it begins with {text[:40]!r}")
  return _of_value(place, fields)


def _of_value(place: str, fields: Any) -> Record:
  if isinstance(fields, dict):
    return Record(place, fields)
  return Record(place, None, f"a {type(fields).__name__}; want an object with fields")


def _read_list(path: Path) -> Iterator[Record]:
  """A file that does not begin with a bracket has JSON lines, as many a .json has."""
  with _open(path) as file:
    is_list = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
  if not is_list:
    yield from _read_lines(path)
    return
  try:
    with _open(path) as file:
      records = json.loads(file.read().decode("utf-8-sig"))
  except (ValueError, RecursionError, EOFError, zlib.error) as error:
    raise ValueError(f"{path} is not a list in JSON: {error}. Correct it there.") from error
  for number, fields in enumerate(records):
    yield _of_value(f"{path}, row {number}", fields)


def _read_parquet(path: Path) -> Iterator[Record]:
  import pyarrow
  import pyarrow.parquet

  try:
    yield from _of_batches(path, pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024))
  except (pyarrow.ArrowException, OSError) as error:
    raise ValueError(f"{path} cannot be read as parquet: {error}. {_AGAIN}") from error


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
      yield from _of_batches(path, batches)
  except (pyarrow.ArrowException, OSError) as error:
    raise ValueError(f"{path} cannot be read as Arrow: {error}. {_AGAIN}") from error


def _of_batches(path: Path, batches: Iterator[Any]) -> Iterator[Record]:
  row = 0
  for batch in batches:
    for fields in batch.to_pylist():
      yield Record(f"{path}, row {row}", fields)
      row += 1
