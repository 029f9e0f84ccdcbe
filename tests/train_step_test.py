import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from models.policy import build_policy
from rspo_jax import mesh, objectives
from rspo_jax.train_step import (
  UpdateOptions,
  jit_step,
  make_supervised_step,
  make_train_step,
  pmap_step,
  skip_nonfinite,
)
from rspo_jax.types import TrainState

SGD = optax.sgd(0.1)  # Adam's first step is lr * sign(gradient): it would hide a gradient of the wrong size


def fresh_state(params, optimizer=SGD):
  return TrainState(jax.tree.map(jnp.copy, params), optimizer.init(params), jnp.zeros((), jnp.int32))


@functools.cache
def setup(rows=8, microbatches=1):
  policy, params = tiny.policy_and_params()
  return policy, params, tiny.train_batch(policy, params, rows, microbatches=microbatches)


def drifted(batch, by=0.3):
  """The batch as if the policy had moved since: other old log-probs, another old routing."""
  rng = np.random.default_rng(0)
  noise = jnp.asarray(rng.normal(size=batch.old_log_prob.shape) * by, jnp.float32)
  trace = batch.old_routing
  moved = trace.log_prob - jnp.asarray(rng.random(trace.log_prob.shape) * by, jnp.float16)
  return batch.replace(old_log_prob=batch.old_log_prob + noise, old_routing=trace.replace(log_prob=moved))


def run(policy, params, batch, options=UpdateOptions(), optimizer=SGD, jit=True):  # noqa: B008
  step = make_train_step(policy, optimizer, options)
  return (jax.jit(step) if jit else step)(fresh_state(params, optimizer), batch)


def assert_close(left, right, tolerance=2e-6):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance), left, right)


@pytest.mark.parametrize("microbatches", [1, 2])
def test_right_after_scoring_every_ratio_and_gamma_is_exactly_one(microbatches):
  policy, params, batch = setup(microbatches=microbatches)
  options = UpdateOptions(microbatches=microbatches)
  _, metrics = run(policy, params, batch, options)
  for name in ("ratio/p1", "ratio/p50", "ratio/p99", "ratio/max", "shift/gamma_mean", "shift/gamma_p10"):
    assert metrics[name] == 1.0, name
  assert metrics["shift/drift"] == 0 and metrics["shift/floor_fraction"] == 0
  assert metrics["router/overlap"] == 1 and metrics["ratio/ess"] == 1
  assert metrics["clip/low"] == metrics["clip/high"] == metrics["kl/approx"] == 0
  np.testing.assert_array_equal(metrics["shift/layer_drift"], np.zeros(policy.num_moe_layers))


@pytest.mark.parametrize("objective", [objectives.grpo, objectives.gspo, objectives.gmpo])
@pytest.mark.parametrize("aggregation", objectives.AGGREGATIONS)
def test_gradient_accumulation_equals_one_big_batch(objective, aggregation):
  policy, params, batch = setup()
  batch = drifted(batch)
  whole, _ = run(policy, params, batch, UpdateOptions(objective, aggregation))
  parts, _ = run(policy, params, batch, UpdateOptions(objective, aggregation, microbatches=4))
  assert_close(whole.params, parts.params)


def test_metrics_do_not_depend_on_microbatches():
  policy, params, batch = setup()
  batch = drifted(batch)
  _, whole = run(policy, params, batch)
  _, parts = run(policy, params, batch, UpdateOptions(microbatches=2))
  assert whole.keys() == parts.keys()
  assert_close(whole, parts, 1e-5)
  assert whole["shift/gamma_mean"] < 0.99 and whole["ratio/max"] > 1.2


def test_eager_step_equals_jitted_step():
  policy, params, batch = setup()
  eager, _ = run(policy, params, drifted(batch), jit=False)
  jitted, _ = run(policy, params, drifted(batch))
  assert_close(eager.params, jitted.params)


@pytest.mark.parametrize(
  "shape",
  [{"data": 8}, {"fsdp": 8}, {"data": 2, "fsdp": 2, "expert": 2}, {"expert": 4, "tensor": 2}, {"fsdp": 4, "tensor": 2}],
  ids=lambda shape: "_".join(f"{axis}{size}" for axis, size in shape.items()),
)
def test_eight_devices_give_the_update_of_one(shape):
  policy, params, batch = setup()
  batch = drifted(batch)
  expected, expected_metrics = run(policy, params, batch)
  layout = mesh.make_layout(shape)
  sharded = build_policy(tiny.CONFIG, layout)
  shardings = mesh.state_shardings(sharded, SGD, layout)
  step = jit_step(make_train_step(sharded, SGD, UpdateOptions()), layout, shardings)
  state = jax.device_put(fresh_state(params), shardings)
  state, metrics = step(state, mesh.put_batch(batch, layout))
  assert_close(state.params, expected.params)
  assert_close(metrics, expected_metrics, 2e-5)
  moe = state.params["layers_0"]["moe"]["gate"]
  pieces = shape.get("expert", 1) * shape.get("fsdp", 1) * shape.get("tensor", 1)
  assert moe.addressable_shards[0].data.size * pieces == moe.size


def test_pmap_gives_the_update_of_one_device():
  policy, params, batch = setup()
  batch = drifted(batch)
  expected, expected_metrics = run(policy, params, batch)
  devices = jax.devices()[:4]
  step = pmap_step(make_train_step(policy, SGD, UpdateOptions()), devices)
  state = jax.device_put_replicated(fresh_state(params), devices) if hasattr(jax, "device_put_replicated") else None
  if state is None:
    state = jax.tree.map(lambda leaf: jnp.stack([leaf] * 4), fresh_state(params))
  state, metrics = step(state, jax.tree.map(lambda leaf: leaf.reshape(4, -1, *leaf.shape[1:]), batch))
  for device in range(4):
    assert_close(jax.tree.map(lambda leaf, i=device: leaf[i], state.params), expected.params)
  assert_close(jax.tree.map(lambda leaf: leaf[0], metrics), expected_metrics, 2e-5)


