"""Every estimator against values computed by hand, brute force over subsets, and published formulas."""

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

CORRECT = ("a", "c")  # the correct answers of random cases


def of_counts(n, counts):
  """[N, n] successes: counts[i] of the n completions of problem i are correct."""
  return np.arange(n) < np.array(counts)[:, None]


def random_answers(seed, n, letters=("", "a", "b", "c", "d")):
  answers = np.random.default_rng(seed).choice(letters, n).tolist()
  return answers, np.isin(answers, CORRECT)


def test_avg_is_the_share_of_correct_completions():
  np.testing.assert_allclose(avg_at_k([[1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 0]]), [0.5, 0, 0.75])


def test_pass_at_k_equals_values_computed_by_hand():
  # 2 of 5 completions are correct; of the C(5, 3) = 10 subsets of 3, C(3, 3) = 1 has none of them.
  np.testing.assert_allclose(pass_at_k(of_counts(5, [2]), 3), [0.9])
  # 1 of 4 is correct: C(3, 2) / C(4, 2) = 3 / 6 of the pairs miss it. Then none and all correct.
  np.testing.assert_allclose(pass_at_k(of_counts(4, [1, 0, 4]), 2), [0.5, 0, 1])
  np.testing.assert_allclose(pass_at_k(of_counts(10, [3]), 1), [0.3])


@pytest.mark.parametrize("n", [1, 3, 6])
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_completion(n):
  for correct, k in itertools.product(range(n + 1), range(1, n + 1)):
    subsets = list(itertools.combinations(range(n), k))
    expected = sum(min(subset) < correct for subset in subsets) / len(subsets)
    np.testing.assert_allclose(pass_at_k(of_counts(n, [correct]), k), [expected], rtol=1e-14)


def test_pass_at_k_equals_the_binomial_form_and_the_published_program():
  for n, k in ((7, 3), (64, 64), (100, 10), (200, 100)):
    for correct in range(n + 1):
      binomial = 1 - math.comb(n - correct, k) / math.comb(n, k)
      # Chen et al. 2021, figure 3.
      published = 1.0 if n - correct < k else 1.0 - np.prod(1.0 - k / np.arange(n - correct + 1, n + 1))
      estimate = pass_at_k(of_counts(n, [correct]), k)[0]
      assert estimate == pytest.approx(binomial, abs=1e-12)
      assert estimate == pytest.approx(published, abs=1e-12)


def test_pass_at_k_of_many_completions_does_not_overflow_and_stays_in_range():
  estimates = pass_at_k(of_counts(20_000, [0, 1, 10, 20_000]), 10_000)
  assert estimates[0] == 0 and estimates[3] == 1
  np.testing.assert_allclose(estimates[1:3], [0.5, 1 - 0.5**10], rtol=3e-3)


def test_pass_at_k_is_unbiased():
  n, k, p = 9, 4, 0.3
  probability = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
  assert probability @ pass_at_k(of_counts(n, range(n + 1)), k) == pytest.approx(1 - (1 - p) ** k)


def test_maj_at_k_equals_values_computed_by_hand():
  def of(answers, k):
    return maj_at_k([answers], [[answer in CORRECT for answer in answers]], k)[0]

  assert of(["a", "a", "b"], 3) == 1
  assert of(["a", "b", "b"], 3) == 0
  assert of(["a", "b"], 2) == 0.5  # a tie of two
  assert of(["a", "b", "d"], 3) == pytest.approx(1 / 3)  # a tie of three
  # The pairs of a, a, b: aa once, and ab twice, which is a tie.
  assert of(["a", "a", "b"], 2) == pytest.approx((1 + 2 * 0.5) / 3)
  # A completion without answer counts as one of k but has no vote: in ('', a), ('', b), (a, b) a wins 1 + 0 + 1/2.
  assert of(["", "a", "b"], 2) == pytest.approx(0.5)
  assert of(["", "", "a"], 3) == 1
  assert of(["", "", "a"], 1) == pytest.approx(1 / 3)
  assert of(["", ""], 2) == 0


