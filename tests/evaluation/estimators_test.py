"""Every estimator against numbers worked out by hand, against brute force, and against other people's formulas."""

import collections
import itertools
import math

import numpy as np
import pytest

from rspo_jax.evaluation import estimators
from rspo_jax.evaluation.estimators import (
  avg_at_k,
  bootstrap,
  interval,
  macro_average,
  maj_at_k,
  pass_at_k,
  powers_of_two,
)

RIGHT = ("a", "c")  # the right answers of random cases


def of_counts(n, counts):
  """[N, n]: so many right ones of n in each row."""
  return np.arange(n) < np.array(counts)[:, None]


def random_answers(seed, n, letters=("", "a", "b", "c", "d")):
  answers = np.random.default_rng(seed).choice(letters, n).tolist()
  return answers, np.isin(answers, RIGHT)


def test_avg_is_the_share_of_right_completions_by_hand():
  np.testing.assert_allclose(avg_at_k([[1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 0]]), [0.5, 0, 0.75])


def test_pass_at_k_by_hand():
  # Of 5 completions 2 are right; 3 drawn: all wrong in C(3, 3) = 1 of C(5, 3) = 10 ways.
  np.testing.assert_allclose(pass_at_k(of_counts(5, [2]), 3), [0.9])
  # 4 of which 1 is right, 2 drawn: C(3, 2) / C(4, 2) = 3 / 6. None right, all right.
  np.testing.assert_allclose(pass_at_k(of_counts(4, [1, 0, 4]), 2), [0.5, 0, 1])
  np.testing.assert_allclose(pass_at_k(of_counts(10, [3]), 1), [0.3])


@pytest.mark.parametrize("n", [1, 3, 6])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(n):
  for right, k in itertools.product(range(n + 1), range(1, n + 1)):
    subsets = list(itertools.combinations(range(n), k))
    wanted = sum(min(subset) < right for subset in subsets) / len(subsets)
    np.testing.assert_allclose(pass_at_k(of_counts(n, [right]), k), [wanted], rtol=1e-14)


def test_pass_at_k_equals_the_binomial_form_and_the_published_program():
  for n, k in ((7, 3), (64, 64), (100, 10), (200, 100)):
    for right in range(n + 1):
      binomial = 1 - math.comb(n - right, k) / math.comb(n, k)
      # Chen et al. 2021, figure 3.
      published = 1.0 if n - right < k else 1.0 - np.prod(1.0 - k / np.arange(n - right + 1, n + 1))
      found = pass_at_k(of_counts(n, [right]), k)[0]
      assert found == pytest.approx(binomial, abs=1e-12)
      assert found == pytest.approx(published, abs=1e-12)


def test_pass_at_k_of_very_many_completions_neither_overflows_nor_leaves_its_range():
  found = pass_at_k(of_counts(20_000, [0, 1, 10, 20_000]), 10_000)
  assert found[0] == 0 and found[3] == 1
  np.testing.assert_allclose(found[1:3], [0.5, 1 - 0.5**10], rtol=3e-3)


def test_pass_at_k_is_unbiased():
  n, k, p = 9, 4, 0.3
  chance = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
  assert chance @ pass_at_k(of_counts(n, range(n + 1)), k) == pytest.approx(1 - (1 - p) ** k)


def test_maj_by_hand():
  def of(answers, k):
    return maj_at_k([answers], [[answer in RIGHT for answer in answers]], k)[0]

  assert of(["a", "a", "b"], 3) == 1
  assert of(["a", "b", "b"], 3) == 0
  assert of(["a", "b"], 2) == 0.5  # a tie of two
  assert of(["a", "b", "d"], 3) == pytest.approx(1 / 3)  # a tie of three
  # Two of a, a, b: aa once, ab twice, of which half.
  assert of(["a", "a", "b"], 2) == pytest.approx((1 + 2 * 0.5) / 3)
  # No answer takes a place and does not vote: of ('', a), ('', b), (a, b) the right one wins 1 + 0 + 1/2.
  assert of(["", "a", "b"], 2) == pytest.approx(0.5)
  assert of(["", "", "a"], 3) == 1
  assert of(["", "", "a"], 1) == pytest.approx(1 / 3)
  assert of(["", ""], 2) == 0


