"""The train step: on-policy identity, and one update regardless of microbatches, devices, padding or compilation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from models.policy import build_policy
from rspo_jax import mesh
from rspo_jax.objectives.table import OBJECTIVES
from rspo_jax.training.loss import UpdateOptions
from rspo_jax.training.state import state_shardings
from rspo_jax.training.train_step import jit_step, make_supervised_step, make_train_step, pmap_step, skip_nonfinite
from tests.support import tiny
from tests.support.updates import (
  ALL_OPTIONS,
  SGD,
  assert_close,
  drifted,
  gradient,
  jitted,
  new_state,
  setup,
  update,
)


@pytest.mark.parametrize("microbatches", [1, 2])
def test_right_after_scoring_every_ratio_and_gamma_is_exactly_one(microbatches):
  policy, params, batch = setup(microbatches)
  _, metrics = update(policy, params, batch, UpdateOptions(microbatches=microbatches))
  for name in ("ratio/p1", "ratio/p50", "ratio/p99", "ratio/max", "shift/gamma_mean", "shift/gamma_p10"):
    assert metrics[name] == 1.0, name
  assert metrics["shift/drift"] == 0 and metrics["shift/floor_fraction"] == 0
  assert metrics["router/overlap"] == 1 and metrics["ratio/ess"] == 1
  assert metrics["clip/low"] == metrics["clip/high"] == metrics["kl/approx"] == 0
  np.testing.assert_array_equal(metrics["shift/layer_drift"], np.zeros(policy.num_moe_layers))


@pytest.mark.parametrize(
  "options",
  [
    *(UpdateOptions(OBJECTIVES[name].objective, OBJECTIVES[name].aggregation) for name in ("dapo", "gspo")),
    UpdateOptions(replay="scoring", aggregation="seq_mean_token_sum"),
    ALL_OPTIONS,
  ],
  ids=["token_mean", "sequence", "replay", "all_options"],
)
def test_gradient_accumulation_equals_one_big_batch(options):
  policy, params, batch = setup()
  batch = drifted(batch)
  whole, metrics = update(policy, params, batch, options)
  parts, of_parts = update(policy, params, batch, dataclasses.replace(options, microbatches=4))
  assert_close(whole.params, parts.params, 2e-5)
  assert_close(metrics, of_parts, 1e-5)


def test_metrics_do_not_depend_on_microbatches():
  policy, params, batch = setup()
  batch = drifted(batch)
  _, whole = update(policy, params, batch)
  _, parts = update(policy, params, batch, UpdateOptions(microbatches=2))
  assert whole.keys() == parts.keys()
  assert_close(whole, parts, 1e-5)
  assert whole["shift/gamma_mean"] < 0.99 and whole["ratio/max"] > 1.2


def test_eager_step_equals_jitted_step():
  policy, params, batch = setup()
  eager, _ = make_train_step(policy, SGD, UpdateOptions())(new_state(params), drifted(batch))
  compiled, _ = update(policy, params, drifted(batch))
  assert_close(eager.params, compiled.params, 2e-5)


@pytest.mark.parametrize(
  "shape",
  [{"data": 8}, {"fsdp": 8}, {"data": 2, "fsdp": 2, "expert": 2}, {"expert": 4, "tensor": 2}, {"fsdp": 4, "tensor": 2}],
  ids=lambda shape: "_".join(f"{axis}{size}" for axis, size in shape.items()),
)
def test_eight_devices_give_the_update_of_one(shape):
  policy, params, batch = setup()
  batch = drifted(batch)
  expected, expected_metrics = update(policy, params, batch)
  layout = mesh.make_layout(shape)
  sharded = build_policy(tiny.CONFIG, layout)
  shardings = state_shardings(sharded, SGD, layout)
  step = jit_step(make_train_step(sharded, SGD, UpdateOptions()), layout, shardings)
  state = jax.device_put(new_state(params), shardings)
  state, metrics = step(state, mesh.put_batch(batch, layout))
  assert_close(state.params, expected.params, 2e-5)
  assert_close(metrics, expected_metrics, 2e-5)
  experts = state.params["layers_0"]["moe"]["gate"]
  shards = shape.get("expert", 1) * shape.get("fsdp", 1) * shape.get("tensor", 1)
  assert experts.addressable_shards[0].data.size * shards == experts.size


def test_pmap_gives_the_update_of_one_device():
  policy, params, batch = setup()
  batch = drifted(batch)
  expected, expected_metrics = update(policy, params, batch, ALL_OPTIONS)
  step = pmap_step(make_train_step(policy, SGD, ALL_OPTIONS), jax.devices()[:4])
  state = jax.tree.map(lambda leaf: jnp.stack([leaf] * 4), new_state(params))
  state, metrics = step(state, jax.tree.map(lambda leaf: leaf.reshape(4, -1, *leaf.shape[1:]), batch))
  for device in range(4):
    assert_close(jax.tree.map(lambda leaf, i=device: leaf[i], state.params), expected.params, 2e-5)
  assert_close(jax.tree.map(lambda leaf: leaf[0], metrics), expected_metrics, 2e-5)


def test_empty_rows_change_nothing():
  policy, params, batch = setup()
  batch = drifted(batch)
  batch = batch.replace(action_mask=batch.action_mask.at[3].set(False).at[6].set(False))
  rows = np.array([0, 1, 2, 4, 5, 7])
  without = jax.tree.map(lambda leaf: leaf[rows], batch)
  assert_close(gradient(policy, params, batch), gradient(policy, params, without))


def test_a_batch_without_actions_gives_exactly_zero_gradient():
  policy, params, batch = setup()
  empty = batch.replace(action_mask=jnp.zeros_like(batch.action_mask))
  for leaf in jax.tree.leaves(gradient(policy, params, empty)):
    np.testing.assert_array_equal(leaf, 0)


def test_padding_columns_change_nothing():
  policy, params, batch = setup()
  batch = drifted(batch)
  wider = jax.tree.map(
    lambda leaf: leaf if leaf.ndim == 1 else jnp.pad(leaf, [(0, 0), (0, 3)] + [(0, 0)] * (leaf.ndim - 2)), batch
  )
  assert_close(gradient(policy, params, wider), gradient(policy, params, batch))


def test_a_nonfinite_gradient_changes_nothing_and_is_counted():
  policy, params, batch = setup()
  optimizer = skip_nonfinite(optax.adamw(1e-2))
  broken = batch.replace(advantage=batch.advantage.at[0].set(jnp.nan))
  step = jitted(policy, optimizer, UpdateOptions())
  state, metrics = step(new_state(params, optimizer), broken)
  assert metrics["updates/skipped"] == 1
  jax.tree.map(np.testing.assert_array_equal, state.params, params)
  state, metrics = step(state, batch)
  assert metrics["updates/skipped"] == 1 and state.step == 2
  assert not np.array_equal(state.params["embedding"], params["embedding"])


def test_logits_in_chunks_and_rematerialised_layers_give_the_same_update():
  policy, params, batch = setup()
  batch = drifted(batch)
  expected, _ = update(policy, params, batch)
  chunked, _ = update(policy, params, batch, UpdateOptions(logits_chunk=4))
  assert_close(chunked.params, expected.params, 2e-5)
  remat, _ = update(build_policy(dataclasses.replace(tiny.CONFIG, remat=True)), params, batch)
  assert_close(remat.params, expected.params, 2e-5)


def test_unrolled_layers_give_the_update_of_scanned_ones_and_start_on_policy():
  config = dataclasses.replace(tiny.CONFIG, mlp_only_layers=())
  policy, params = tiny.policy_and_params(config)
  unrolled = build_policy(dataclasses.replace(config, scan_layers=False))
  batch = tiny.train_batch(unrolled, params)
  _, metrics = update(unrolled, params, batch)
  for name in ("ratio/p1", "ratio/max", "shift/gamma_mean"):
    assert metrics[name] == 1.0, name
  expected, _ = update(policy, params, drifted(batch))
  got, _ = update(unrolled, params, drifted(batch))
  assert_close(got.params, expected.params, 2e-5)


def test_supervised_steps_raise_the_probability_of_the_demonstrations():
  policy, params, batch = setup()
  optimizer = optax.adam(1e-2)
  step = jax.jit(make_supervised_step(policy, optimizer, microbatches=2))
  state, losses = new_state(params, optimizer), []
  for _ in range(20):
    state, metrics = step(state, batch)
    losses.append(float(metrics["loss/warm_start"]))
  assert losses[-1] < 0.5 * losses[0]
  expected = -(batch.old_log_prob * batch.action_mask).sum() / batch.action_mask.sum()
  np.testing.assert_allclose(losses[0], expected, rtol=1e-5)
