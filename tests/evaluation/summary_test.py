"""Tables, pictures and intervals of an evaluation, from completions that are made up."""

import math

import numpy as np
import pytest

from experiments.reporting import evaluation_plots
from rspo_jax.evaluation.completion_log import Completions
from rspo_jax.evaluation.summary import describe, estimates, summarize, table_rows, write_up
from rspo_jax.rewards.base import Scores


def synthetic(seed, problems, samples, chance, answers=True):
  success = np.random.default_rng(seed).random(problems * samples) < chance
  said = tuple("right" if right else f"{i}" for i, right in enumerate(success)) if answers else ("",) * len(success)
  scores = Scores(success.astype(np.float32), success, success, ("",) * len(success), said)
  return Completions(tuple(said), np.full(len(success), 5), scores, samples, np.ones(len(success), bool))


def test_tables_and_pictures_stand_whatever_there_is():
  """One problem has no interval, a reward without answers no majority, benchmarks may have other k than their group."""
  drawn = {"many": synthetic(0, 20, 4, 0.5), "one": synthetic(1, 1, 2, 0.5), "code": synthetic(2, 9, 1, 1.0, False)}
  measures = {name: ("average", estimates(found, None)) for name, found in drawn.items()}
  found = summarize(measures, level=0.9, resamples=100, seed=0)
  assert found["benchmarks"]["one"]["avg"]["low"] is None and found["groups"]["average"]["avg"]["low"] is None
  assert not any(measure.startswith("maj") for measure in found["benchmarks"]["code"])
  told = {
    "checkpoint": {"folder": "a | b", "step": 3},
    "bootstrap": {"level": 0.9, "resamples": 100},
    "benchmarks": {
      name: {"sampling": "T = 1", **describe(drawn[name], None), "measures": of}
      for name, of in found["benchmarks"].items()
    },
    "groups": found["groups"],
  }
  heads, rows = table_rows(told)
  assert heads == ["", "problems", "n", "avg@n", "pass@n", "maj@n", "ended", "tokens"]
  assert all(len(row) == len(heads) for row in rows)
  assert [row[0] for row in rows] == ["many", "one", "code", "average, mean of 3"]
  assert rows[2][5] == "-" and rows[3][4].endswith("@1")
  assert "| pass@ | 1 | 2 | 4 |" in write_up(told)
  assert evaluation_plots.draw_results(told).startswith(b"\x89PNG")
  assert not any(math.isnan(entry["value"]) for of in found["benchmarks"].values() for entry in of.values())


def test_intervals_of_an_average_resample_every_benchmark_for_itself():
  drawn = {name: synthetic(seed, 200, 2, 0.5) for seed, name in enumerate(("a", "b", "c", "d"))}
  measures = {name: ("average", estimates(found, None)) for name, found in drawn.items()}
  found = summarize(measures, level=0.95, resamples=4000, seed=0)
  width = [entry["avg"]["high"] - entry["avg"]["low"] for entry in found["benchmarks"].values()]
  group = found["groups"]["average"]["avg"]
  assert group["high"] - group["low"] == pytest.approx(math.sqrt(np.sum(np.square(width))) / 4, rel=0.08)
