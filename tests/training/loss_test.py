"""The terms of the loss by their formulas, which slots and parameters they concern, and options that are refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from models.policy import build_policy
from rspo_jax.objectives.mismatch import MismatchOptions
from rspo_jax.router.shift import ShiftOptions
from rspo_jax.router.trace import to_positions
from rspo_jax.training.diagnostics import token_metrics
from rspo_jax.training.loss import UpdateOptions, make_loss, normalisers
from rspo_jax.training.parameters import ROUTER, freeze
from rspo_jax.training.scoring import score
from rspo_jax.training.train_step import make_train_step
from tests.support import tiny
from tests.support.updates import (
  BASE,
  SGD,
  assert_close,
  drifted,
  gradient,
  jitted,
  moved_params,
  new_state,
  setup,
  update,
)

LOW_FLOOR = UpdateOptions(shift=ShiftOptions(0.01))


def test_router_shift_of_a_slot_is_read_from_the_trace_of_that_slot():
  policy, params, batch = setup()
  row, slot = 0, int(np.argmax(batch.action_mask[0]))
  trace = batch.old_routing
  changed = trace.replace(log_prob=trace.log_prob.at[row, slot].add(-1))
  _, metrics = update(policy, params, batch.replace(old_routing=changed), LOW_FLOOR)
  np.testing.assert_allclose(metrics["shift/drift"] * int(batch.action_mask.sum()), 1.0, atol=1e-3)
  # Slot - 1 is the prompt's last token, which is no action.
  changed = trace.replace(log_prob=trace.log_prob.at[row, slot - 1].add(-1))
  _, metrics = update(policy, params, batch.replace(old_routing=changed), LOW_FLOOR)
  assert metrics["shift/drift"] == 0


def test_router_shift_scales_the_ratio():
  policy, params, batch = setup()
  batch = batch.replace(advantage=jnp.abs(batch.advantage) + 1)
  plain = gradient(policy, params, batch, BASE)
  trace = batch.old_routing
  shifted_batch = batch.replace(old_routing=trace.replace(log_prob=trace.log_prob - jnp.float16(0.125)))
  shifted = gradient(policy, params, shifted_batch, LOW_FLOOR)
  assert_close(shifted, jax.tree.map(lambda leaf: leaf * np.exp(-0.125), plain), 1e-5)


def test_entropy_kl_and_mismatch_correction_enter_the_loss_by_their_formulas():
  policy, params, batch = setup()
  params = moved_params(policy, params, batch)
  mask = np.asarray(batch.action_mask)
  # The sampler gives every token twice the probability.
  batch = batch.replace(sampler_log_prob=batch.old_log_prob + jnp.log(2.0))
  variants = {
    "plain": BASE,
    "entropy": dataclasses.replace(BASE, entropy_coefficient=0.7),
    "kl": dataclasses.replace(BASE, kl_coefficient=2.0),
    "mismatch": dataclasses.replace(BASE, mismatch=MismatchOptions()),
  }

  @jax.jit
  def evaluate(params):
    scored = score(policy, params, batch.tokens, batch.valid)
    norms = normalisers(policy, BASE, new_state(params), batch, pieces=1)
    results = {name: make_loss(policy, options)(params, batch, norms) for name, options in variants.items()}
    metrics = token_metrics(results["mismatch"][1].rows, batch.action_mask)
    return scored, {name: -loss for name, (loss, _) in results.items()}, metrics

  scored, objective, metrics = evaluate(params)
  plain, rows, length = objective["plain"], mask.any(1).sum(), np.maximum(mask.sum(1), 1)

  def mean(x):
    return (np.where(mask, x, 0).sum(1) / length).sum() / rows

  _, of_step = update(policy, params, batch, BASE)
  np.testing.assert_allclose(of_step["loss/objective"], plain, rtol=1e-5)
  np.testing.assert_allclose(objective["entropy"], plain + 0.7 * mean(scored.entropy), rtol=1e-4)
  r = np.asarray(scored.log_prob - batch.reference_log_prob, np.float64)
  np.testing.assert_allclose(objective["kl"], plain - 2.0 * mean(np.exp(-r) - 1 + r), rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(objective["mismatch"], plain / 2, rtol=1e-4)
  np.testing.assert_allclose(metrics["mismatch/weight_mean"], 0.5, rtol=1e-5)


def test_frozen_parameters_stay_bitwise_and_the_others_learn_as_before():
  policy, params, batch = setup()
  expected = gradient(policy, params, batch)
  options = UpdateOptions(frozen=(ROUTER,))
  frozen = gradient(policy, params, batch, options)
  for layer in ("layers_0", "layers_2"):
    assert expected[layer]["moe"]["router"].any() and not frozen[layer]["moe"]["router"].any()
    assert_close(frozen[layer]["moe"]["gate"], expected[layer]["moe"]["gate"])
  optimizer = freeze(optax.adamw(1e-2, weight_decay=0.1), (ROUTER,))
  state, _ = update(policy, params, batch, options, optimizer)
  np.testing.assert_array_equal(state.params["layers_0"]["moe"]["router"], params["layers_0"]["moe"]["router"])
  assert not np.array_equal(state.params["embedding"], params["embedding"])


def test_the_bias_on_the_choice_rises_for_idle_experts_and_falls_for_busy_ones():
  policy = build_policy(dataclasses.replace(tiny.CONFIG, router_bias=True))
  params = jax.jit(policy.init)(jax.random.key(0))
  _, _, batch = setup()
  state, metrics = update(policy, params, batch, UpdateOptions(shift=None, router_bias_rate=0.01))
  bias = np.concatenate([state.params[f"layers_{i}"]["moe"]["router_bias"] for i in (0, 2)])
  forward = jax.jit(functools.partial(policy.forward, probe=lambda router, _: router.expert_index))
  _, chosen = forward(params, batch.tokens, batch.valid)
  actions = np.asarray(to_positions(batch.action_mask))
  load = np.stack([np.bincount(np.asarray(layer)[actions].ravel(), minlength=4) for layer in chosen])
  np.testing.assert_allclose(bias, 0.01 * np.sign(load.mean(1, keepdims=True) - load), atol=1e-7)
  assert metrics["router/load_max_over_mean"] > 1
  with pytest.raises(ValueError, match="this model has no bias"):
    make_train_step(tiny.policy_and_params()[0], SGD, UpdateOptions(router_bias_rate=0.01))


def test_the_balance_loss_evens_the_load():
  policy, params, batch = setup()
  params = jax.tree_util.tree_map_with_path(
    lambda path, leaf: leaf.at[..., 0].add(0.5) if "router" in jax.tree_util.keystr(path) else leaf, params
  )
  batch = batch.replace(advantage=jnp.zeros_like(batch.advantage))
  optimizer = optax.adam(1e-2)
  step = jitted(policy, optimizer, UpdateOptions(shift=None, load_balance_coefficient=1.0))
  state, losses = new_state(params, optimizer), []
  for _ in range(30):
    state, metrics = step(state, batch)
    losses.append(float(metrics["loss/load_balance"]))
  assert losses[-1] < losses[0] - 0.05 and losses[-1] >= tiny.CONFIG.num_experts_per_tok - 0.05


def test_the_floor_can_follow_a_schedule_over_updates():
  policy, params, batch = setup()
  batch = drifted(batch, by=3.0)
  step = jitted(policy, SGD, UpdateOptions(shift=ShiftOptions(0.5, floor_start=0.9, floor_updates=2)))
  state, floors = new_state(params), []
  for _ in range(3):
    state, metrics = step(state, batch)
    floors.append(float(metrics["shift/floor"]))
    assert float(metrics["shift/gamma_p10"]) >= floors[-1] - 1e-6
  np.testing.assert_allclose(floors, [0.9, 0.7, 0.5], rtol=1e-6)


def test_a_missing_field_of_the_batch_is_an_error_that_names_the_cure():
  policy, params, batch = setup()
  for field, options in (
    ("old_routing", UpdateOptions()),
    ("old_routing", UpdateOptions(shift=None, replay="scoring")),
    ("sampler_log_prob", UpdateOptions(mismatch=MismatchOptions())),
    ("reference_log_prob", UpdateOptions(kl_coefficient=0.1)),
  ):
    with pytest.raises(ValueError, match=f"the options need {field}, but the batch has none"):
      update(policy, params, batch.replace(**{field: None}), options)
  without = batch.replace(old_routing=batch.old_routing.replace(all_log_prob=None))
  with pytest.raises(ValueError, match="all_experts=True"):
    update(policy, params, without, UpdateOptions(shift=ShiftOptions(deviation="kl")))


def test_the_base_objective_reads_no_trace():
  policy, params, batch = setup()
  assert not BASE.needs_trace
  assert UpdateOptions().needs_trace and UpdateOptions(shift=None, replay="sampler").needs_trace
  state, _ = jax.eval_shape(make_train_step(policy, SGD, BASE), new_state(params), batch.replace(old_routing=None))
  assert state.step.shape == ()


def test_no_aggregation_is_the_mean_over_rows_of_the_mean_over_tokens():
  policy, params, batch = setup()
  batch = drifted(batch)
  norms = [
    normalisers(policy, options, new_state(params), batch, pieces=1)
    for options in (BASE, dataclasses.replace(BASE, aggregation="seq_mean_token_mean"))
  ]
  assert norms[0].weight == norms[1].weight == batch.action_mask.any(axis=1).sum()


@pytest.mark.parametrize(
  "wrong",
  [
    {"aggregation": "mean"},
    {"replay": "r2"},
    {"kl_estimator": "k4"},
    {"aggregation": "seq_mean_token_sum_norm"},
    {"aggregation": "seq_mean_token_sum_norm", "norm_length": 0},
    {"microbatches": 0},
  ],
)
def test_impossible_options_are_refused(wrong):
  with pytest.raises(ValueError, match="want"):
    make_loss(tiny.policy_and_params()[0], UpdateOptions(**wrong))
