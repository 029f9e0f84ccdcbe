"""The data sets that a config can name. A loader returns {split: Split}; `DATASETS` maps a name to its loader."""

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rspo_jax.data.examples import Example, Split, read_split
from rspo_jax.data.files import FilesSpec, load
from rspo_jax.tasks import countdown, knights
from rspo_jax.tasks.countdown import CountdownSpec
from rspo_jax.tasks.knights import KnightsSpec


def cache_dir() -> Path:
  """Where data sets are kept: rspo_jax/tfds in the user's cache folder."""
  return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rspo_jax" / "tfds"


def load_countdown(
  data_dir: str | os.PathLike | None = None, *, on_broken: str = "fail", **spec: Any
) -> dict[str, Split]:
  """Countdown as {'train': Split, 'test': Split}; made once per spec, read from its folder from then on.

  Args:
    data_dir: where TFDS keeps it; `cache_dir()` if None. Several processes may ask for it at once.
    on_broken: see `read_split`.
    **spec: fields of `rspo_jax.tasks.countdown.CountdownSpec`.
  Returns:
    Examples whose gold is a `rspo_jax.tasks.countdown.Problem` and whose metadata has 'operators'. No problem comes
    twice, in one split or in both, however its numbers are ordered.
  Raises:
    ValueError: an unknown or impossible spec, an empty split, a broken record, or a folder that cannot be read.
  """
  # Here, because TFDS would otherwise be imported by everything that only wants a table of names.
  from rspo_jax.tasks.countdown import dataset

  chosen = _make_spec("Countdown", CountdownSpec, spec)
  metadata = {"operators": chosen.operators}

  def parse(record):
    problem, right, wrong = dataset.worked_of(record, chosen.operators)
    return Example(countdown.prompt_text(problem), problem, right, wrong, metadata)

  return _read_made("countdown", dataset, chosen, data_dir, parse, on_broken)


def load_knights(
  data_dir: str | os.PathLike | None = None, *, on_broken: str = "fail", style: str = "compact", **spec: Any
) -> dict[str, Split]:
  """Knights and Knaves as {'train': Split, 'test': Split}; made once per spec, read from its folder from then on.

  Args:
    data_dir: where TFDS keeps it; `cache_dir()` if None. Several processes may ask for it at once.
    on_broken: see `read_split`.
    style: of prompts and answers, of `knights.STYLES`: 'compact' for `knights.ALPHABET`, or 'english'.
    **spec: fields of `rspo_jax.tasks.knights.KnightsSpec`.
  Returns:
    Examples whose gold is a `rspo_jax.tasks.knights.Problem` and whose metadata has 'style'. No problem comes twice,
    in other words or under other names (`rspo_jax.tasks.knights.key`), but for the `namings` of training problems.
  Raises:
    ValueError: an unknown or impossible spec, an empty split, a broken record, or a folder that cannot be read.
  """
  from rspo_jax.tasks.knights import dataset

  knights.check_style(style)
  chosen = _make_spec("Knights and Knaves", KnightsSpec, spec, "style")
  metadata = {"style": style}

  def parse(record):
    problem, wrong = dataset.worked_of(record)
    answers = (knights.answer_text(roles, style) for roles in (problem.solution, wrong))
    return Example(knights.prompt_text(problem, style), problem, *answers, metadata)

  return _read_made("knights", dataset, chosen, data_dir, parse, on_broken)


def _make_spec(title: str, kind: type, given: Mapping[str, Any], *others: str) -> Any:
  """kind(**given); ValueError for a field it does not have, listing those it has and the others."""
  known = (*kind.__dataclass_fields__, *others)
  if unknown := sorted(set(given) - set(known)):
    raise ValueError(f"{title} has no setting {', '.join(unknown)}; it has {', '.join(known)}.")
  return kind(**given)


def _read_made(name: str, made: Any, spec: Any, data_dir: Any, parse: Any, on_broken: str) -> dict[str, Split]:
  """The splits of a data set that the module `made` prepares."""
  root = Path(data_dir or cache_dir()).expanduser()
  records = made.prepare(spec, root)
  folder = made.folder_of(spec, root)
  return {
    split: read_split(f"{name}/{split} in {folder}", found, parse, on_broken=on_broken)
    for split, found in records.items()
  }


def load_files(data_dir: str | os.PathLike | None = None, *, on_broken: str = "fail", **spec: Any) -> dict[str, Split]:
  """Local files as {'train': Split, 'test': Split}, or the one of them that is given: docs/data.md.

  Args:
    data_dir: folder that relative paths are relative to; the working directory if None.
    on_broken: see `read_split`. A file that cannot be read at all fails in any case.
    **spec: fields of `local_files.FilesSpec`.
  Raises:
    ValueError: an unknown or impossible setting, a file that is not there or cannot be read, an empty split, a broken
      record (names file and line).
  """
  if missing := [name for name in ("prompt", "gold") if name not in spec]:
    raise ValueError(f"Files need {' and '.join(missing)}; name the fields that prompts and gold answers are made of.")
  chosen = _make_spec("A data set of files", FilesSpec, spec, "on_broken")
  return load(chosen, Path(data_dir or ".").expanduser(), on_broken)


def load_mixture(
  data_dir: str | os.PathLike | None = None, *, sources: Mapping[str, Mapping[str, Any]]
) -> dict[str, Split]:
  """Several data sets as one; `Example.source` says which an example is from.

  Args:
    data_dir: of the sources that name none of their own.
    sources: {source: {'name': of `DATASETS`, 'weight': 1.0, 'data_dir': '', 'options': {}}}; all but name may be left
      out. Training batches have the sources in proportion to their weights (`index_stream`); weight 0 is for one that
      is only evaluated on.
  Returns:
    Of each split the examples of the sources that have it, one source after the other.
  Raises:
    ValueError: an unknown key or data set, a mixture within a mixture, impossible weights, or what a source raises.
  """
  if not sources:
    raise ValueError("A mixture has no sources; want {source: {'name': a data set, 'weight': 1.0, 'options': {...}}}.")
  weights, loaded = {}, {}
  for source, settings in sources.items():
    if not isinstance(settings, Mapping):
      raise ValueError(f"Source {source} is {settings!r}; want a group of settings: name, weight, data_dir, options.")
    name, weight = settings.get("name"), settings.get("weight", 1.0)
    if unknown := sorted(set(settings) - {"name", "weight", "data_dir", "options"}):
      raise ValueError(f"Source {source} has {', '.join(unknown)}; want name, weight, data_dir and options.")
    if name not in DATASETS or DATASETS[name] is load_mixture:
      known = ", ".join(sorted(other for other, loader in DATASETS.items() if loader is not load_mixture))
      raise ValueError(f"Source {source} has name {name!r}; want one of {known}.")
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0.0 <= weight < math.inf:
      raise ValueError(f"Source {source} has weight {weight!r}; want a number, 0 or more.")
    try:
      splits = DATASETS[name](settings.get("data_dir") or data_dir, **settings.get("options", {}))
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


DATASETS: dict[str, Callable[..., dict[str, Split]]] = {
  "countdown": load_countdown,
  "knights": load_knights,
  "files": load_files,
  "mixture": load_mixture,
}

# The characters of data sets that a `CharTokenizer` suffices for.
ALPHABETS = {"countdown": countdown.ALPHABET, "knights": knights.ALPHABET}