def gradient(policy, params, batch, options=UpdateOptions()):  # noqa: B008
  state, _ = run(policy, params, batch, options, optax.sgd(1.0))
  return jax.tree.map(lambda old, new: old - new, params, state.params)


def test_empty_rows_change_nothing():
  policy, params, batch = setup()
  batch = drifted(batch)
  batch = batch.replace(action_mask=batch.action_mask.at[3].set(False).at[6].set(False))
  rows = np.array([0, 1, 2, 4, 5, 7])
  without = jax.tree.map(lambda leaf: leaf[rows], batch)
  assert_close(gradient(policy, params, batch), gradient(policy, params, without))


def test_a_batch_without_actions_gives_exactly_zero_gradient():
  policy, params, batch = setup()
  nothing = batch.replace(action_mask=jnp.zeros_like(batch.action_mask))
  for leaf in jax.tree.leaves(gradient(policy, params, nothing)):
    np.testing.assert_array_equal(leaf, 0)


def test_padding_columns_change_nothing():
  policy, params, batch = setup()
  batch = drifted(batch)
  wider = jax.tree.map(
    lambda leaf: leaf if leaf.ndim == 1 else jnp.pad(leaf, [(0, 0), (0, 3)] + [(0, 0)] * (leaf.ndim - 2)), batch
  )
  assert_close(gradient(policy, params, wider), gradient(policy, params, batch))


def test_router_shift_of_a_slot_comes_from_the_trace_of_that_slot():
  policy, params, batch = setup()
  row, slot = 0, int(np.argmax(batch.action_mask[0]))
  trace = batch.old_routing
  moved = trace.replace(log_prob=trace.log_prob.at[row, slot].add(-1))
  _, metrics = run(policy, params, batch.replace(old_routing=moved), UpdateOptions(shift_floor=0.01))
  actions = int(batch.action_mask.sum())
  np.testing.assert_allclose(metrics["shift/drift"] * actions, 1.0, atol=1e-3)
  elsewhere = trace.replace(log_prob=trace.log_prob.at[row, slot - 1].add(-1))
  _, metrics = run(policy, params, batch.replace(old_routing=elsewhere))
  assert metrics["shift/drift"] == 0  # slot - 1 is the prompt's last token: no action, so nothing to distrust


def test_router_shift_scales_a_single_token_ratio():
  policy, params, batch = setup()
  batch = batch.replace(advantage=jnp.abs(batch.advantage) + 1)
  plain = gradient(policy, params, batch, UpdateOptions(shift_floor=None))
  trace = batch.old_routing
  everywhere = batch.replace(old_routing=trace.replace(log_prob=trace.log_prob - jnp.float16(0.125)))
  shifted = gradient(policy, params, everywhere, UpdateOptions(shift_floor=0.1))
  assert_close(shifted, jax.tree.map(lambda leaf: leaf * np.exp(-0.125), plain), 1e-5)


def test_missing_trace_is_an_error_that_names_the_cure():
  policy, params, batch = setup()
  with pytest.raises(ValueError, match="old_routing"):
    run(policy, params, batch.replace(old_routing=None))
  run(policy, params, batch.replace(old_routing=None), UpdateOptions(shift_floor=None))


def test_a_nonfinite_gradient_changes_nothing_and_is_counted():
  policy, params, batch = setup()
  optimizer = skip_nonfinite(optax.adamw(1e-2))
  broken = batch.replace(advantage=batch.advantage.at[0].set(jnp.nan))
  step = jax.jit(make_train_step(policy, optimizer, UpdateOptions()))
  state, metrics = step(fresh_state(params, optimizer), broken)
  assert metrics["updates/skipped"] == 1
  jax.tree.map(np.testing.assert_array_equal, state.params, params)
  state, metrics = step(state, batch)
  assert metrics["updates/skipped"] == 1 and state.step == 2
  assert not np.array_equal(state.params["embedding"], params["embedding"])


def test_logits_in_chunks_and_rematerialised_layers_give_the_same_update():
  policy, params, batch = setup()
  batch = drifted(batch)
  expected, _ = run(policy, params, batch)
  chunked, _ = run(policy, params, batch, UpdateOptions(logits_chunk=4))
  assert_close(chunked.params, expected.params)
  again, _ = run(build_policy(dataclasses.replace(tiny.CONFIG, remat=True)), params, batch)
  assert_close(again.params, expected.params)


def test_supervised_steps_make_the_demonstrations_likelier():
  policy, params, batch = setup()
  optimizer = optax.adam(1e-2)
  step = jax.jit(make_supervised_step(policy, optimizer, microbatches=2))
  state, losses = fresh_state(params, optimizer), []
  for _ in range(20):
    state, metrics = step(state, batch)
    losses.append(float(metrics["loss/warm_start"]))
  assert losses[-1] < 0.5 * losses[0]
  expected = -(batch.old_log_prob * batch.action_mask).sum() / batch.action_mask.sum()
  np.testing.assert_allclose(losses[0], expected, rtol=1e-5)


@pytest.mark.parametrize("wrong", [{"aggregation": "mean"}, {"shift_floor": 0.0}, {"microbatches": 0}])
def test_impossible_options_are_refused(wrong):
  with pytest.raises(ValueError, match="want|start at"):
    UpdateOptions(**wrong)