@pytest.mark.parametrize("seed", range(12))
def test_maj_at_k_is_the_mean_over_all_subsets_with_ties_shared(seed):
  n = 3 + seed % 6
  answers, correct = random_answers(seed, n)
  for k in range(1, n + 1):
    total = 0.0
    for subset in itertools.combinations(range(n), k):
      votes = collections.Counter(answers[i] for i in subset if answers[i])
      winners = [answer for answer in votes if votes[answer] == max(votes.values())]
      total += sum(winner in CORRECT for winner in winners) / max(len(winners), 1)
    assert maj_at_k([answers], correct[None], k)[0] == pytest.approx(total / math.comb(n, k), abs=1e-13)


def test_maj_at_k_of_many_completions_agrees_with_random_subsets():
  answers, correct = random_answers(0, 300, letters=("a", "b", "b", "d", *map(str, range(40)), ""))
  rng, k, trials = np.random.default_rng(1), 32, 4000
  total = 0.0
  for _ in range(trials):
    votes = collections.Counter(answers[i] for i in rng.permutation(300)[:k] if answers[i])
    winners = [answer for answer in votes if votes[answer] == max(votes.values())]
    total += sum(winner in CORRECT for winner in winners) / len(winners)
  assert maj_at_k([answers], correct[None], k)[0] == pytest.approx(total / trials, abs=4 * 0.5 / trials**0.5)


def test_maj_at_one_and_two_equal_the_average():
  # Two completions agree or tie, so that voting has no effect.
  answers, correct = random_answers(3, 12, letters=("a", "b", "c", "d"))
  for k in (1, 2):
    np.testing.assert_allclose(maj_at_k([answers], correct[None], k), avg_at_k(correct[None]))


def test_answers_that_differ_in_spacing_or_encoding_are_one_candidate():
  answers = ["x + 1", " x  +\n1", "\uff58 + 1", "2", "2"]
  assert maj_at_k([answers], [[1, 1, 1, 0, 0]], 5)[0] == 1
  assert maj_at_k([["1/2", "0.5", "3", "3", "3"]], [[1, 1, 0, 0, 0]], 5)[0] == 0


def test_an_answer_with_contradictory_scores_counts_with_its_share():
  assert maj_at_k([["a", "a", "a", "b"]], [[1, 1, 0, 0]], 4)[0] == pytest.approx(2 / 3)


def test_macro_average_weights_benchmarks_equally():
  small, large = np.ones(2), np.zeros(1000)
  assert macro_average([small.mean(), large.mean()]) == 0.5
  np.testing.assert_allclose(macro_average([np.array([1.0, 2.0]), np.array([3.0, 6.0])]), [2, 4])
  with pytest.raises(ValueError, match="no benchmark"):
    macro_average([])


def test_bootstrap_means_have_the_enumerated_distribution():
  values = np.array([0.0, 1.0, 5.0])
  every = np.array([np.mean(resample) for resample in itertools.product(values, repeat=3)])
  means = bootstrap(values, resamples=60_000)
  for mean in np.unique(every):
    assert np.mean(np.isclose(means, mean)) == pytest.approx(np.mean(np.isclose(every, mean)), abs=0.01)


@pytest.mark.parametrize("over", ["samples", "both"])
def test_bootstrap_over_completions_has_the_enumerated_distribution(over):
  values = np.array([[0.0, 1.0], [2.0, 6.0]])
  rows = [(0, 1)] if over == "samples" else list(itertools.product(range(2), repeat=2))
  picks = list(itertools.product(range(2), repeat=2))
  every = np.array([
    np.mean([values[i, picks_i] for i, picks_i in zip(row, map(list, pair), strict=True)])
    for row in rows
    for pair in itertools.product(picks, repeat=2)
  ])  # fmt: skip
  means = bootstrap(values, resamples=60_000, over=over)
  for mean in np.unique(every):
    assert np.mean(np.isclose(means, mean)) == pytest.approx(np.mean(np.isclose(every, mean)), abs=0.01)


