"""F3: data sets as examples in memory, and batches of them that can be asked for by step.

A data set is read and checked whole before anything is compiled. From then on a step's batch is a pure function of
(seed, step), so the position kept in a checkpoint is one integer. `DATASETS` maps a name to its loader; a loader
returns {split: Split}.
"""

import dataclasses
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np

from rspo_jax import countdown, knights
from rspo_jax.countdown_problems import CountdownSpec
from rspo_jax.knights_problems import KnightsSpec

_log = logging.getLogger(__name__)


class Example(NamedTuple):
  """What the policy reads and what its reward judges by.

  Attributes:
    prompt: text.
    gold: whatever the data set's reward wants: a `countdown.Problem` here.
    demonstration: a right completion without the end token; '' where the data set has none.
    wrong_demonstration: a well-formed wrong one, for warm starts that are noisy on purpose; '' likewise.
    metadata: what else a reward or a report may want, as Countdown's {'operators': '+-*/'}.
    source: which data set or benchmark of a mixture it comes from; '' where there is one.
  """

  prompt: str
  gold: Any
  demonstration: str = ""
  wrong_demonstration: str = ""
  metadata: Mapping[str, Any] = {}
  source: str = ""


class RewardResult(NamedTuple):
  """What a completion is worth.

  Attributes:
    reward: what training maximises; finite.
    success: the answer is right.
    format: the answer has the form that was asked for, right or wrong.
    why: the reason in a word or two, to be counted; '' where a reward gives none.
    answer: what was judged, cut out of the text, so that equal answers can be counted (maj@k); '' for none.
  """

  reward: float
  success: bool
  format: bool
  why: str = ""
  answer: str = ""


Reward = Callable[[str, Example], RewardResult]


@dataclasses.dataclass(frozen=True)
class Split:
  """The examples of one split.

  Attributes:
    name: as messages call it, e.g. 'countdown/train'.
    examples: in the order of the records.
    skipped: indices of the broken records that were left out; their count is `len(skipped)`.
    weights: of a mixture, {source: its share of the batches} by `Example.source`, each above 0; {} is no mixture.
  """

  name: str
  examples: tuple[Example, ...]
  skipped: tuple[int, ...] = ()
  weights: Mapping[str, float] = dataclasses.field(default_factory=dict)

  def __len__(self) -> int:
    return len(self.examples)

  def __getitem__(self, index: int) -> Example:
    return self.examples[index]


def read_split(
  name: str,
  records: Sequence[Any],
  parse: Callable[[Any], Example],
  *,
  on_broken: str = "fail",
  place: Callable[[int], str] | None = None,
) -> Split:
  """Reads every record, so that a broken one shows before training starts.

  Args:
    name: of the split, for messages.
    records: anything with a length and integer indices, as `tfds.data_source` gives.
    parse: record -> Example; whatever it raises makes the record a broken one.
    on_broken: 'fail'; or 'skip', which leaves them out and warns of them once.
    place: index -> where that record stands in a user's own files, for messages; without it the data set is one that
      was made here, and could be made anew.
  Raises:
    ValueError: a broken record under 'fail' (names its place and the cause), or no example at all.
  """
  if on_broken not in ("fail", "skip"):
    raise ValueError(f"on_broken is {on_broken!r}; want 'fail' or 'skip'.")
  mend, fill = "Correct it there", "Name files that have some."
  if place is None:
    mend = "Delete or repair the data set"
    fill = "Ask the data set for more examples, or delete its folder so that it is made anew."

    def place(index):
      return f"Record {index} of {name}"

  examples, skipped, causes = [], [], []
  for index in range(len(records)):
    try:
      examples.append(parse(records[index]))
    except Exception as error:
      cause = f"{type(error).__name__}: {error}"
      if on_broken == "fail":
        raise ValueError(
          f"{place(index)} is broken ({cause}). {mend}, or leave such records out with on_broken='skip'."
        ) from error
      skipped.append(index)
      if len(causes) < 3:
        causes.append(f"{place(index)} ({cause})")
  first = "; ".join(causes)
  if not examples:
    raise ValueError(
      f"{name} is empty: {len(records)} records, {len(skipped)} of them broken{': ' + first if first else ''}. {fill}"
    )
  if skipped:
    _log.warning("%s: %d of %d records are broken and left out: %s", name, len(skipped), len(records), first)
  return Split(name, tuple(examples), tuple(skipped))


def walk(split: Split, seed: int) -> grain.MapDataset:
  """The endless, shuffled order of a split's indices: `walk(split, seed)[i]` is the i-th. Each epoch is shuffled anew.

  Of a mixture every source has a walk of its own, with epochs of its own, and the walks are dealt out by weight: among
  the first n are n * w / sum(w) of a source with weight w, give or take one per source. Weights count to a hundredth of
  the smallest.

  Raises:
    ValueError: seed outside [0, 2**32), or a weight for a source without examples.
  """
  if not 0 <= seed < 2**32:
    raise ValueError(f"seed is {seed}; want one in [0, 2**32).")
  if not split.weights:
    return grain.MapDataset.range(len(split)).seed(seed).shuffle().repeat()
  indices: dict[str, list[int]] = {source: [] for source in split.weights}
  for index, example in enumerate(split.examples):
    indices[example.source].append(index)
  if empty := [source for source in indices if not indices[source]]:
    raise ValueError(f"{split.name} has no example of {', '.join(empty)}; take it out of the mixture.")
  seeds = np.random.SeedSequence(seed).generate_state(len(indices))  # one seed would shuffle equal lengths equally
  walks = [
    grain.MapDataset.source(own).seed(int(own_seed)).shuffle().repeat()
    for own, own_seed in zip(indices.values(), seeds, strict=True)
  ]
  least = min(split.weights.values())
  # grain cuts weights over the smallest to hundredths; these it takes as they are.
  return grain.MapDataset.mix(walks, [round(100 * split.weights[source] / least) for source in indices])


