"""Completions of problems that a policy was not trained on: drawn batch by batch, judged, kept as JSON lines."""

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

# (`batch_problems` examples, number of the first) -> texts, their lengths in tokens, whether a stop token ended each.
Generate = Callable[[Sequence[Example], int], tuple[Sequence[str], np.ndarray, np.ndarray]]


class Completions(NamedTuple):
  """Completions of examples, prompt-major: k texts of the first example, then of the second.

  Attributes:
    texts: N * k strings. tokens: [N * k] int, length in tokens. scores: their rewards.
    samples: k.
    finished: [N * k] bool, ended by a stop token and not by the length limit; None where that is not known.
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
    """N times the k answers that were judged, '' for none."""
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
  """Completes every example and judges the completions, one batch after another.

  Args:
    generate: draws `samples` completions of each of a batch's examples.
    reward: judges them.
    examples: N of them; the last batch is filled up with repetitions, which are thrown away.
    samples: k. batch_problems: examples per call of `generate`.
    first: examples that are done already, whole batches.
  Raises:
    ValueError: no examples.
  """
  if not examples:
    raise ValueError("there are no examples to evaluate on; check the data set's held-out split.")
  for start in range(first, len(examples), batch_problems):
    batch = list(examples[start : start + batch_problems])
    filled = [batch[i % len(batch)] for i in range(batch_problems)]
    count = len(batch) * samples
    texts, tokens, finished = (part[:count] for part in generate(filled, start))
    repeated = [example for example in batch for _ in range(samples)]
    yield Completions(tuple(texts), tokens, score_completions(reward, texts, repeated, tokens), samples, finished)


def join(pieces: Iterable[Completions]) -> Completions:
  """Batches of completions, one after another, as one."""
  pieces = list(pieces)
  scores = [piece.scores for piece in pieces]
  return Completions(
    tuple(text for piece in pieces for text in piece.texts),
    np.concatenate([piece.tokens for piece in pieces]),
    Scores(
      *(np.concatenate([getattr(s, name) for s in scores]) for name in ("reward", "success", "format")),
      *(tuple(item for s in scores for item in getattr(s, name)) for name in ("reason", "answer")),
    ),
    pieces[0].samples,
    None if pieces[0].finished is None else np.concatenate([piece.finished for piece in pieces]),
  )


class CompletionLog:
  """Completions as JSON lines, one each, in the order of problems and samples. docs/evaluation.md has the fields.

  Batches are appended and flushed whole. A file that a kill left with part of a batch is cut back to the last whole one
  when it is opened, so that an evaluation goes on as if nothing had happened. Only process 0 writes.

  Args:
    path: of the file.
    benchmark: name, in every line.
    examples: N of them. samples: k. batch_problems: as for `complete_in_batches`.

  Attributes:
    done: problems that are in the file.
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
    """Writes the completions of the next problems."""
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
  """Twelve hexadecimal digits that differ (but for a chance of 2^-48) where the values read differently."""
  return hashlib.sha256("\0".join(map(repr, values)).encode("utf-8", "surrogatepass")).hexdigest()[:12]


def read_lines(path: str | os.PathLike) -> list[dict[str, Any]]:
  """The whole lines of a file of completions, [] where there is none; what a kill cut in half is left out.

  Raises:
    ValueError: a line that is no completion; names the file and the line.
  """
  path = Path(path)
  if not path.exists():
    return []
  *lines, _ = path.read_bytes().split(b"\n")
  return [_read_line(path, number, line) for number, line in enumerate(lines, start=1)]


def completions_of(lines: Sequence[Mapping[str, Any]]) -> Completions:
  """Lines of whole problems, each with as many samples, as completions."""

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
  """Offset behind each whole line, up to the first that is none."""
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
    found = json.loads(line)
    _ = found["problem"], found["sample"], found["success"]
    return found
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(
      f"{path}, line {number} is no completion ({type(error).__name__}: {error}); run the evaluation again, which "
      "goes on before that line."
    ) from error
