"""Completions in batches, and the log that resumes after a kill."""

import json

import jax
import numpy as np
import pytest

from rspo_jax.data.examples import Example
from rspo_jax.evaluation.completion_log import (
  CompletionLog,
  complete_in_batches,
  completions_of,
  digest,
  join,
  read_lines,
)
from rspo_jax.rewards.base import RewardResult

EXAMPLES = [Example(f"{i}+1=", i + 1) for i in range(7)]
SAMPLES, BATCH = 2, 3


def reward(text, example):
  correct = text == str(example.gold)
  return RewardResult(0.1 + 0.9 * correct, correct, True, "right" if correct else "wrong", text)


class Generator:
  """Returns the correct answer for the first sample of each example; records its calls."""

  def __init__(self):
    self.calls = []

  def __call__(self, batch, first):
    self.calls.append((first, len(batch)))
    texts = [f"{e.gold}" if sample == 0 else 'line\u2028\n"é' for e in batch for sample in range(SAMPLES)]
    count = len(texts)
    return texts, np.arange(count) + 10 * first, np.arange(count) % 2 == 0


def batches(generate, first=0):
  return complete_in_batches(generate, reward, EXAMPLES, samples=SAMPLES, batch_problems=BATCH, first=first)


def open_log(path):
  return CompletionLog(path, "sums", EXAMPLES, samples=SAMPLES, batch_problems=BATCH)


def write(path):
  """Completes the log; returns the calls of the generator."""
  log, generate = open_log(path), Generator()
  for batch in batches(generate, log.done):
    log.append(batch)
  assert log.done == len(EXAMPLES)
  return generate.calls


def test_every_example_is_completed_once_in_batches_of_equal_size():
  generate = Generator()
  completions = join(batches(generate))
  assert generate.calls == [(0, 3), (3, 3), (6, 3)]  # the last one is padded
  assert len(completions.texts) == 14 and completions.success == 0.5
  assert completions.texts[::2] == tuple(str(e.gold) for e in EXAMPLES)
  np.testing.assert_array_equal(completions.success_by_problem, [[True, False]] * 7)
  assert completions.answers_by_problem[6] == ("7", 'line\u2028\n"é')
  np.testing.assert_array_equal(completions.tokens[-2:], [60, 61])


def test_without_examples_there_is_an_error():
  with pytest.raises(ValueError, match="no examples"):
    next(complete_in_batches(Generator(), reward, [], samples=1, batch_problems=1))


def test_lines_hold_all_fields_and_are_read_back_as_completions(tmp_path):
  path = tmp_path / "new" / "sums.jsonl"
  write(path)
  lines = read_lines(path)
  assert len(lines) == 14
  assert lines[12] == {
    "benchmark": "sums", "problem": 6, "sample": 0, "gold": digest([7]), "prompt": "6+1=", "completion": "7",
    "tokens": 60, "finished": True, "reward": 1.0, "success": True, "format": True, "why": "right", "answer": "7",
  }  # fmt: skip
  restored, expected = completions_of(lines), join(batches(Generator()))
  assert restored.texts == expected.texts and restored.samples == SAMPLES
  for name in ("reward", "success", "format", "reason", "answer"):
    np.testing.assert_array_equal(getattr(restored.scores, name), getattr(expected.scores, name))
  np.testing.assert_array_equal(restored.tokens, expected.tokens)
  np.testing.assert_array_equal(restored.finished, expected.finished)


def test_a_truncated_file_continues_after_its_last_complete_batch_to_the_same_bytes(tmp_path):
  path, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
  write(path)
  whole = path.read_bytes()
  ends = [0, *(i + 1 for i, byte in enumerate(whole) if byte == ord("\n"))]
  batch_ends = [ends[0], ends[6], ends[12], ends[14]]
  for size in sorted({*ends, *(end + 1 for end in ends[:-1]), *(end - 1 for end in ends[1:]), ends[6] + 40}):
    cut.write_bytes(whole[:size])
    calls = write(cut)
    assert cut.read_bytes() == whole
    assert [first for first, _ in calls] == [3 * i for i in range(3) if batch_ends[i + 1] > size], size


def test_a_finished_file_is_unchanged_and_lines_after_a_corrupt_one_are_dropped(tmp_path):
  path = tmp_path / "a.jsonl"
  write(path)
  whole = path.read_bytes()
  assert write(path) == []
  lines = whole.splitlines(keepends=True)
  path.write_bytes(b"".join([*lines[:8], b"\0\0\0\n", *lines[9:]]))
  assert open_log(path).done == 3
  write(path)
  assert path.read_bytes() == whole


def test_only_process_zero_writes(tmp_path, monkeypatch):
  whole = tmp_path / "a.jsonl"
  write(whole)
  whole.write_bytes(whole.read_bytes()[:-5])
  before = whole.read_bytes()
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  write(whole)
  write(tmp_path / "b.jsonl")
  assert whole.read_bytes() == before and not (tmp_path / "b.jsonl").exists()


def test_reading_leaves_out_an_incomplete_last_line_and_names_an_invalid_one(tmp_path):
  path = tmp_path / "a.jsonl"
  assert read_lines(path) == []
  write(path)
  whole = path.read_bytes()
  path.write_bytes(whole[:-3])
  assert len(read_lines(path)) == 13
  path.write_bytes(whole + json.dumps({"problem": 1}).encode() + b"\n")
  with pytest.raises(ValueError, match=r"a\.jsonl, line 15 is not a completion"):
    read_lines(path)


def test_digests_differ_between_values_and_are_equal_in_every_process():
  assert digest(["a", "b"]) != digest(["ab"]) != digest(["a"])
  assert digest([(1, "x"), {"a": None}]) == "3655995d5242"