class Batches:
  """The batches of an endless, shuffled walk over a split; each epoch is shuffled anew.

  The global batch of a step is the same whatever the number of processes: process i has its i-th run of rows. The next
  epoch follows within the same batch, so every example comes exactly once per epoch and none is dropped.

  Attributes:
    position: the step that `next` gives next; read it for a checkpoint, set it to resume.
  """

  def __init__(self, split: Split, rows: int, seed: int, start: int, process_index: int, process_count: int):
    self.position = start
    self._split = split
    self._walk = walk(split, seed)
    self._rows = rows
    self._first_row = process_index * rows
    self._stride = process_count * rows

  def at(self, step: int) -> list[Example]:
    """This process's rows of the batch of a step. ValueError for a negative step."""
    if step < 0:
      raise ValueError(f"step is {step}; want 0 or more.")
    first = step * self._stride + self._first_row
    return [self._split[self._walk[first + row]] for row in range(self._rows)]

  def __iter__(self) -> "Batches":
    return self

  def __next__(self) -> list[Example]:
    batch = self.at(self.position)
    self.position += 1
    return batch


def batches(
  split: Split, batch_size: int, seed: int, *, start: int = 0, process_index: int = 0, process_count: int = 1
) -> Batches:
  """Batches of examples, any step of which can be asked for.

  Args:
    split: where the examples come from.
    batch_size: examples per step over all processes, a multiple of process_count. If it exceeds the split, examples
      repeat within a batch.
    seed: of the shuffling, in [0, 2**32).
    start: the first step, as kept in a checkpoint.
    process_index, process_count: which rows of each batch are this process's.
  Raises:
    ValueError: one of these is out of range.
  """
  if batch_size < 1 or process_count < 1 or batch_size % process_count:
    raise ValueError(
      f"batch_size is {batch_size} for {process_count} processes; want a positive multiple of their number."
    )
  if not 0 <= process_index < process_count:
    raise ValueError(f"process_index is {process_index}; want one in [0, {process_count}).")
  if not 0 <= seed < 2**32 or start < 0:
    raise ValueError(f"seed is {seed} and start is {start}; want a seed in [0, 2**32) and a start of 0 or more.")
  return Batches(split, batch_size // process_count, seed, start, process_index, process_count)


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
    **spec: fields of `countdown_problems.CountdownSpec`.
  Returns:
    Examples whose gold is a `countdown.Problem` and whose metadata has 'operators'. No problem comes twice, in one
    split or in both, however its numbers are ordered.
  Raises:
    ValueError: an unknown or impossible spec, an empty split, a broken record, or a folder that cannot be read.
  """
  # Here, because TFDS would otherwise be imported by everything that only wants `Example`.
  from rspo_jax import countdown_tfds

  chosen = _make_spec("Countdown", CountdownSpec, spec)
  metadata = {"operators": chosen.operators}

  def parse(record):
    problem, right, wrong = countdown_tfds.worked_of(record, chosen.operators)
    return Example(countdown.prompt_text(problem), problem, right, wrong, metadata)

  return _read_made("countdown", countdown_tfds, chosen, data_dir, parse, on_broken)


def load_knights(
  data_dir: str | os.PathLike | None = None, *, on_broken: str = "fail", style: str = "compact", **spec: Any
) -> dict[str, Split]:
  """Knights and Knaves as {'train': Split, 'test': Split}; made once per spec, read from its folder from then on.

  Args:
    data_dir: where TFDS keeps it; `cache_dir()` if None. Several processes may ask for it at once.
    on_broken: see `read_split`.
    style: of prompts and answers, of `knights.STYLES`: 'compact' for `knights.ALPHABET`, or 'english'.
    **spec: fields of `knights_problems.KnightsSpec`.
  Returns:
    Examples whose gold is a `knights.Problem` and whose metadata has 'style'. No problem comes twice, in other words
    or under other names (`knights_problems.key`), but for the `namings` of training problems.
  Raises:
    ValueError: an unknown or impossible spec, an empty split, a broken record, or a folder that cannot be read.
  """
  from rspo_jax import knights_tfds

  knights.check_style(style)
  chosen = _make_spec("Knights and Knaves", KnightsSpec, spec, "style")
  metadata = {"style": style}

  def parse(record):
    problem, wrong = knights_tfds.worked_of(record)
    answers = (knights.answer_text(roles, style) for roles in (problem.solution, wrong))
    return Example(knights.prompt_text(problem, style), problem, *answers, metadata)

  return _read_made("knights", knights_tfds, chosen, data_dir, parse, on_broken)


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
  from rspo_jax import local_files

  if missing := [name for name in ("prompt", "gold") if name not in spec]:
    raise ValueError(f"Files need {' and '.join(missing)}; name the fields that prompts and gold answers are made of.")
  chosen = _make_spec("A data set of files", local_files.FilesSpec, spec, "on_broken")
  return local_files.load(chosen, Path(data_dir or ".").expanduser(), on_broken)


def load_mixture(
  data_dir: str | os.PathLike | None = None, *, sources: Mapping[str, Mapping[str, Any]]
) -> dict[str, Split]:
  """Several data sets as one; `Example.source` says which an example is from.

  Args:
    data_dir: of the sources that name none of their own.
    sources: {source: {'name': of `DATASETS`, 'weight': 1.0, 'data_dir': '', 'options': {}}}; all but name may be left
      out. Training batches have the sources in proportion to their weights (`walk`); weight 0 is for one that is only
      evaluated on.
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