@pytest.mark.parametrize("seed", range(12))
def test_maj_is_the_mean_over_all_subsets_with_ties_shared(seed):
  n = 3 + seed % 6
  answers, right = random_answers(seed, n)
  for k in range(1, n + 1):
    total = 0.0
    for subset in itertools.combinations(range(n), k):
      votes = collections.Counter(answers[i] for i in subset if answers[i])
      winners = [answer for answer in votes if votes[answer] == max(votes.values())]
      total += sum(winner in RIGHT for winner in winners) / max(len(winners), 1)
    assert maj_at_k([answers], right[None], k)[0] == pytest.approx(total / math.comb(n, k), abs=1e-13)


def test_maj_of_many_completions_agrees_with_drawing():
  answers, right = random_answers(0, 300, letters=("a", "b", "b", "d", *map(str, range(40)), ""))
  rng, k, trials = np.random.default_rng(1), 32, 4000
  total = 0.0
  for _ in range(trials):
    votes = collections.Counter(answers[i] for i in rng.permutation(300)[:k] if answers[i])
    winners = [answer for answer in votes if votes[answer] == max(votes.values())]
    total += sum(winner in RIGHT for winner in winners) / len(winners)
  assert maj_at_k([answers], right[None], k)[0] == pytest.approx(total / trials, abs=4 * 0.5 / trials**0.5)


def test_maj_at_one_and_two_are_the_average():
  # Two completions agree or tie: the vote cannot help yet.
  answers, right = random_answers(3, 12, letters=("a", "b", "c", "d"))
  for k in (1, 2):
    np.testing.assert_allclose(maj_at_k([answers], right[None], k), avg_at_k(right[None]))


def test_equal_answers_are_one_candidate_however_they_are_spaced_or_encoded():
  answers = ["x + 1", " x  +\n1", "\uff58 + 1", "2", "2"]
  assert maj_at_k([answers], [[1, 1, 1, 0, 0]], 5)[0] == 1
  assert maj_at_k([["1/2", "0.5", "3", "3", "3"]], [[1, 1, 0, 0, 0]], 5)[0] == 0


def test_an_answer_that_was_judged_both_ways_is_worth_its_share():
  assert maj_at_k([["a", "a", "a", "b"]], [[1, 1, 0, 0]], 4)[0] == pytest.approx(2 / 3)


def test_the_paper_s_average_weighs_benchmarks_equally_whatever_their_size():
  small, large = np.ones(2), np.zeros(1000)
  assert macro_average([small.mean(), large.mean()]) == 0.5
  np.testing.assert_allclose(macro_average([np.array([1.0, 2.0]), np.array([3.0, 6.0])]), [2, 4])
  with pytest.raises(ValueError, match="no benchmark"):
    macro_average([])


def test_bootstrap_draws_what_enumeration_gives():
  values = np.array([0.0, 1.0, 5.0])
  every = np.array([np.mean(drawn) for drawn in itertools.product(values, repeat=3)])
  found = bootstrap(values, resamples=60_000)
  for mean in np.unique(every):
    assert np.mean(np.isclose(found, mean)) == pytest.approx(np.mean(np.isclose(every, mean)), abs=0.01)


@pytest.mark.parametrize("over", ["samples", "both"])
def test_bootstrap_of_completions_draws_what_enumeration_gives(over):
  values = np.array([[0.0, 1.0], [2.0, 6.0]])
  rows = [(0, 1)] if over == "samples" else list(itertools.product(range(2), repeat=2))
  picks = list(itertools.product(range(2), repeat=2))
  every = np.array([
    np.mean([values[i, picks_i] for i, picks_i in zip(row, map(list, pair), strict=True)])
    for row in rows
    for pair in itertools.product(picks, repeat=2)
  ])  # fmt: skip
  found = bootstrap(values, resamples=60_000, over=over)
  for mean in np.unique(every):
    assert np.mean(np.isclose(found, mean)) == pytest.approx(np.mean(np.isclose(every, mean)), abs=0.01)


