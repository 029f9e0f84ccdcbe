"""Completions of held-out problems: sampled batch by batch, scored, and logged as JSON lines."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from rspo_jax.data.examples import Example
from rspo_jax.rewards.base import Scores, score_completions
from rspo_jax.rewards.table import Reward

# (`batch_problems` examples, index of the first) -> texts, their lengths in tokens, whether each ended in a stop token.
Generate = Callable[[Sequence[Example], int], tuple[Sequence[str], np.ndarray, np.ndarray]]


class Completions(NamedTuple):
  """Completions of N examples, prompt-major: k completions of the first example, then of the second, and so on.

  Attributes:
    texts: N * k strings. tokens: [N * k] int, lengths in tokens. scores: their rewards.
    samples: k.
    finished: [N * k] bool, ended by a stop token, not by the length limit; None if unknown.
  """

  texts: tuple[str, ...]
  tokens: np.ndarray
  scores: Scores
  samples: int
  finished: np.ndarray | None = None

  @property
  def success(self) -> float:
    """avg@k: mean success over problems and samples."""
    return float(self.scores.success.mean())

  @property
  def success_by_problem(self) -> np.ndarray:
    """[N, k] bool."""
    return self.scores.success.reshape(-1, self.samples)

  @property
  def answers_by_problem(self) -> list[tuple[str, ...]]:
    """The k extracted answers of each of the N problems, '' where a completion has none."""
    answers = self.scores.answer or ("",) * len(self.texts)
    return [answers[start : start + self.samples] for start in range(0, len(answers), self.samples)]


def complete_in_batches(
  generate: Generate,
  reward: Reward,
  examples: Sequence[Example],
  *,
  samples: int,
  batch_problems: int,
  first: int = 0,
) -> Iterator[Completions]:
  """Samples and scores completions of every example, one batch after another.

  Args:
    generate: samples `samples` completions of each example of a batch.
    reward: scores them.
    examples: N of them; the last batch is padded with repeated examples, whose completions are dropped.
    samples: k. batch_problems: examples per call of `generate`.
    first: index of the first example to complete, a multiple of `batch_problems`; the ones before it are done.
  Yields:
    The completions of a batch.
  Raises:
    ValueError: no examples.
  """
  if not examples:
    raise ValueError("there are no examples to evaluate on; check the data set's held-out split.")
  for start in range(first, len(examples), batch_problems):
    batch = list(examples[start : start + batch_problems])
    padded = [batch[i % len(batch)] for i in range(batch_problems)]
    count = len(batch) * samples
    texts, tokens, finished = (values[:count] for values in generate(padded, start))
    repeated = [example for example in batch for _ in range(samples)]
    yield Completions(tuple(texts), tokens, score_completions(reward, texts, repeated, tokens), samples, finished)


def join(batches: Iterable[Completions]) -> Completions:
  """Batches of completions, concatenated in order."""
  batches = list(batches)
  scores = [batch.scores for batch in batches]
  return Completions(
    tuple(text for batch in batches for text in batch.texts),
    np.concatenate([batch.tokens for batch in batches]),
    Scores(
      *(np.concatenate([getattr(s, name) for s in scores]) for name in ("reward", "success", "format")),
      *(tuple(item for s in scores for item in getattr(s, name)) for name in ("reason", "answer")),
    ),
    batches[0].samples,
    None if batches[0].finished is None else np.concatenate([batch.finished for batch in batches]),
  )


class CompletionLog:
  """A file of completions, one JSON line each, ordered by problem, then sample. docs/evaluation.md lists the fields.

  A batch is appended and flushed as a whole. If a kill left part of a batch in the file, opening the log truncates the
  file to the last complete batch, so that a resumed evaluation gives the same file. Only process 0 writes.

  Args:
    path: of the file.
    benchmark: its name, a field of every line.
    examples: N of them. samples: k. batch_problems: as for `complete_in_batches`.

  Attributes:
    done: number of problems in the file.
  """

  def __init__(
    self, path: str | os.PathLike, benchmark: str, examples: Sequence[Example], *, samples: int, batch_problems: int
  ):
    self.path, self._benchmark, self._examples, self._samples = Path(path), benchmark, examples, samples
    ends = _ends_of_lines(self.path)
    problems = min(len(ends) // samples, len(examples))
    self.done = problems if problems == len(examples) else problems // batch_problems * batch_problems
    if jax.process_index() == 0 and self.path.exists():
      os.truncate(self.path, ends[self.done * samples - 1] if self.done else 0)

  def append(self, batch: Completions) -> None:
    """Writes the completions of the next batch of problems."""
    lines = [json.dumps(line, allow_nan=False) + "\n" for line in self._lines(batch)]
    if jax.process_index() == 0:
      self.path.parent.mkdir(parents=True, exist_ok=True)
      with open(self.path, "a", encoding="utf-8") as file:
        file.write("".join(lines))
        file.flush()
        os.fsync(file.fileno())
    self.done += len(batch.texts) // self._samples

  def _lines(self, batch: Completions) -> Iterator[dict[str, Any]]:
    scores = batch.scores
    for row, text in enumerate(batch.texts):
      problem, sample = divmod(self.done * self._samples + row, self._samples)
      example = self._examples[problem]
      yield {
        "benchmark": self._benchmark,
        "problem": problem,
        "sample": sample,
        "gold": digest([example.gold]),
        "prompt": example.prompt,
        "completion": text,
        "tokens": int(batch.tokens[row]),
        "finished": bool(batch.finished[row]),
        "reward": round(float(scores.reward[row]), 6),
        "success": bool(scores.success[row]),
        "format": bool(scores.format[row]),
        "why": scores.reason[row],
        "answer": scores.answer[row],
      }


def digest(values: Iterable[Any]) -> str:
  """Twelve hexadecimal digits of a hash of the values' `repr`; the chance of a collision is 2^-48."""
  return hashlib.sha256("\0".join(map(repr, values)).encode("utf-8", "surrogatepass")).hexdigest()[:12]


