"""F3: data sets as examples in memory, and batches of them that can be asked for by step.

A data set is read and checked whole before anything is compiled. From then on a step's batch is a pure function of
(seed, step), so the position kept in a checkpoint is one integer. `DATASETS` maps a name to its loader; a loader
returns {split: Split}.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain

from rspo_jax.countdown import prompt_text
from rspo_jax.countdown_problems import CountdownSpec


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
  """

  name: str
  examples: tuple[Example, ...]
  skipped: tuple[int, ...] = ()

  def __len__(self) -> int:
    return len(self.examples)

  def __getitem__(self, index: int) -> Example:
    return self.examples[index]


def read_split(name: str, records: Sequence[Any], parse: Callable[[Any], Example], *, on_broken: str = "fail") -> Split:
  """Reads every record, so that a broken one shows before training starts.

  Args:
    name: of the split, for messages.
    records: anything with a length and integer indices, as `tfds.data_source` gives.
    parse: record -> Example; whatever it raises makes the record a broken one.
    on_broken: 'fail' or 'skip'.
  Raises:
    ValueError: a broken record under 'fail' (names its index and the cause), or no example at all.
  """
  if on_broken not in ("fail", "skip"):
    raise ValueError(f"on_broken is {on_broken!r}; want 'fail' or 'skip'.")
  examples, skipped = [], []
  for index in range(len(records)):
    try:
      examples.append(parse(records[index]))
    except Exception as error:
      if on_broken == "fail":
        raise ValueError(
          f"Record {index} of {name} is broken ({type(error).__name__}: {error}). Delete or repair the data set, or "
          "leave such records out with on_broken='skip'."
        ) from error
      skipped.append(index)
  if not examples:
    raise ValueError(
      f"{name} is empty: {len(records)} records, {len(skipped)} of them broken. Ask the data set for more "
      "examples, or delete its folder so that it is made anew."
    )
  return Split(name, tuple(examples), tuple(skipped))


class Batches:
  """The batches of an endless, shuffled walk over a split; each epoch is shuffled anew.

  The global batch of a step is the same whatever the number of processes: process i has its i-th run of rows. The next
  epoch follows within the same batch, so every example comes exactly once per epoch and none is dropped.

  Attributes:
    position: the step that `next` gives next; read it for a checkpoint, set it to resume.
  """

  def __init__(self, split: Split, rows: int, seed: int, start: int, process_index: int, process_count: int):
    self.position = start
    self._walk = grain.MapDataset.source(split).seed(seed).shuffle().repeat()
    self._rows = rows
    self._first_row = process_index * rows
    self._stride = process_count * rows

  def at(self, step: int) -> list[Example]:
    """This process's rows of the batch of a step. ValueError for a negative step."""
    if step < 0:
      raise ValueError(f"step is {step}; want 0 or more.")
    first = step * self._stride + self._first_row
    return [self._walk[first + row] for row in range(self._rows)]

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

  known = CountdownSpec.__dataclass_fields__
  if unknown := sorted(set(spec) - set(known)):
    raise ValueError(f"Countdown has no setting {', '.join(unknown)}; it has {', '.join(known)}.")
  chosen = CountdownSpec(**spec)
  root = Path(data_dir or cache_dir()).expanduser()
  metadata = {"operators": chosen.operators}

  def parse(record):
    problem, right, wrong = countdown_tfds.worked_of(record, chosen.operators)
    return Example(prompt_text(problem), problem, right, wrong, metadata)

  records = countdown_tfds.prepare(chosen, root)
  folder = countdown_tfds.folder_of(chosen, root)
  return {
    split: read_split(f"countdown/{split} in {folder}", found, parse, on_broken=on_broken)
    for split, found in records.items()
  }


DATASETS: dict[str, Callable[..., dict[str, Split]]] = {"countdown": load_countdown}