def test_interval_agrees_with_scipy():
  stats = pytest.importorskip("scipy.stats")
  values = np.random.default_rng(0).beta(0.4, 0.6, 60)
  expected = stats.bootstrap(
    (values,), np.mean, n_resamples=20_000, method="percentile", confidence_level=0.9, rng=np.random.default_rng(1)
  ).confidence_interval
  np.testing.assert_allclose(interval(bootstrap(values, resamples=20_000), 0.9), expected, atol=0.004)


def test_interval_over_problems_has_its_nominal_coverage():
  """With new problems and completions in each trial, 95 % intervals contain the policy's mean success."""
  rng, p, samples = np.random.default_rng(0), 0.4, 4
  covered, trials = 0, 400
  for trial in range(trials):
    probability = rng.beta(p, 1 - p, 50)
    sampled = avg_at_k(rng.random((50, samples)) < probability[:, None])
    low, high = interval(bootstrap(sampled, resamples=500, seed=trial))
    covered += low <= p <= high
  assert 0.90 <= covered / trials <= 0.98


def test_interval_over_samples_has_its_nominal_coverage_for_fixed_problems():
  rng = np.random.default_rng(0)
  probability = rng.beta(0.5, 0.5, 30)
  covered, trials = 0, 400
  for trial in range(trials):
    sampled = rng.random((30, 16)) < probability[:, None]
    low, high = interval(bootstrap(sampled, resamples=400, seed=trial, over="samples"))
    covered += low <= probability.mean() <= high
  assert 0.90 <= covered / trials <= 0.98


def test_interval_over_both_is_wider_and_over_samples_narrower_than_over_problems():
  rng = np.random.default_rng(0)
  sampled = rng.random((40, 4)) < rng.beta(1, 1, 40)[:, None]
  width = {over: np.ptp(interval(bootstrap(sampled, over=over))) for over in estimators.BOOTSTRAP_UNITS}
  assert width["samples"] < width["problems"] < width["both"]


def test_pairing_removes_the_variation_between_problems():
  rng = np.random.default_rng(0)
  hard = rng.beta(0.3, 0.3, 200)
  old, new = (avg_at_k(rng.random((200, 64)) < np.clip(hard + shift, 0, 1)[:, None]) for shift in (0, 0.05))
  low, high = interval(bootstrap(new - old))
  assert 0 < low < np.mean(new - old) < high < 0.1
  unpaired = interval(bootstrap(new, seed=1) - bootstrap(old, seed=2))
  assert high - low < 0.3 * np.ptp(unpaired)


def test_equal_seeds_give_equal_resamples_also_in_batches(monkeypatch):
  values = np.random.default_rng(0).random((20, 3))
  for over in estimators.BOOTSTRAP_UNITS:
    first, again = (bootstrap(values, resamples=50, seed=(3, 4), over=over) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, bootstrap(values, resamples=50, seed=(3, 5), over=over))
  monkeypatch.setattr(estimators, "_MAX_ELEMENTS", 100)
  assert bootstrap(values, resamples=50).shape == (50,)


def test_powers_of_two_end_with_the_number_of_samples():
  assert [powers_of_two(n) for n in (1, 2, 6, 8)] == [(1,), (1, 2), (1, 2, 4, 6), (1, 2, 4, 8)]


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: pass_at_k(of_counts(4, [1]), 5), "k is 5 with 4 samples a problem; want 1 to 4: sample more"),
    (lambda: pass_at_k(of_counts(4, [1]), 0), "k is 0"),
    (lambda: maj_at_k([["a"]], [[1]], 2), "k is 2 with 1 samples"),
    (lambda: maj_at_k([["a", "b"]], [[1]], 1), "want 1 answers for each of 1 problems"),
    (lambda: avg_at_k([1, 0]), "want .problems, samples."),
    (lambda: bootstrap(np.ones(1)), "1 problems"),
    (lambda: bootstrap(np.ones(4), over="samples"), "want 2 axes"),
    (lambda: bootstrap(np.ones((4, 1)), over="samples"), "1 samples"),
    (lambda: bootstrap(np.ones(4), over="runs"), "over is 'runs'; want one of problems, samples, both"),
    (lambda: interval(np.ones(4), 95), "level is 95"),
  ],
)
def test_invalid_arguments_are_refused(call, message):
  with pytest.raises(ValueError, match=message):
    call()
