"""Examples from local files, by the names of their fields. docs/data.md has the options for public files."""

import dataclasses
import itertools
import logging
import math
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rspo_jax.data.examples import Example, Split, read_split
from rspo_jax.data.records import Record, find_files, read_records, splits_in
from rspo_jax.tasks.answers import FORMS, extract_answer

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class FilesSpec:
  r"""Files of a data set and the fields of their records.

  A field is named as in the record; a field of a nested record or list by its path: 'reward_model.ground_truth',
  'prompt.0.content'. A template is a field, or text with fields in braces, where {{ and }} are braces:
  '{problem}\nPut your answer in \\boxed{{}}.' Numbers become text; 27.0 becomes 27.

  Attributes:
    prompt: template of the prompt.
    gold: field of the reference answer; '' is the whole record, as the code reward expects.
    train, test: file, pattern or folder, or several (see `records.find_files`), relative to the data set's folder. If
      both are empty, the splits are looked for in that folder.
    gold_from: how the answer is extracted from the text in `gold`: 'boxed', '####' or 'number' (`extract_answer`); ''
      takes the whole text.
    gold_list: whether 'all' answers of a list in `gold` are needed, or 'any' of them is correct. A list of one answer
      is read as text.
    demonstration: template of a correct completion; '' for none.
    metadata: fields copied to `Example.metadata`.
    difficulty, band: keep only training records whose number in this field is in [low, high], for example a success
      rate from an evaluation. The field is added to the metadata.
    holdout: number of training records that become the test split, chosen at random by `seed`; excludes `test`.
    limit: records read per split; 0 is all.
  Raises:
    ValueError: an impossible setting.
  """

  prompt: str
  gold: str
  train: str | Sequence[str] = ""
  test: str | Sequence[str] = ""
  gold_from: str = ""
  gold_list: str = "all"
  demonstration: str = ""
  metadata: Sequence[str] = ()
  difficulty: str = ""
  band: tuple[float, float] = (-math.inf, math.inf)
  holdout: int = 0
  limit: int = 0
  seed: int = 0

  def __post_init__(self):
    parse_template(self.prompt)
    if self.demonstration:
      parse_template(self.demonstration)
    for name, known in (("gold_from", ("", *FORMS)), ("gold_list", ("all", "any"))):
      if getattr(self, name) not in known:
        raise ValueError(f"{name} is {getattr(self, name)!r}; want one of {', '.join(map(repr, known))}.")
    for name in ("holdout", "limit", "seed"):
      if not isinstance(getattr(self, name), int) or getattr(self, name) < 0:
        raise ValueError(f"{name} is {getattr(self, name)!r}; want a whole number, 0 or more.")
    if self.holdout and self.test:
      raise ValueError(f"holdout is {self.holdout} and test is {self.test!r}; want one of them.")
    if isinstance(self.metadata, str):
      raise ValueError(f"metadata is {self.metadata!r}; want a sequence of fields, such as ({self.metadata!r},).")
    if len(self.band) != 2 or not self.band[0] <= self.band[1]:
      raise ValueError(f"band is {self.band!r}; want (low, high) with low <= high.")
    if not self.difficulty and self.band != FilesSpec.band:
      raise ValueError(f"band is {self.band!r}, but difficulty is empty; name the field with difficulty=.")


def read_files(spec: FilesSpec, root: Path, on_broken: str) -> dict[str, Split]:
  """{'train': Split, 'test': Split}, or only the split that has files.

  Args:
    root: folder that relative paths start from. on_broken: see `data.read_split`.
  Raises:
    ValueError: see `datasets.load_files`.
  """
  named = {split: paths for split in ("train", "test") if (paths := getattr(spec, split))}
  files = {split: find_files(root, paths, split) for split, paths in named.items()}
  if not named:
    files = {split: find_files(root, ".", split) for split in splits_in(root)}
  if spec.holdout and ("train" not in files or "test" in files):
    raise ValueError(f"holdout is {spec.holdout}, but there is {' and '.join(files)}; it needs train without test.")
  splits = {split: _read(spec, split, paths, on_broken) for split, paths in files.items()}
  if spec.holdout:
    splits["train"], splits["test"] = _hold_out(splits["train"], spec)
  if spec.difficulty and "train" in splits:
    splits["train"] = _in_band(splits["train"], spec)
  return splits


def parse_template(template: str) -> list[tuple[str, str]]:
  """A template as pairs (text, the field after it or '').

  Raises:
    ValueError: an empty template, unbalanced braces, or braces around anything but the name of a field.
  """
  if not isinstance(template, str) or not template:
    raise ValueError(f"the template is {template!r}; want the name of a field, or text with fields in braces.")
  if "{" not in template and "}" not in template:
    return [("", template)]
  cure = "Write {field} for a field, {{ and }} for braces."
  try:
    pieces = list(string.Formatter().parse(template))
  except ValueError as error:
    raise ValueError(f"the template {template!r} is broken: {error}. {cure}") from error
  if any(field == "" or form or conversion for _, field, form, conversion in pieces):
    raise ValueError(f"the template {template!r} has braces around something other than a field. {cure}")
  if not any(field for _, field, *_ in pieces):
    raise ValueError(f"the template {template!r} has no field, so all examples would be the same. {cure}")
  return [(text, field or "") for text, field, *_ in pieces]


