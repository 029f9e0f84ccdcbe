"""The costly diagnostics against brute force, and on policies whose answer is known."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rspo_jax.training.attribution import GROUP_NAMES, make_gradient_noise, make_replay_attribution, module_group
from rspo_jax.training.loss import UpdateOptions, make_loss, normalisers
from rspo_jax.training.minibatches import split_rows
from rspo_jax.types import TrainState
from tests.support import tiny


def setup():
  policy, params = tiny.policy_and_params()
  return policy, params, tiny.train_batch(policy, params)


def with_router(params, change):
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: change(leaf) if jax.tree_util.keystr(path).endswith("['router']") else leaf, params
  )


def test_gradient_noise_is_the_variance_of_the_mean_of_the_pieces_over_the_squared_gradient():
  policy, params, batch = setup()
  options = UpdateOptions(load_balance_coefficient=0.5)
  state = TrainState(params, optax.sgd(0.1).init(params), jnp.zeros((), jnp.int32))
  found = jax.jit(make_gradient_noise(policy, options, 4))(state, batch)
  assert set(found) == {f"noise/{group}" for group in (*GROUP_NAMES, "all")}
  loss, norms = make_loss(policy, options), normalisers(policy, options, state, batch, pieces=4)
  gradient = jax.jit(jax.grad(lambda params, part: loss(params, part, norms)[0]))
  parts = split_rows(batch, 4)
  pieces = [gradient(params, jax.tree.map(lambda leaf, i=i: leaf[i], parts)) for i in range(4)]

  def flat(tree, group):
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    kept = [
      np.ravel(leaf) for path, leaf in leaves if group in ("all", module_group("/".join(key.key for key in path)))
    ]
    return np.concatenate(kept).astype(np.float64)

  whole = normalisers(policy, options, state, batch, pieces=1)
  expected = jax.jit(jax.grad(lambda params: loss(params, batch, whole)[0]))(params)
  np.testing.assert_allclose(sum(flat(piece, "all") for piece in pieces), flat(expected, "all"), atol=1e-5)
  for group in (*GROUP_NAMES, "all"):
    estimates = np.stack([4 * flat(piece, group) for piece in pieces])
    variance = estimates.var(axis=0, ddof=1).sum() / 4
    np.testing.assert_allclose(found[f"noise/{group}"], variance / (estimates.mean(0) ** 2).sum(), rtol=1e-3)


def test_rows_that_say_the_same_are_no_noise():
  policy, params, batch = setup()
  same = jax.tree.map(lambda leaf: jnp.repeat(leaf[:1], 8, axis=0), batch)
  state = TrainState(params, (), jnp.zeros((), jnp.int32))
  found = jax.jit(make_gradient_noise(policy, UpdateOptions(), 4))(state, same)
  assert abs(found["noise/all"]) < 1e-4
  with pytest.raises(ValueError, match="at least 2"):
    make_gradient_noise(policy, UpdateOptions(), 1)


def test_every_parameter_has_its_module_group():
  _, params, _ = setup()
  names = ["/".join(key.key for key in path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
  found = {name: module_group(name) for name in names}
  assert found["layers_0/moe/router"] == "router" and found["layers_0/moe/down"] == "experts"
  assert found["layers_0/attention/query"] == "attention" and found["layers_1/mlp/up"] == "rest"
  assert found["embedding"] == found["lm_head"] == "embedding" and found["layers_0/attention_norm/scale"] == "rest"


def test_the_replay_probe_blames_the_router_exactly_as_far_as_it_is_to_blame():
  policy, params, batch = setup()
  probe = jax.jit(make_replay_attribution(policy))
  still = probe(params, batch)
  assert still["replay/log_ratio_square"] == still["replay/experts_share"] == still["replay/gates_share"] == 0
  # Only the router moved, and with its experts and gates pinned nothing of the move is left.
  by_router = probe(with_router(params, lambda leaf: leaf[:, :, ::-1]), batch)
  assert by_router["replay/log_ratio_square"] > 1e-4
  np.testing.assert_allclose(by_router["replay/gates_share"], 1.0, atol=1e-6)
  assert by_router["replay/experts_share"] < 1
  # Only the output matrix moved: pinning changes nothing.
  elsewhere = probe(params | {"lm_head": params["lm_head"] * 1.3}, batch)
  assert elsewhere["replay/log_ratio_square"] > 1e-4
  np.testing.assert_allclose(elsewhere["replay/experts_share"], 0.0, atol=1e-6)
  np.testing.assert_allclose(elsewhere["replay/gates_share"], 0.0, atol=1e-6)
  with pytest.raises(ValueError, match="needs batch.old_routing"):
    make_replay_attribution(policy)(params, batch.replace(old_routing=None))
