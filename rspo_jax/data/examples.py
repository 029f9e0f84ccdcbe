"""Data sets as examples in memory, and batches of them that can be asked for by step.

A data set is read and checked whole before anything is compiled. From then on a step's batch is a pure function of
(seed, step), so the position kept in a checkpoint is one integer. `rspo_jax.data.datasets` has the loaders.
"""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

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


def index_stream(split: Split, seed: int) -> grain.MapDataset:
  """The endless, shuffled order of a split's indices: `index_stream(split, seed)[i]` is the i-th. Each epoch is
  shuffled anew.

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
    self._walk = index_stream(split, seed)
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
