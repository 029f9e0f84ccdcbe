"""The curriculum chooses inside its band, retries skipped problems, always fills a batch, and resumes exactly."""

import numpy as np
import pytest

from rspo_jax.data.curriculum import Curriculum, CurriculumOptions
from rspo_jax.data.examples import Example, Split, batches
from rspo_jax.run.metrics import METRICS


def numbered(count, weights=None):
  sources = list(weights or [""])
  examples = tuple(Example(str(i), i, source=sources[i % len(sources)]) for i in range(count))
  return Split("numbered", examples, weights=weights or {})


def curriculum(split, seed=3, **changed):
  return Curriculum(split, CurriculumOptions(**{"low": 0.2, "high": 0.8, **changed}), seed=seed)


def steps(chooser, count, number, rate):
  """The indices of `number` steps of `count` problems, each recorded with rate(indices)."""
  seen = []
  for _ in range(number):
    indices, examples = chooser.choose(count)
    assert [example.gold for example in examples] == indices.tolist()
    chooser.record(indices, rate(indices))
    seen.append(indices)
  return seen


@pytest.mark.parametrize("weights", [None, {"a": 3.0, "b": 1.0}])
def test_problems_inside_the_band_come_in_the_order_of_plain_batches(weights):
  split = numbered(24, weights)
  plain = batches(split, 4, seed=3)
  chosen = steps(curriculum(split), 4, 3, lambda indices: np.full(len(indices), 0.5))
  assert [indices.tolist() for indices in chosen] == [[example.gold for example in plain.at(i)] for i in range(3)]


def test_problems_outside_the_band_are_skipped_until_they_are_due_again():
  chooser = curriculum(numbered(40), retry_epochs=5)
  hard, easy = set(range(10)), set(range(10, 20))

  def rate(indices):
    return [0.0 if i in hard else 1.0 if i in easy else 0.5 for i in indices.tolist()]

  first = np.concatenate(steps(chooser, 8, 5, rate))
  assert sorted(first) == list(range(40))
  metrics = chooser.metrics()
  assert [metrics[f"curriculum/{name}"] for name in ("unseen", "below", "in_band", "above")] == [0, 0.25, 0.5, 0.25]
  later = np.concatenate(steps(chooser, 8, 5, rate))
  assert min(later) >= 20
  assert chooser.metrics()["curriculum/skipped"] > 0
  # Within five more epochs each of them is retried.
  retried = set(np.concatenate(steps(chooser, 8, 20, rate)).tolist())
  assert hard <= retried and easy <= retried


def test_a_problem_outside_the_band_returns_once_its_success_rate_is_inside():
  chooser = curriculum(numbered(20), retry_epochs=2, memory=0.5)
  learned = [False]

  def rate(indices):
    return [0.5 if i >= 4 or learned[0] else 0.0 for i in indices.tolist()]

  steps(chooser, 5, 4, rate)
  assert chooser.metrics()["curriculum/below"] == 0.2
  learned[0] = True
  steps(chooser, 5, 30, rate)
  assert chooser.metrics()["curriculum/in_band"] == 1.0


def test_the_weight_of_an_estimate_decays_with_its_age():
  chooser = curriculum(numbered(10), memory=0.5)
  chooser.record([0, 1], [0.8, 0.8])
  chooser.choose(10)  # an epoch
  chooser.record([0], [0.0])
  assert chooser.state()["rate"][0] == pytest.approx(0.4)
  chooser.choose(10)
  chooser.record([1], [0.0])
  assert chooser.state()["rate"][1] == pytest.approx(0.2)
  assert curriculum(numbered(2)).state()["rate"].tolist() == [0, 0]


def test_an_index_recorded_twice_counts_with_the_mean_of_its_rates():
  chooser = curriculum(numbered(5))
  chooser.record([3, 1, 3], [1.0, 0.25, 0.5])
  assert chooser.state()["rate"].tolist() == [0, 0.25, 0, 0.75, 0]
  chooser.record([], [])


def test_a_batch_is_filled_with_the_problems_nearest_to_the_band():
  split = numbered(30)
  chooser = curriculum(split, retry_epochs=1000)
  rates = np.linspace(0.81, 1.0, 30)
  rates[7] = 0.5
  chooser.record(np.arange(30), rates)
  indices, _ = chooser.choose(4)
  assert sorted(indices.tolist()) == [0, 1, 2, 7]
  metrics = chooser.metrics()
  assert metrics["curriculum/filled"] == 3 and metrics["curriculum/retried"] == 0
  assert metrics["curriculum/skipped"] <= 30