def test_interval_is_that_of_scipy():
  stats = pytest.importorskip("scipy.stats")
  values = np.random.default_rng(0).beta(0.4, 0.6, 60)
  theirs = stats.bootstrap(
    (values,), np.mean, n_resamples=20_000, method="percentile", confidence_level=0.9, rng=np.random.default_rng(1)
  ).confidence_interval
  np.testing.assert_allclose(interval(bootstrap(values, resamples=20_000), 0.9), theirs, atol=0.004)


def test_interval_covers_the_truth_as_often_as_it_says():
  """New problems and new completions each time: 95 % intervals over problems hold the policy's mean success."""
  rng, p, samples = np.random.default_rng(0), 0.4, 4
  covered, trials = 0, 400
  for trial in range(trials):
    chance = rng.beta(p, 1 - p, 50)
    drawn = avg_at_k(rng.random((50, samples)) < chance[:, None])
    low, high = interval(bootstrap(drawn, resamples=500, seed=trial))
    covered += low <= p <= high
  assert 0.90 <= covered / trials <= 0.98


def test_interval_over_samples_covers_the_truth_of_these_very_problems():
  rng = np.random.default_rng(0)
  chance = rng.beta(0.5, 0.5, 30)
  covered, trials = 0, 400
  for trial in range(trials):
    drawn = rng.random((30, 16)) < chance[:, None]
    low, high = interval(bootstrap(drawn, resamples=400, seed=trial, over="samples"))
    covered += low <= chance.mean() <= high
  assert 0.90 <= covered / trials <= 0.98


def test_two_levels_are_wider_than_problems_alone_and_samples_alone_narrower():
  rng = np.random.default_rng(0)
  drawn = rng.random((40, 4)) < rng.beta(1, 1, 40)[:, None]
  width = {over: np.ptp(interval(bootstrap(drawn, over=over))) for over in estimators.OVER}
  assert width["samples"] < width["problems"] < width["both"]


def test_pairing_takes_out_what_problems_have_in_common():
  rng = np.random.default_rng(0)
  hard = rng.beta(0.3, 0.3, 200)
  old, new = (avg_at_k(rng.random((200, 64)) < np.clip(hard + shift, 0, 1)[:, None]) for shift in (0, 0.05))
  low, high = interval(bootstrap(new - old))
  assert 0 < low < np.mean(new - old) < high < 0.1
  unpaired = interval(bootstrap(new, seed=1) - bootstrap(old, seed=2))
  assert high - low < 0.3 * np.ptp(unpaired)


def test_equal_seeds_give_equal_draws_and_memory_is_bounded(monkeypatch):
  values = np.random.default_rng(0).random((20, 3))
  for over in estimators.OVER:
    first, again = (bootstrap(values, resamples=50, seed=(3, 4), over=over) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, bootstrap(values, resamples=50, seed=(3, 5), over=over))
  monkeypatch.setattr(estimators, "_AT_ONCE", 100)
  assert bootstrap(values, resamples=50).shape == (50,)


def test_powers_of_two_end_with_the_number_of_samples():
  assert [powers_of_two(n) for n in (1, 2, 6, 8)] == [(1,), (1, 2), (1, 2, 4, 6), (1, 2, 4, 8)]


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: pass_at_k(of_counts(4, [1]), 5), "k is 5 with 4 samples a problem; want 1 to 4: draw more"),
    (lambda: pass_at_k(of_counts(4, [1]), 0), "k is 0"),
    (lambda: maj_at_k([["a"]], [[1]], 2), "k is 2 with 1 samples"),
    (lambda: maj_at_k([["a", "b"]], [[1]], 1), "as many answers"),
    (lambda: avg_at_k([1, 0]), "want .problems, samples."),
    (lambda: bootstrap(np.ones(1)), "1 problems"),
    (lambda: bootstrap(np.ones(4), over="samples"), "want 2 axes"),
    (lambda: bootstrap(np.ones((4, 1)), over="samples"), "1 samples"),
    (lambda: bootstrap(np.ones(4), over="runs"), "over is 'runs'; want one of problems, samples, both"),
    (lambda: interval(np.ones(4), 95), "level is 95"),
  ],
)
def test_mistakes_are_told(call, message):
  with pytest.raises(ValueError, match=message):
    call()
