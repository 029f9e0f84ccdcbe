"""Gradient noise and replay attribution against brute force, and on changes whose result is known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rspo_jax.training.attribution import GROUP_NAMES, make_gradient_noise, make_replay_attribution, module_group
from rspo_jax.training.loss import UpdateOptions, make_loss, normalisers
from rspo_jax.training.minibatches import split_rows
from rspo_jax.types import TrainState
from tests.support.updates import setup

OPTIONS = UpdateOptions(load_balance_coefficient=0.5)


@functools.cache
def gradient_noise(policy):
  return jax.jit(make_gradient_noise(policy, OPTIONS, 4))


def with_router(params, change):
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: change(leaf) if jax.tree_util.keystr(path).endswith("['router']") else leaf, params
  )


def test_gradient_noise_is_the_variance_of_the_mean_of_the_pieces_over_the_squared_gradient():
  policy, params, batch = setup()
  state = TrainState(params, (), jnp.zeros((), jnp.int32))
  noise = gradient_noise(policy)(state, batch)
  assert set(noise) == {f"noise/{group}" for group in (*GROUP_NAMES, "all")}
  loss = make_loss(policy, OPTIONS)
  norms = jax.jit(lambda state: normalisers(policy, OPTIONS, state, batch, pieces=4))(state)
  gradient = jax.jit(jax.grad(lambda params, part: loss(params, part, norms)[0]))
  parts = split_rows(batch, 4)
  pieces = [gradient(params, jax.tree.map(lambda leaf, i=i: leaf[i], parts)) for i in range(4)]

  def flat(tree, group):
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    of_group = [
      np.ravel(leaf) for path, leaf in leaves if group in ("all", module_group("/".join(key.key for key in path)))
    ]
    return np.concatenate(of_group).astype(np.float64)

  whole = normalisers(policy, OPTIONS, state, batch, pieces=1)
  expected = jax.jit(jax.grad(lambda params: loss(params, batch, whole)[0]))(params)
  np.testing.assert_allclose(sum(flat(piece, "all") for piece in pieces), flat(expected, "all"), atol=1e-5)
  for group in (*GROUP_NAMES, "all"):
    estimates = np.stack([4 * flat(piece, group) for piece in pieces])
    variance = estimates.var(axis=0, ddof=1).sum() / 4
    np.testing.assert_allclose(noise[f"noise/{group}"], variance / (estimates.mean(0) ** 2).sum(), rtol=1e-3)


def test_equal_rows_have_no_gradient_noise():
  policy, params, batch = setup()
  equal = jax.tree.map(lambda leaf: jnp.repeat(leaf[:1], 8, axis=0), batch)
  noise = gradient_noise(policy)(TrainState(params, (), jnp.zeros((), jnp.int32)), equal)
  assert abs(noise["noise/all"]) < 1e-4
  with pytest.raises(ValueError, match="at least 2"):
    make_gradient_noise(policy, UpdateOptions(), 1)


def test_every_parameter_has_its_module_group():
  _, params, _ = setup()
  names = ["/".join(key.key for key in path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
  groups = {name: module_group(name) for name in names}
  assert groups["layers_0/moe/router"] == "router" and groups["layers_0/moe/down"] == "experts"
  assert groups["layers_0/attention/query"] == "attention" and groups["layers_1/mlp/up"] == "rest"
  assert groups["embedding"] == groups["lm_head"] == "embedding" and groups["layers_0/attention_norm/scale"] == "rest"


def test_replay_attributes_all_of_a_router_change_to_the_router_and_nothing_of_another_change():
  policy, params, batch = setup()
  attribute = jax.jit(make_replay_attribution(policy))
  unchanged = attribute(params, batch)
  assert unchanged["replay/log_ratio_square"] == 0
  assert unchanged["replay/experts_share"] == unchanged["replay/gates_share"] == 0
  # Only the router changed: with experts and gates replayed, no difference is left.
  by_router = attribute(with_router(params, lambda leaf: leaf[:, :, ::-1]), batch)
  assert by_router["replay/log_ratio_square"] > 1e-4
  np.testing.assert_allclose(by_router["replay/gates_share"], 1.0, atol=1e-6)
  assert by_router["replay/experts_share"] < 1
  # Only the output matrix changed: a replay makes no difference.
  elsewhere = attribute(params | {"lm_head": params["lm_head"] * 1.3}, batch)
  assert elsewhere["replay/log_ratio_square"] > 1e-4
  np.testing.assert_allclose(elsewhere["replay/experts_share"], 0.0, atol=1e-6)
  np.testing.assert_allclose(elsewhere["replay/gates_share"], 0.0, atol=1e-6)
  with pytest.raises(ValueError, match="needs batch.old_routing"):
    make_replay_attribution(policy)(params, batch.replace(old_routing=None))
