"""Data sets by name or by dotted path. A loader `(data_dir, **options)` returns {split: Split}."""

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rspo_jax.data.examples import Example, Split, read_split
from rspo_jax.data.files import FilesSpec, read_files
from rspo_jax.lookup import look_up
from rspo_jax.tasks import countdown, knights
from rspo_jax.tasks.countdown import CountdownSpec
from rspo_jax.tasks.knights import KnightsSpec

Loader = Callable[..., dict[str, Split]]


def load_dataset(name: str, /, data_dir: str | os.PathLike | None = None, **options: Any) -> dict[str, Split]:
  """The splits of a data set.

  Args:
    name: a key of `DATASETS`, or the path "package.module:function" of a loader `(data_dir, **options)`.
    data_dir: folder of the data; None for the loader's default.
    options: the data set's own.
  Returns:
    {'train': Split, 'test': Split}, or one of them.
  Raises:
    ValueError: an unknown name, a loader that returns something else, or an error of the loader.
  """
  return _load("data set name", name, DATASETS, data_dir, options)


def _load(where: str, name: str, table: Mapping[str, Loader], data_dir: Any, options: Mapping[str, Any]):
  splits = look_up(where, name, table)(data_dir, **options)
  _check_splits(name, splits)
  return splits


def _check_splits(name: str, splits: Any) -> None:
  """Raises ValueError if a loader returned anything but {str: Split} with examples in each split."""
  cure = f"Let {name} return {{'train': Split(...), 'test': Split(...)}} with rspo_jax.data.Split."
  if not isinstance(splits, Mapping) or not splits:
    raise ValueError(f"data set {name} returned {splits!r:.80}; want a mapping of split names to Split. {cure}")
  for key, split in splits.items():
    if not isinstance(key, str) or not isinstance(split, Split):
      raise ValueError(f"data set {name} returned {key!r}: {type(split).__name__}; want a str and a Split. {cure}")
    if not len(split):
      raise ValueError(f"data set {name} returned no examples in split {key!r}; leave that split out, or fill it.")
    kinds = {type(example).__name__ for example in split.examples if not isinstance(example, Example)}
    if kinds:
      raise ValueError(
        f"data set {name} returned examples of type {', '.join(sorted(kinds))} in split {key!r}; want "
        "rspo_jax.data.Example. Build each as Example(prompt, gold)."
      )


def cache_dir() -> Path:
  """The folder of generated data sets: rspo_jax/tfds in the user's cache folder."""
  return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rspo_jax" / "tfds"


def load_countdown(
  data_dir: str | os.PathLike | None = None, *, on_broken: str = "fail", **spec: Any
) -> dict[str, Split]:
  """Countdown as {'train': Split, 'test': Split}; generated once per spec, then read from its folder.

  Args:
    data_dir: folder that TFDS writes to; `cache_dir()` if None. Several processes may prepare it concurrently.
    on_broken: see `read_split`.
    **spec: fields of `rspo_jax.tasks.countdown.CountdownSpec`.
  Returns:
    Examples with a `rspo_jax.tasks.countdown.Problem` as gold and 'operators' in metadata. No problem is repeated
    within or across the splits, in whatever order its numbers are.
  Raises:
    ValueError: an unknown or impossible spec, an empty split, a broken record, or an unreadable folder.
  """
  # Imported here: TFDS is slow to import, and most users of this module only need the table of names.
  from rspo_jax.tasks.countdown import dataset

  chosen = _make_spec("Countdown", CountdownSpec, spec)
  metadata = {"operators": chosen.operators}

  def parse(record):
    problem, right, wrong = dataset.problem_from_record(record, chosen.operators)
    return Example(countdown.prompt_text(problem), problem, right, wrong, metadata)

  return _read_generated("countdown", dataset, chosen, data_dir, parse, on_broken)


def load_knights(
  data_dir: str | os.PathLike | None = None, *, on_broken: str = "fail", style: str = "compact", **spec: Any
) -> dict[str, Split]:
  """Knights and Knaves as {'train': Split, 'test': Split}; generated once per spec, then read from its folder.

  Args:
    data_dir: folder that TFDS writes to; `cache_dir()` if None. Several processes may prepare it concurrently.
    on_broken: see `read_split`.
    style: of prompts and answers, one of `knights.STYLES`: 'compact' for `knights.ALPHABET`, or 'english'.
    **spec: fields of `rspo_jax.tasks.knights.KnightsSpec`.
  Returns:
    Examples with a `rspo_jax.tasks.knights.Problem` as gold and 'style' in metadata. Problems that differ only in
    wording or names (`rspo_jax.tasks.knights.key`) are not repeated, except for the `namings` of training problems.
  Raises:
    ValueError: an unknown or impossible spec, an empty split, a broken record, or an unreadable folder.
  """
  from rspo_jax.tasks.knights import dataset

  knights.check_style(style)
  chosen = _make_spec("Knights and Knaves", KnightsSpec, spec, "style")
  metadata = {"style": style}

  def parse(record):
    problem, wrong = dataset.problem_from_record(record)
    answers = (knights.answer_text(roles, style) for roles in (problem.solution, wrong))
    return Example(knights.prompt_text(problem, style), problem, *answers, metadata)

  return _read_generated("knights", dataset, chosen, data_dir, parse, on_broken)


