"""Parameters selected by path: frozen ones do not change at all, others have a separate learning rate."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rspo_jax.training.parameters import ROUTER, freeze, matches, path_name, scale_updates, stop_gradients

PARAMS = {
  "embed": jnp.full((3, 2), 0.5),
  "layers_0": {"moe": {"router": jnp.ones((2, 4)), "router_bias": jnp.ones(4)}, "norm": jnp.ones(2)},
  "layers_1": {"moe": {"router": jnp.full((2, 4), 2.0), "up": [jnp.ones(2), jnp.ones(2)]}},
}
GRADIENT = jax.tree.map(lambda x: x + 1, PARAMS)
ADAMW = optax.adamw(0.1, weight_decay=0.5)


def by_name(tree):
  return {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def chosen(patterns):
  return {name for name, matched in by_name(matches(PARAMS, patterns)).items() if matched}


def two_steps(optimizer, params=PARAMS):
  state = optimizer.init(params)

  @jax.jit
  def step(params, state):
    updates, state = optimizer.update(GRADIENT, state, params)
    return optax.apply_updates(params, updates), state

  for _ in range(2):
    params, state = step(params, state)
  return by_name(params), state


def test_a_path_joins_its_keys():
  assert set(by_name(PARAMS)) == {
    "embed", "layers_0/moe/router", "layers_0/moe/router_bias", "layers_0/norm",
    "layers_1/moe/router", "layers_1/moe/up/0", "layers_1/moe/up/1",
  }  # fmt: skip


def test_patterns_match_a_part_of_the_path():
  assert chosen((ROUTER,)) == {"layers_0/moe/router", "layers_1/moe/router"}
  assert chosen(("router",)) == {"layers_0/moe/router", "layers_0/moe/router_bias", "layers_1/moe/router"}
  assert chosen(("^layers_0/", "embed")) == {
    "layers_0/moe/router", "layers_0/moe/router_bias", "layers_0/norm", "embed"
  }  # fmt: skip
  assert chosen(()) == set()
  assert matches({"router": jnp.ones(1)}, (ROUTER,)) == {"router": True}


def test_patterns_that_match_nothing_are_refused_with_existing_paths():
  for use in (matches, stop_gradients, lambda params, patterns: freeze(ADAMW, patterns).init(params)):
    with pytest.raises(ValueError, match=r"pattern 'gate' matches nothing; there are embed, layers_0/moe/router"):
      use(PARAMS, ("router", "gate"))
    with pytest.raises(ValueError, match=r"pattern '\(' is no regular expression"):
      use(PARAMS, ("(",))
  with pytest.raises(ValueError, match="pattern 'gate' matches nothing"):
    scale_updates({"gate": 2.0}).update(GRADIENT, optax.EmptyState())


def test_frozen_parameters_get_no_update_no_decay_and_no_moments():
  frozen, state = two_steps(freeze(ADAMW, (ROUTER,)))
  free, free_state = two_steps(ADAMW)
  before = by_name(PARAMS)
  for name, value in frozen.items():
    if name in chosen((ROUTER,)):
      np.testing.assert_array_equal(value, before[name])
      assert (free[name] != before[name]).all()
    else:
      np.testing.assert_array_equal(value, free[name])
      assert (value != before[name]).all()
  size = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree) if leaf.ndim)
  assert size(free_state) - size(state) == 2 * 2 * 8  # two moments of two routers


def test_the_global_norm_excludes_frozen_parameters():
  optimizer = freeze(optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0)), (ROUTER,))
  updates, _ = optimizer.update(GRADIENT, optimizer.init(PARAMS), PARAMS)
  np.testing.assert_allclose(optax.tree.norm(updates), 1.0, rtol=1e-6)
  assert not any(by_name(updates)[name].any() for name in chosen((ROUTER,)))


def test_freezing_nothing_returns_the_optimizer():
  assert freeze(ADAMW, ()) is ADAMW


def test_a_multiplier_after_adamw_is_a_separate_learning_rate():
  scaled, _ = two_steps(optax.chain(ADAMW, scale_updates({ROUTER: 0.25, "^embed$": 0.0})))
  slow, _ = two_steps(optax.adamw(0.025, weight_decay=0.5))
  free, _ = two_steps(ADAMW)
  for name, value in scaled.items():
    want = slow if name in chosen((ROUTER,)) else by_name(PARAMS) if name == "embed" else free
    np.testing.assert_allclose(value, want[name], rtol=1e-6)
  assert (slow["layers_0/moe/router"] != free["layers_0/moe/router"]).all()


def test_multipliers_of_two_patterns_on_one_parameter_multiply():
  updates, _ = scale_updates({"router": 2.0, "layers_0": 3.0}).update(GRADIENT, optax.EmptyState())
  factor = jax.tree.map(lambda new, old: float((new / old).ravel()[0]), updates, GRADIENT)
  assert by_name(factor) == {
    "embed": 1, "layers_0/moe/router": 6, "layers_0/moe/router_bias": 6, "layers_0/norm": 3,
    "layers_1/moe/router": 2, "layers_1/moe/up/0": 1, "layers_1/moe/up/1": 1,
  }  # fmt: skip


def test_stopped_gradients_are_exactly_zero_and_the_others_unchanged():
  loss = lambda params: sum((leaf**2).sum() for leaf in jax.tree.leaves(params))
  full = by_name(jax.grad(loss)(PARAMS))
  stopped = by_name(jax.grad(lambda params: loss(stop_gradients(params, (ROUTER,))))(PARAMS))
  for name, gradient in stopped.items():
    np.testing.assert_array_equal(gradient, 0 if name in chosen((ROUTER,)) else full[name])
  assert stop_gradients(PARAMS, ()) is PARAMS
  assert loss(stop_gradients(PARAMS, (ROUTER,))) == loss(PARAMS)
