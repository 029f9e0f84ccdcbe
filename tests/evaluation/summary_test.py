"""Tables, figures and intervals of an evaluation, from synthetic completions."""

import math

import numpy as np
import pytest

from experiments.reporting import evaluation_plots
from rspo_jax.evaluation.completion_log import Completions
from rspo_jax.evaluation.summary import describe, estimates, summarize, table_rows, write_up
from rspo_jax.rewards.base import Scores


def synthetic(seed, problems, samples, probability, answers=True):
  success = np.random.default_rng(seed).random(problems * samples) < probability
  texts = (
    tuple("right" if correct else f"{i}" for i, correct in enumerate(success)) if answers else ("",) * len(success)
  )
  scores = Scores(success.astype(np.float32), success, success, ("",) * len(success), texts)
  return Completions(texts, np.full(len(success), 5), scores, samples, np.ones(len(success), bool))


def test_tables_and_figures_handle_missing_intervals_majorities_and_unequal_k():
  """One problem has no interval, a reward without answers no maj@k, and benchmarks of a group differ in k."""
  sampled = {"many": synthetic(0, 20, 4, 0.5), "one": synthetic(1, 1, 2, 0.5), "code": synthetic(2, 9, 1, 1.0, False)}
  estimated = {name: ("average", estimates(completions, None)) for name, completions in sampled.items()}
  summary = summarize(estimated, level=0.9, resamples=100, seed=0)
  assert summary["benchmarks"]["one"]["avg"]["low"] is None and summary["groups"]["average"]["avg"]["low"] is None
  assert not any(measure.startswith("maj") for measure in summary["benchmarks"]["code"])
  results = {
    "checkpoint": {"folder": "a | b", "step": 3},
    "bootstrap": {"level": 0.9, "resamples": 100},
    "benchmarks": {
      name: {"sampling": "T = 1", **describe(sampled[name], None), "measures": measures}
      for name, measures in summary["benchmarks"].items()
    },
    "groups": summary["groups"],
  }
  heads, rows = table_rows(results)
  assert heads == ["", "problems", "n", "avg@n", "pass@n", "maj@n", "ended", "tokens"]
  assert all(len(row) == len(heads) for row in rows)
  assert [row[0] for row in rows] == ["many", "one", "code", "average, mean of 3"]
  assert rows[2][5] == "-" and rows[3][4].endswith("@1")
  assert "| pass@ | 1 | 2 | 4 |" in write_up(results)
  assert evaluation_plots.draw_results(results).startswith(b"\x89PNG")
  assert not any(
    math.isnan(entry["value"]) for measures in summary["benchmarks"].values() for entry in measures.values()
  )


def test_intervals_of_an_average_resample_the_benchmarks_independently():
  sampled = {name: synthetic(seed, 200, 2, 0.5) for seed, name in enumerate(("a", "b", "c", "d"))}
  estimated = {name: ("average", estimates(completions, None)) for name, completions in sampled.items()}
  summary = summarize(estimated, level=0.95, resamples=4000, seed=0)
  width = [entry["avg"]["high"] - entry["avg"]["low"] for entry in summary["benchmarks"].values()]
  group = summary["groups"]["average"]["avg"]
  assert group["high"] - group["low"] == pytest.approx(math.sqrt(np.sum(np.square(width))) / 4, rel=0.08)
