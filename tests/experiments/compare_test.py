"""Comparisons of two evaluations: the problems they share, paired differences, and the files that are written."""

import numpy as np
import pytest

from experiments import compare
from rspo_jax.data.examples import Example
from rspo_jax.evaluation.completion_log import CompletionLog, Completions, log_path
from rspo_jax.rewards.base import Scores
from rspo_jax.run.workdir import dump_json_atomic

PROBLEMS, SAMPLES = 8, 2


def write_evaluation(workdir, benchmarks):
  """benchmarks: name -> success [problems, samples]."""
  for name, success in benchmarks.items():
    flat = np.array(success, bool).ravel()
    count = len(flat)
    scores = Scores(flat.astype(np.float32), flat, flat, ("",) * count, ("",) * count)
    examples = [Example(f"{i}", i) for i in range(len(success))]
    log = CompletionLog(log_path(workdir, name, "sampled"), name, examples, samples=SAMPLES, batch_problems=1)
    log.append(Completions(("text",) * count, np.full(count, 3), scores, SAMPLES, np.ones(count, bool)))
  dump_json_atomic(workdir / "results.json", {"benchmarks": {name: {"group": "average"} for name in benchmarks}})
  return workdir


def successes(correct):
  """[PROBLEMS, SAMPLES]: the first `correct` problems are solved by all completions."""
  return np.repeat(np.arange(PROBLEMS)[:, None] < correct, SAMPLES, axis=1)


def test_only_shared_problems_with_all_their_completions_count(tmp_path):
  old = write_evaluation(tmp_path / "old", {"a": successes(2), "b": successes(4), "only old": successes(1)})
  new = write_evaluation(tmp_path / "new", {"a": successes(4)[:6], "b": successes(4)})
  path = log_path(new, "a", "sampled")
  path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))  # without the last completion
  comparison = compare.compare(old, new, resamples=100)
  a, b = (comparison["benchmarks"][name] for name in ("a", "b"))
  assert (a["problems"], a["left_out"], b["problems"], b["left_out"]) == (5, 3, PROBLEMS, 0)
  assert (a["old"]["avg"], a["new"]["avg"]) == (0.4, 0.8)
  assert a["difference"]["avg"]["value"] == pytest.approx(0.4)
  assert b["difference"]["avg"] == {"value": 0, "low": 0, "high": 0}
  assert comparison["groups"]["average"]["avg"]["value"] == pytest.approx(0.2)
  assert comparison["not_compared"] == ["only old"]


def test_the_table_and_the_figure_are_written(tmp_path, capsys):
  old = write_evaluation(tmp_path / "old", {"a": successes(2), "b": successes(4)})
  new = write_evaluation(tmp_path / "new", {"a": successes(4)[:6], "b": successes(4)})
  compare.run(compare.parse([str(old), str(new), str(old), f"--workdir={tmp_path / 'compared'}"]))
  text = (tmp_path / "compared" / "compare.md").read_text()
  assert text.startswith(f"# {old} -> {new}\n\n| ") and f"\n\n# {old} -> {old}\n\n| " in text
  assert "| a | 6 (2 left out) | 33.3 | 66.7 | +33.3 (" in text
  assert "95% intervals, paired bootstrap" in text and "95% intervals, paired bootstrap" in capsys.readouterr().out
  assert (tmp_path / "compared" / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_evaluations_without_shared_problems_and_unfinished_ones_are_refused(tmp_path):
  old = write_evaluation(tmp_path / "old", {"a": successes(2)})
  new = write_evaluation(tmp_path / "new", {"b": successes(2)})
  with pytest.raises(ValueError, match="has a and .* has b: they share no problem"):
    compare.compare(old, new)
  (new / "results.json").unlink()
  with pytest.raises(ValueError, match=r"results\.json is absent.*experiments\.evaluate"):
    compare.compare(old, new)
