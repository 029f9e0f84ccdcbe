"""Sampled answers to held-out problems: `answers_before.jsonl`, `answers_after.jsonl`, and their view in the report."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from rspo_jax.data.examples import Example
from rspo_jax.evaluation.completion_log import Completions
from rspo_jax.run.workdir import write_text_atomic

SIDES = ("before", "after")  # RL
_SHOWN_PROBLEMS = 12
_SHOWN_CHARACTERS = 600  # of one prompt or answer


def write_answers(path: Path, benchmarks: Iterable[tuple[Sequence[Example], Completions]]) -> None:
  """Writes one JSON line per evaluated problem: prompt, answers, success, reward (k of each). Process 0 only.

  Args:
    benchmarks: for each, its problems and their completions. Completions are those of the first problems; problems
      without completions are ignored.
  """
  if jax.process_index() != 0:
    return
  lines = []
  for examples, completions in benchmarks:
    k, scores = completions.samples, completions.scores
    for index, example in enumerate(examples[: len(completions.texts) // k]):
      rows = slice(index * k, (index + 1) * k)
      line = {
        "prompt": example.prompt,
        "answers": list(completions.texts[rows]),
        "success": scores.success[rows].tolist(),
        "reward": [round(reward, 6) for reward in scores.reward[rows].tolist()],
      }
      lines.append(json.dumps(line, allow_nan=False) + "\n")
  write_text_atomic(Path(path), "".join(lines))


def read_answers(workdir: Path, side: str) -> list[dict[str, Any]]:
  """The lines of `write_answers`, one per problem; [] if the file is absent. side: "before" or "after" RL."""
  path = Path(workdir) / f"answers_{side}.jsonl"
  return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def shown_answers(workdir: Path) -> list[dict[str, Any]]:
  """The first problems with their answers before and after RL, shortened for the report; equal answers are merged."""
  lines = {side: read_answers(workdir, side)[:_SHOWN_PROBLEMS] for side in SIDES}
  rows = []
  for index in range(max(map(len, lines.values()))):
    row = {side: _merge_answers(lines[side][index]) if index < len(lines[side]) else None for side in SIDES}
    source = next(lines[side][index] for side in SIDES if index < len(lines[side]))
    rows.append(row | {"prompt": _shorten(source["prompt"])})
  return rows


def _merge_answers(line: Mapping[str, Any]) -> dict[str, Any]:
  counts = Counter(zip(line["answers"], line["success"], line["reward"], strict=True))
  return {
    "correct": sum(line["success"]),
    "of": len(line["answers"]),
    "answers": [
      {"text": _shorten(text), "correct": correct, "reward": reward, "times": times}
      for (text, correct, reward), times in counts.items()
    ],
  }


def _shorten(text: str) -> str:
  return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + " …"
