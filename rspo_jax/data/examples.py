"""Examples in memory, and batches of them by step.

A data set is read and checked completely before anything is compiled. From then on a step's batch is a pure function of
(seed, step), so a checkpoint stores one integer. `rspo_jax.data.datasets` has the loaders.
"""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

_log = logging.getLogger(__name__)


class Example(NamedTuple):
  """A prompt and the reference answer of its reward.

  Attributes:
    prompt: text that the policy reads.
    gold: reference answer, in the form that the data set's reward expects: text, or a `countdown.Problem`.
    demonstration: a correct completion without the end token; '' if the data set has none.
    wrong_demonstration: a well-formed incorrect completion, for deliberately noisy warm starts; '' if there is none.
    metadata: further fields for rewards and reports, such as Countdown's {'operators': '+-*/'}.
    source: key of the data set in a mixture, or of the benchmark; '' for a single data set.
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
    name: for messages, e.g. 'countdown/train'.
    examples: in the order of the records.
    skipped: indices of the broken records that were dropped.
    weights: for a mixture, {source: relative share of the batches} by `Example.source`, each above 0; else {}.
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
  locate: Callable[[int], str] | None = None,
) -> Split:
  """Parses every record, so that a broken one is reported before training starts.

  Args:
    name: of the split, for messages.
    records: anything with a length and integer indices, as `tfds.data_source` returns.
    parse: record -> Example; a record for which it raises is broken.
    on_broken: 'fail', or 'skip' to drop broken records with one warning.
    locate: index -> location of the record in the user's own files, for messages; None for a generated data set, which
      can be generated again.
  Raises:
    ValueError: a broken record under 'fail' (names its location and the cause), or no example at all.
  """
  if on_broken not in ("fail", "skip"):
    raise ValueError(f"on_broken is {on_broken!r}; want 'fail' or 'skip'.")
  cure_broken, cure_empty = "Correct it there", "Name files with records."
  if locate is None:
    cure_broken = "Delete or repair the data set"
    cure_empty = "Ask the data set for more examples, or delete its folder so that it is generated again."

    def locate(index):
      return f"Record {index} of {name}"

  examples, skipped, causes = [], [], []
  for index in range(len(records)):
    try:
      examples.append(parse(records[index]))
    except Exception as error:
      cause = f"{type(error).__name__}: {error}"
      if on_broken == "fail":
        raise ValueError(
          f"{locate(index)} is broken ({cause}). {cure_broken}, or drop such records with on_broken='skip'."
        ) from error
      skipped.append(index)
      if len(causes) < 3:
        causes.append(f"{locate(index)} ({cause})")
  first = "; ".join(causes)
  if not examples:
    raise ValueError(
      f"{name} is empty: {len(records)} records, {len(skipped)} of them broken{': ' + first if first else ''}. "
      f"{cure_empty}"
    )
  if skipped:
    _log.warning("%s: %d of %d records are broken and dropped: %s", name, len(skipped), len(records), first)
  return Split(name, tuple(examples), tuple(skipped))


def index_stream(split: Split, seed: int) -> grain.MapDataset:
  """The endless sequence of a split's indices, shuffled differently in each epoch; element i is `stream[i]`.

  In a mixture each source has its own stream with its own epochs, and the streams are interleaved by weight: among the
  first n elements are n * w / sum(w) of a source with weight w, plus or minus one per source. Weights are rounded to a
  hundredth of the smallest.

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
  # With one seed for all, sources of equal length would be shuffled alike.
  seeds = np.random.SeedSequence(seed).generate_state(len(indices))
  streams = [
    grain.MapDataset.source(own).seed(int(own_seed)).shuffle().repeat()
    for own, own_seed in zip(indices.values(), seeds, strict=True)
  ]
  least = min(split.weights.values())
  # grain truncates weights relative to the smallest to hundredths; integers are not truncated.
  return grain.MapDataset.mix(streams, [round(100 * split.weights[source] / least) for source in indices])


class Batches:
  """Batches of a split's index stream: `at(step)`, or in sequence as an iterator.

  Epochs are shuffled differently. A batch may span two epochs, so every example is read exactly once per epoch and none
  is dropped. Every process reads the whole batch.

  Attributes:
    position: step of the batch that `next` returns next; store it in a checkpoint, set it to resume.
  """

  def __init__(self, split: Split, batch_size: int, seed: int, start: int):
    self.position = start
    self._split = split
    self._stream = index_stream(split, seed)
    self._batch_size = batch_size

  def at(self, step: int) -> list[Example]:
    """The batch of a step. ValueError for a negative step."""
    if step < 0:
      raise ValueError(f"step is {step}; want 0 or more.")
    first = step * self._batch_size
    return [self._split[self._stream[first + row]] for row in range(self._batch_size)]

  def __iter__(self) -> "Batches":
    return self

  def __next__(self) -> list[Example]:
    batch = self.at(self.position)
    self.position += 1
    return batch


def batches(split: Split, batch_size: int, seed: int, *, start: int = 0) -> Batches:
  """Batches of examples, for any step in any order.

  Args:
    batch_size: examples per step, 1 or more. If it exceeds the split, examples repeat within a batch.
    seed: of the shuffling, in [0, 2**32).
    start: the first step, as stored in a checkpoint, 0 or more.
  Raises:
    ValueError: an argument out of range.
  """
  if batch_size < 1:
    raise ValueError(f"batch_size is {batch_size}; want 1 or more.")
  if not 0 <= seed < 2**32 or start < 0:
    raise ValueError(f"seed is {seed} and start is {start}; want a seed in [0, 2**32) and a start of 0 or more.")
  return Batches(split, batch_size, seed, start)