def test_skipped_problems_are_bounded_per_batch():
  chooser = curriculum(numbered(1000), max_skipped=5, retry_epochs=1000)
  chooser.record(np.arange(1000), np.zeros(1000))
  indices, _ = chooser.choose(3)
  assert len(set(indices.tolist())) == 3
  assert chooser.metrics()["curriculum/skipped"] == 15
  assert int(chooser.state()["position"]) == 15
  none = curriculum(numbered(10), max_skipped=0)
  none.record(np.arange(10), np.zeros(10))
  assert len(none.choose(10)[0]) == 10


@pytest.mark.parametrize("weights", [None, {"a": 4.0, "b": 1.0}])
def test_no_batch_repeats_an_example(weights):
  chooser = curriculum(numbered(12, weights))
  for indices in steps(chooser, 11, 3, lambda indices: indices % 3 / 2):
    assert len(set(indices.tolist())) == 11


def test_resumed_and_parallel_curricula_choose_the_same():
  split = numbered(50, {"a": 1.0, "b": 2.0})

  def rate(indices):
    return indices % 5 / 4

  first = curriculum(split)
  before = steps(first, 8, 7, rate)
  saved = first.state()
  after = steps(first, 8, 7, rate)
  resumed = curriculum(split)
  resumed.restore(saved)
  assert resumed.metrics().keys() == first.metrics().keys()
  np.testing.assert_array_equal(steps(resumed, 8, 7, rate), after)
  second = curriculum(split)
  np.testing.assert_array_equal(steps(second, 8, 14, rate), before + after)
  for name, value in first.state().items():
    np.testing.assert_array_equal(value, resumed.state()[name])
    np.testing.assert_array_equal(value, second.state()[name])
  assert not np.array_equal(saved["rate"], first.state()["rate"])  # a copy


def test_metrics_are_documented_and_shares_sum_to_one():
  chooser = curriculum(numbered(9))
  chooser.record([0, 1, 2], [0.0, 0.5, 1.0])
  metrics = chooser.metrics()
  assert metrics.keys() <= METRICS.keys()
  assert sum(metrics[f"curriculum/{name}"] for name in ("unseen", "below", "in_band", "above")) == pytest.approx(1)


def test_default_options_skip_nothing():
  split = numbered(12)
  chooser = Curriculum(split, CurriculumOptions(), seed=3)
  chosen = steps(chooser, 4, 9, lambda indices: indices % 2)
  assert [indices.tolist() for indices in chosen] == [
    [example.gold for example in batches(split, 4, seed=3).at(i)] for i in range(9)
  ]


@pytest.mark.parametrize(
  ("changed", "message"),
  [
    ({"low": 0.9}, "low is 0.9 and high 0.8; want success rates with 0 <= low <= high <= 1"),
    ({"high": 1.5}, "high 1.5"),
    ({"memory": 1.0}, "memory is 1.0; want a value in"),
    ({"retry_epochs": 0}, "retry_epochs is 0"),
    ({"max_skipped": -1}, "max_skipped is -1"),
    ({"seed": -1}, "seed is -1"),
  ],
)
def test_options_out_of_range_are_rejected(changed, message):
  with pytest.raises(ValueError, match=message):
    curriculum(numbered(5), **changed)


def test_invalid_records_counts_and_states_are_rejected():
  chooser = curriculum(numbered(5))
  for indices, rates, message in (
    ([0, 1], [0.5], "want a rate for each index"),
    ([5], [0.5], "indices go from 5 to 5; want 0 to 4"),
    ([0], [1.5], "want values in"),
    ([0], [np.nan], "want values in"),
  ):
    with pytest.raises(ValueError, match=message):
      chooser.record(indices, rates)
  for count in (0, 6):
    with pytest.raises(ValueError, match=f"count is {count}; want 1 to 5, the examples of numbered"):
      chooser.choose(count)
  with pytest.raises(ValueError, match="of another data set"):
    chooser.restore(curriculum(numbered(6)).state())
  with pytest.raises(ValueError, match="of another data set"):
    chooser.restore({"position": np.array(0)})