def field_of(fields: Mapping[str, Any], name: str) -> Any:
  """The value of a field; a name that is no key of the record is read as a path through records and lists.

  Raises:
    ValueError: no such field; lists the record's fields.
  """
  if name in fields:
    return fields[name]
  value: Any = fields
  for part in name.split("."):
    if isinstance(value, Mapping) and part in value:
      value = value[part]
    elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
      value = value[int(part)]
    else:
      raise ValueError(f"there is no field {name!r}; it has {', '.join(fields) or 'none'}")
  return value


def _read(spec: FilesSpec, split: str, paths: Sequence[Path], on_broken: str) -> Split:
  """A split before the filter by band."""
  all_records = itertools.chain.from_iterable(map(read_records, paths))
  records = list(itertools.islice(all_records, spec.limit or None))
  prompt = parse_template(spec.prompt)
  demonstration = parse_template(spec.demonstration) if spec.demonstration else None
  fields = [*spec.metadata, *([spec.difficulty] if spec.difficulty and split == "train" else [])]

  def parse(record: Record) -> Example:
    if record.fields is None:
      raise ValueError(record.error)
    metadata = {name: field_of(record.fields, name) for name in fields}
    if spec.difficulty in fields:
      _check_number(metadata[spec.difficulty], spec.difficulty)
    return Example(
      prompt=_fill(prompt, record.fields),
      gold=_gold(spec, record.fields),
      demonstration=_fill(demonstration, record.fields) if demonstration else "",
      metadata=metadata,
    )

  name = f"{split} of {', '.join(map(str, paths[:3]))}{', ...' if len(paths) > 3 else ''}"
  return read_split(name, records, parse, on_broken=on_broken, locate=lambda index: records[index].location)


def _fill(template: Sequence[tuple[str, str]], fields: Mapping[str, Any]) -> str:
  parts = [(text, _text(field_of(fields, name), name) if name else "") for text, name in template]
  if not any(value.strip() for _, value in parts):
    raise ValueError(f"{' and '.join(repr(name) for _, name in template if name)} is empty")
  filled = "".join(itertools.chain.from_iterable(parts))
  filled.encode()  # raises for an unpaired surrogate, which has no bytes and therefore no tokens
  return filled


def _text(value: Any, name: str) -> str:
  """Text unchanged; numbers as text, whole ones without decimals."""
  if isinstance(value, str):
    return value
  _check_number(value, name, "text or a number")
  return str(int(value)) if value == int(value) else repr(value)


def _check_number(value: Any, name: str, expected: str = "a number") -> None:
  if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
    raise ValueError(f"{name!r} is {str(value)[:80]!r} ({type(value).__name__}); want {expected}")


def _gold(spec: FilesSpec, fields: Mapping[str, Any]) -> Any:
  if not spec.gold:
    return fields
  value = field_of(fields, spec.gold)
  if spec.gold_from:
    text = _text(value, spec.gold)
    answer = extract_answer(text, (spec.gold_from,)).answer
    if answer is None:
      raise ValueError(f"{spec.gold!r} has no answer in the form {spec.gold_from!r}; it ends with {text[-80:]!r}")
    return answer
  if isinstance(value, dict) and value:
    return value
  parts = tuple(_text(part, spec.gold) for part in (value if isinstance(value, list) else [value]))
  if not parts or not all(part.strip() for part in parts):
    raise ValueError(f"{spec.gold!r} is {value!r}; want an answer")
  if len(parts) == 1:
    return parts[0]
  return parts if spec.gold_list == "any" else (parts,)


def _hold_out(train: Split, spec: FilesSpec) -> tuple[Split, Split]:
  if spec.holdout >= len(train):
    raise ValueError(f"holdout is {spec.holdout}, but {train.name} has {len(train)} examples; hold out fewer.")
  test_indices = set(np.random.default_rng(spec.seed).permutation(len(train))[: spec.holdout].tolist())
  by_split = {"train": [], "test": []}
  for index, example in enumerate(train.examples):
    by_split["test" if index in test_indices else "train"].append(example)
  test = Split(f"{spec.holdout} held out of {train.name}", tuple(by_split["test"]))
  return dataclasses.replace(train, examples=tuple(by_split["train"])), test


def _in_band(train: Split, spec: FilesSpec) -> Split:
  low, high = spec.band
  values = [example.metadata[spec.difficulty] for example in train.examples]
  kept = tuple(example for example, value in zip(train.examples, values, strict=True) if low <= value <= high)
  if not kept:
    raise ValueError(
      f"{train.name} has no example with {spec.difficulty} in [{low:g}, {high:g}]; its values are from "
      f"{min(values):g} to {max(values):g}. Widen band."
    )
  _log.info("%s: %d of %d examples have %s in [%g, %g]", train.name, len(kept), len(values), spec.difficulty, low, high)
  return dataclasses.replace(train, examples=kept)
