"""Every objective under every placement of router shift and every aggregation, and batches to run them on."""

import functools
import itertools

import jax
import numpy as np

from rspo_jax.objectives.aggregation import AGGREGATIONS, aggregate
from rspo_jax.objectives.sequence_level import gmpo, gspo, rloo
from rspo_jax.objectives.token_level import cispo, grpo, gspo_token, policy_gradient, sapo
from rspo_jax.types import PLACEMENTS

# With these bounds, random rows fall on both sides of them.
TOKEN_OBJECTIVES = {
  "policy_gradient": policy_gradient,
  "grpo": grpo,
  "grpo_dual_clip": functools.partial(grpo, dual_clip=1.5),
  "cispo": functools.partial(cispo, eps_low=0.3, eps_high=0.3),
  "sapo": sapo,
  "gspo_token": functools.partial(gspo_token, eps_low=0.1, eps_high=0.15),
  "rloo_token": functools.partial(rloo, ratio="token"),
  "rloo_none": functools.partial(rloo, ratio="none"),
}
SEQUENCE_OBJECTIVES = {
  "gspo": functools.partial(gspo, eps_low=0.1, eps_high=0.15),
  "gmpo": functools.partial(gmpo, eps_low=0.3, eps_high=0.4),
  "gmpo_signed": functools.partial(gmpo, bounds="signed", eps_low=0.3, eps_high=0.4, length_epsilon=1e-8),
  "rloo_sequence": functools.partial(rloo, eps_low=0.4, eps_high=0.5),
}
EVERY = TOKEN_OBJECTIVES | SEQUENCE_OBJECTIVES
# Their gradient is that of weight * exp(q - sg q); finite differences would also change the weight.
CONSTANT_WEIGHT = ("policy_gradient", "rloo_none", "cispo", "gspo_token")
SHIFTS = ("no_shift", *PLACEMENTS)
NORM_LENGTH = 9


def batch(seed=0, rows=6, columns=7, scale=0.5):
  """A random batch with an empty row and a zero advantage: (log_ratio, advantage, mask, log_shift)."""
  rng = np.random.default_rng(seed)
  mask = rng.random((rows, columns)) < 0.7
  mask[0, :2] = mask[1, 1:] = mask[2, :3] = True
  mask[-1] = False
  advantage = rng.normal(size=rows)
  advantage[2] = 0.0
  log_shift = np.log(rng.uniform(0.8, 1.0, (rows, columns)))
  log_ratio = rng.normal(size=(rows, columns)) * scale
  return tuple(x.astype(x.dtype if x.dtype == bool else np.float32) for x in (log_ratio, advantage, mask, log_shift))


def total(objective, mask, mode):
  return aggregate(objective, mask, mode, norm_length=NORM_LENGTH)


def shift_options(shift, log_shift):
  return {} if shift == "no_shift" else dict(placement=shift, log_shift=log_shift)


def evaluate(log_ratio, advantage, mask, log_shift, objectives=EVERY):
  """{name: {shift: (Terms, {mode: (Weighted, gradient of its total)})}}"""

  def one(objective, shift):
    def terms(log_ratio):
      result = objective(log_ratio, advantage, mask, **shift_options(shift, log_shift))
      return result.objective, result

    values, pull_back, result = jax.vjp(terms, log_ratio, has_aux=True)
    modes = {}
    for mode in AGGREGATIONS:
      cotangent = jax.grad(lambda values, mode=mode: total(values, mask, mode).total)(values)
      modes[mode] = (total(values, mask, mode), pull_back(cotangent)[0])
    return result, modes

  return {name: {shift: one(objective, shift) for shift in SHIFTS} for name, objective in objectives.items()}


compiled = jax.jit(lambda *arrays: evaluate(*arrays))


def under_placements(objectives):
  """A jitted (log_ratio, advantage, mask, log_shift) -> {name: {placement: terms [B, T]}}."""
  return jax.jit(
    lambda log_ratio, advantage, mask, log_shift: {
      name: {p: f(log_ratio, advantage, mask, log_shift=log_shift, placement=p).objective for p in PLACEMENTS}
      for name, f in objectives.items()
    }
  )


def results(tree):
  """(name, shift, mode, Weighted, gradient) of the result of `evaluate`, in the order of `EVERY`."""
  for name, shift, mode in itertools.product(EVERY, SHIFTS, AGGREGATIONS):
    weighted, gradient = tree[name][shift][1][mode]
    yield name, shift, mode, weighted, gradient


def assert_same(got, want, **tolerance):
  """Compares two trees of arrays, leaf by leaf; bit for bit without a tolerance."""
  got, want = (jax.tree_util.tree_leaves_with_path(tree) for tree in (got, want))
  assert [path for path, _ in got] == [path for path, _ in want]
  for (path, one), (_, other) in zip(got, want, strict=True):
    message = jax.tree_util.keystr(path)
    if tolerance:
      np.testing.assert_allclose(one, other, err_msg=message, **tolerance)
    else:
      np.testing.assert_array_equal(one, other, err_msg=message)
