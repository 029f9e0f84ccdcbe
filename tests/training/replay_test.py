"""Updates that replay recorded experts: what is pinned, what has a gradient, and whether that gradient is right."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.policy import build_policy
from rspo_jax.objectives.table import OBJECTIVES
from rspo_jax.training.loss import UpdateOptions, make_loss, normalisers
from tests.support import tiny
from tests.support.updates import TERMS, assert_close, gradient, moved_params, new_state, setup, update

REPLAY = UpdateOptions(replay="scoring")
REPLAY_OF_GATES = UpdateOptions(replay="scoring", replay_gates=True)


def test_right_after_scoring_a_replayed_ratio_is_exactly_one():
  policy, params, batch = setup()
  for options in (REPLAY, REPLAY_OF_GATES):
    _, metrics = update(policy, params, batch, options)
    assert metrics["ratio/p1"] == metrics["ratio/max"] == metrics["shift/gamma_mean"] == 1.0


def test_replayed_updates_use_the_old_experts_and_the_current_or_the_old_gates():
  policy, params, batch = setup()
  params = moved_params(policy, params, batch, by=20.0)
  _, free = update(policy, params, batch)
  _, replayed = update(policy, params, batch, REPLAY)
  assert free["router/overlap"] < 1 == replayed["router/overlap"]
  assert free["shift/drift"] > 0 and replayed["shift/drift"] > 0  # of the router, which is not replayed
  of_router = lambda options: gradient(policy, params, batch, options)["layers_0"]["moe"]["router"]
  assert of_router(REPLAY).any() and not of_router(REPLAY_OF_GATES).any()


def test_replay_gives_the_same_update_under_rematerialisation_and_microbatches():
  policy, params, batch = setup()
  params = moved_params(policy, params, batch, by=20.0)
  expected, _ = update(policy, params, batch, REPLAY)
  remat = build_policy(dataclasses.replace(tiny.CONFIG, remat=True))
  got, _ = update(remat, params, batch, dataclasses.replace(REPLAY, microbatches=2))
  assert_close(got.params, expected.params, 2e-5)


@pytest.mark.parametrize("gates", [False, True])
def test_the_gradient_of_a_replayed_loss_with_all_terms_is_that_of_finite_differences(gates):
  """Along random directions through all parameters; with replayed experts the loss has no jumps."""
  policy, params, batch = setup()
  options = UpdateOptions(OBJECTIVES["grpo"].objective, shift=None, replay="scoring", replay_gates=gates, **TERMS)
  norms = normalisers(policy, options, new_state(params), batch, pieces=1)
  value = jax.jit(lambda params: make_loss(policy, options)(params, batch, norms)[0])
  exact, step = jax.jit(jax.grad(value))(params), 1e-3
  for seed in range(4):
    keys = jax.random.split(jax.random.key(seed), len(jax.tree.leaves(params)))
    noise = [jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, jax.tree.leaves(params), strict=True)]
    direction = jax.tree.unflatten(jax.tree.structure(params), noise)
    ahead, behind = (
      value(jax.tree.map(lambda leaf, move, s=sign: leaf + s * step * move, params, direction)) for sign in (1, -1)
    )
    slope = sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(exact), jax.tree.leaves(direction), strict=True))
    np.testing.assert_allclose((ahead - behind) / (2 * step), slope, rtol=2e-2, atol=2e-3)