def log_path(workdir: str | os.PathLike, benchmark: str, mode: str) -> Path:
  """The file of a benchmark's completions in the workdir of an evaluation; mode: "sampled" or "greedy"."""
  return Path(workdir) / "completions" / f"{benchmark}.{mode}.jsonl"


def read_lines(path: str | os.PathLike) -> list[dict[str, Any]]:
  """The complete lines of a file of completions, [] if there is no file; an incomplete last line is left out.

  Raises:
    ValueError: a line is not a completion; names the file and the line.
  """
  path = Path(path)
  if not path.exists():
    return []
  *lines, _ = path.read_bytes().split(b"\n")
  return [_read_line(path, number, line) for number, line in enumerate(lines, start=1)]


def completions_of(lines: Sequence[Mapping[str, Any]]) -> Completions:
  """The completions in lines of a log: all samples of each problem, the same number for every problem."""

  def column(name: str) -> list[Any]:
    return [line[name] for line in lines]

  scores = Scores(
    np.array(column("reward"), np.float32),
    np.array(column("success"), bool),
    np.array(column("format"), bool),
    tuple(column("why")),
    tuple(column("answer")),
  )
  samples = 1 + max(column("sample"))
  finished = np.array(column("finished"), bool)
  return Completions(tuple(column("completion")), np.array(column("tokens")), scores, samples, finished)


def _ends_of_lines(path: Path) -> list[int]:
  """The end offset of each line, up to the first that is incomplete or not JSON."""
  ends, offset = [], 0
  if not path.exists():
    return ends
  with open(path, "rb") as file:
    for line in file:
      offset += len(line)
      if not line.endswith(b"\n"):
        break
      try:
        json.loads(line)
      except ValueError:
        break
      ends.append(offset)
  return ends


def _read_line(path: Path, number: int, line: bytes) -> dict[str, Any]:
  try:
    fields = json.loads(line)
    _ = fields["problem"], fields["sample"], fields["success"]
    return fields
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(
      f"{path}, line {number} is not a completion ({type(error).__name__}: {error}); run the evaluation again, which "
      "continues before that line."
    ) from error
