"""Weights that correct for a sampler that differs from the trainer."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rspo_jax.objectives.mismatch import CORRECTIONS, LEVELS, MismatchOptions, mismatch_weight

MASK = np.asarray([[True, True, False], [False, True, True], [False, False, False]])
RATIO = np.asarray([[4.0, 0.25, 7.0], [7.0, 1.5, 3.0], [7.0, 7.0, 7.0]])
EVERY = [MismatchOptions(*pair, upper=2.0, lower=0.5) for pair in itertools.product(CORRECTIONS, LEVELS)]


def weights(ratio=RATIO, mask=MASK, way=lambda f: f):
  """By correction and level; the trainer's probabilities are `ratio` times the sampler's."""
  sampler = np.random.default_rng(0).uniform(-3, 0, mask.shape)
  old = (sampler + np.log(ratio)).astype(np.float32)
  run = way(lambda old, sampler, mask: [mismatch_weight(old, sampler, mask, options) for options in EVERY])
  return {(o.correction, o.level): w for o, w in zip(EVERY, run(old, sampler.astype(np.float32), mask), strict=True)}


@pytest.mark.parametrize("way", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_weights_by_hand(way):
  got = weights(way=way)
  root = 4.5**0.5  # the second row's geometric mean; its product is 4.5, the first row's 1
  for key, want in {
    ("tis", "token"): [[2.0, 0.25, 0], [0, 1.5, 2.0]],
    ("mis", "token"): [[0, 0.25, 0], [0, 1.5, 0]],
    ("icepop", "token"): [[0, 0, 0], [0, 1.5, 0]],
    ("tis", "sequence"): [[1, 1, 0], [0, 2.0, 2.0]],
    ("mis", "sequence"): [[1, 1, 0], [0, 0, 0]],
    ("icepop", "sequence"): [[1, 1, 0], [0, 0, 0]],
    ("tis", "sequence_mean"): [[1, 1, 0], [0, min(root, 2.0), min(root, 2.0)]],
    ("mis", "sequence_mean"): [[1, 1, 0], [0, 0, 0]],
    ("icepop", "sequence_mean"): [[1, 1, 0], [0, 0, 0]],
  }.items():
    assert got[key].dtype == jnp.float32
    np.testing.assert_allclose(got[key], [*want, [0, 0, 0]], rtol=1e-5, err_msg=str(key))


def test_only_icepop_has_a_lower_bound():
  got = weights(np.full(MASK.shape, 0.25))
  for (correction, level), weight in got.items():
    want = 0.0 if correction == "icepop" else {"sequence": 0.0625}.get(level, 0.25)
    np.testing.assert_allclose(weight[MASK], want, rtol=1e-5)


def test_equal_policies_have_weight_one_inside_the_mask():
  for weight in weights(np.ones(MASK.shape)).values():
    np.testing.assert_allclose(weight, MASK, rtol=1e-6)


def test_values_outside_the_mask_have_no_effect():
  expected = weights()
  for outside in (np.nan, np.inf, 1e-9):
    for key, weight in weights(np.where(MASK, RATIO, outside)).items():
      np.testing.assert_array_equal(weight, expected[key])
      assert not np.asarray(weight)[~MASK].any()


def test_weights_carry_no_gradient():
  one = np.log(RATIO).astype(np.float32)
  for options in EVERY:
    f = lambda old, sampler, options=options: mismatch_weight(old, sampler, MASK, options).sum()
    assert not any(g.any() for g in jax.grad(f, argnums=(0, 1))(one, one * 0))


def test_unknown_corrections_and_impossible_thresholds_are_refused():
  with pytest.raises(ValueError, match=r"correction is 'is' and level 'token'; want one of .*'tis'"):
    MismatchOptions(correction="is")
  with pytest.raises(ValueError, match=r"level 'row'; want .*'sequence_mean'"):
    MismatchOptions(level="row")
  for bad in (dict(upper=0.0, lower=0.0), dict(upper=0.4), dict(lower=-0.1)):
    with pytest.raises(ValueError, match=r"lower is .* and upper .*; want ratios with 0 <= lower <= upper"):
      MismatchOptions(**bad)