def _make_spec(title: str, kind: type, given: Mapping[str, Any], *more: str) -> Any:
  """kind(**given); ValueError for an unknown field, listing the fields and `more`, the loader's other options."""
  known = (*kind.__dataclass_fields__, *more)
  if unknown := sorted(set(given) - set(known)):
    raise ValueError(f"{title} has no setting {', '.join(unknown)}; it has {', '.join(known)}.")
  return kind(**given)


def _read_generated(name: str, module: Any, spec: Any, data_dir: Any, parse: Any, on_broken: str) -> dict[str, Split]:
  """The splits of a data set that `module.prepare` generates unless its folder exists."""
  root = Path(data_dir or cache_dir()).expanduser()
  by_split = module.prepare(spec, root)
  folder = module.data_folder(spec, root)
  return {
    split: read_split(f"{name}/{split} in {folder}", records, parse, on_broken=on_broken)
    for split, records in by_split.items()
  }


def load_files(data_dir: str | os.PathLike | None = None, *, on_broken: str = "fail", **spec: Any) -> dict[str, Split]:
  """Local files as {'train': Split, 'test': Split}, or only the split that is given: docs/data.md.

  Args:
    data_dir: folder that relative paths start from; the working directory if None.
    on_broken: see `read_split`. A file that cannot be read at all is an error in any case.
    **spec: fields of `rspo_jax.data.files.FilesSpec`.
  Raises:
    ValueError: an unknown or impossible setting, a missing or unreadable file, an empty split, a broken record (names
      file and line).
  """
  if missing := [name for name in ("prompt", "gold") if name not in spec]:
    raise ValueError(f"Files need {' and '.join(missing)}; name the fields of prompts and gold answers.")
  chosen = _make_spec("A data set of files", FilesSpec, spec, "on_broken")
  return read_files(chosen, Path(data_dir or ".").expanduser(), on_broken)


def load_mixture(
  data_dir: str | os.PathLike | None = None, *, sources: Mapping[str, Mapping[str, Any]]
) -> dict[str, Split]:
  """Several data sets as one; `Example.source` is the source's key.

  Args:
    data_dir: of sources without their own.
    sources: {source: {'name': as for `load_dataset`, 'weight': 1.0, 'data_dir': '', 'options': {}}}; only name is
      required. Training batches contain the sources in proportion to their weights (`index_stream`); a source of weight
      0 is used for evaluation only.
  Returns:
    For each split, the examples of the sources that have it, source after source.
  Raises:
    ValueError: an unknown key or data set, a mixture within a mixture, an impossible weight, or an error of a source.
  """
  if not sources:
    raise ValueError("A mixture has no sources; want {source: {'name': a data set, 'weight': 1.0, 'options': {...}}}.")
  single = {name: loader for name, loader in DATASETS.items() if loader is not load_mixture}
  weights, loaded = {}, {}
  for source, settings in sources.items():
    if not isinstance(settings, Mapping):
      raise ValueError(f"Source {source} is {settings!r}; want a group of settings: name, weight, data_dir, options.")
    if unknown := sorted(set(settings) - {"name", "weight", "data_dir", "options"}):
      raise ValueError(f"Source {source} has {', '.join(unknown)}; want name, weight, data_dir and options.")
    name, weight = str(settings.get("name", "")), settings.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0.0 <= weight < math.inf:
      raise ValueError(f"Source {source} has weight {weight!r}; want a number, 0 or more.")
    try:
      splits = _load("name", name, single, settings.get("data_dir") or data_dir, settings.get("options", {}))
    except (ValueError, TypeError) as error:
      raise ValueError(f"Source {source}: {error}") from error
    loaded[source] = {split: examples for split, examples in splits.items() if weight > 0 or split != "train"}
    weights[source] = weight
  joined = {}
  for split in ("train", "test"):
    if parts := {source: splits[split] for source, splits in loaded.items() if split in splits}:
      joined[split] = _join(split, parts, weights)
  return joined


def _join(split: str, parts: Mapping[str, Split], weights: Mapping[str, float]) -> Split:
  examples, skipped, records = [], [], 0
  for source, part in parts.items():
    examples += [example._replace(source=source) for example in part.examples]
    skipped += [records + index for index in part.skipped]
    records += len(part) + len(part.skipped)
  shares = {source: float(weights[source]) for source in parts} if split == "train" else {}
  return Split(f"{split} of {', '.join(parts)}", tuple(examples), tuple(skipped), shares)


DATASETS: dict[str, Loader] = {
  "countdown": load_countdown,
  "knights": load_knights,
  "files": load_files,
  "mixture": load_mixture,
}

# Alphabets for `CharTokenizer`, by data set.
ALPHABETS = {"countdown": countdown.ALPHABET, "knights": knights.ALPHABET}
