import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from models.policy import build_policy
from rspo_jax import mesh
from rspo_jax.objectives.mismatch import MismatchOptions
from rspo_jax.objectives.table import OBJECTIVES
from rspo_jax.router.shift import ShiftOptions
from rspo_jax.router.trace import to_positions
from rspo_jax.training.loss import UpdateOptions, make_loss, normalisers
from rspo_jax.training.parameters import ROUTER, freeze
from rspo_jax.training.scoring import score
from rspo_jax.training.state import state_shardings
from rspo_jax.training.train_step import jit_step, make_supervised_step, make_train_step, pmap_step, skip_nonfinite
from rspo_jax.types import TrainState
from tests.support import tiny

STEEP = optax.sgd(1.0)
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


@functools.cache
def jitted(policy, optimizer, options):
  """Compiled once for all tests that share it: compiling is most of what they cost."""
  return jax.jit(make_train_step(policy, optimizer, options))


def run(policy, params, batch, options=UpdateOptions(), optimizer=SGD):
  return jitted(policy, optimizer, options)(fresh_state(params, optimizer), batch)


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


EVERYTHING = {
  "shift": ShiftOptions(0.5, placement="weight", deviation="kl", layers="max", level="sequence"),
  "mismatch": MismatchOptions("icepop", "sequence_mean", upper=1.2, lower=0.8),
  "kl_coefficient": 0.3,
  "entropy_coefficient": 0.1,
  "load_balance_coefficient": 0.2,
  "router_z_coefficient": 0.05,
}


@pytest.mark.parametrize(
  "options",
  [
    UpdateOptions(recipe.objective, recipe.aggregation, norm_length=6)
    for recipe in map(OBJECTIVES.get, ("dapo", "gspo"))
  ]
  + [
    UpdateOptions(replay="scoring", aggregation="seq_mean_token_sum"),
    UpdateOptions(replay="sampler", replay_gates=True, **EVERYTHING),
  ],
  ids=["token_mean", "sequence", "replay", "everything"],
)
def test_gradient_accumulation_equals_one_big_batch(options):
  policy, params, batch = setup()
  batch = drifted(batch)
  whole, metrics = run(policy, params, batch, options)
  parts, of_parts = run(policy, params, batch, dataclasses.replace(options, microbatches=4))
  assert_close(whole.params, parts.params)
  assert_close(metrics, of_parts, 1e-5)


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
  eager, _ = make_train_step(policy, SGD, UpdateOptions())(fresh_state(params), drifted(batch))
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
  shardings = state_shardings(sharded, SGD, layout)
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
  options = UpdateOptions(**EVERYTHING)
  expected, expected_metrics = run(policy, params, batch, options)
  devices = jax.devices()[:4]
  step = pmap_step(make_train_step(policy, SGD, options), devices)
  state = jax.device_put_replicated(fresh_state(params), devices) if hasattr(jax, "device_put_replicated") else None
  if state is None:
    state = jax.tree.map(lambda leaf: jnp.stack([leaf] * 4), fresh_state(params))
  state, metrics = step(state, jax.tree.map(lambda leaf: leaf.reshape(4, -1, *leaf.shape[1:]), batch))
  for device in range(4):
    assert_close(jax.tree.map(lambda leaf, i=device: leaf[i], state.params), expected.params)
  assert_close(jax.tree.map(lambda leaf: leaf[0], metrics), expected_metrics, 2e-5)


def gradient(policy, params, batch, options=UpdateOptions()):
  state, _ = run(policy, params, batch, options, STEEP)
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
  _, metrics = run(policy, params, batch.replace(old_routing=moved), UpdateOptions(shift=ShiftOptions(0.01)))
  actions = int(batch.action_mask.sum())
  np.testing.assert_allclose(metrics["shift/drift"] * actions, 1.0, atol=1e-3)
  elsewhere = trace.replace(log_prob=trace.log_prob.at[row, slot - 1].add(-1))
  _, metrics = run(policy, params, batch.replace(old_routing=elsewhere))
  assert metrics["shift/drift"] == 0  # slot - 1 is the prompt's last token: no action, so nothing to distrust


def test_router_shift_scales_a_single_token_ratio():
  policy, params, batch = setup()
  batch = batch.replace(advantage=jnp.abs(batch.advantage) + 1)
  plain = gradient(policy, params, batch, UpdateOptions(shift=None))
  trace = batch.old_routing
  everywhere = batch.replace(old_routing=trace.replace(log_prob=trace.log_prob - jnp.float16(0.125)))
  shifted = gradient(policy, params, everywhere, UpdateOptions(shift=ShiftOptions(0.1)))
  assert_close(shifted, jax.tree.map(lambda leaf: leaf * np.exp(-0.125), plain), 1e-5)


def moved(policy, params, batch, by=0.5):
  """Parameters after an update, and the batch as it was scored before: off-policy, with a router that has moved."""
  away = gradient(policy, params, batch, UpdateOptions(shift=None))
  return jax.tree.map(lambda leaf, step: leaf - by * step, params, away)


def test_replayed_updates_take_the_old_experts_and_the_live_gates():
  policy, params, batch = setup()
  new = moved(policy, params, batch, by=20.0)
  _, free = run(policy, new, batch)
  _, pinned = run(policy, new, batch, UpdateOptions(replay="scoring"))
  assert free["router/overlap"] < 1 == pinned["router/overlap"]
  assert free["shift/drift"] > 0 and pinned["shift/drift"] > 0  # the router itself is as it is
  live, pinned = (
    gradient(policy, new, batch, UpdateOptions(shift=None, replay="scoring", replay_gates=gates))
    for gates in (False, True)
  )
  assert live["layers_0"]["moe"]["router"].any() and not pinned["layers_0"]["moe"]["router"].any()


def test_replay_gives_the_same_update_under_rematerialisation_and_microbatches():
  policy, params, batch = setup()
  new, options = moved(policy, params, batch, by=20.0), UpdateOptions(replay="scoring")
  expected, _ = run(policy, new, batch, options)
  remat = build_policy(dataclasses.replace(tiny.CONFIG, remat=True))
  again, _ = run(remat, new, batch, dataclasses.replace(options, microbatches=2))
  assert_close(again.params, expected.params)


@pytest.mark.parametrize("gates", [False, True])
def test_the_gradient_of_a_replayed_loss_with_all_its_terms_is_that_of_finite_differences(gates):
  """Along random directions through all parameters; with the experts pinned the loss has no jumps."""
  policy, params, batch = setup()
  terms = {name: value for name, value in EVERYTHING.items() if name not in ("shift", "mismatch")}
  options = UpdateOptions(OBJECTIVES["grpo"].objective, shift=None, replay="scoring", replay_gates=gates, **terms)
  norms = normalisers(policy, options, fresh_state(params), batch, pieces=1)
  value = jax.jit(lambda params: make_loss(policy, options)(params, batch, norms)[0])
  gradient, by = jax.jit(jax.grad(value))(params), 1e-3
  for seed in range(4):
    keys = jax.random.split(jax.random.key(seed), len(jax.tree.leaves(params)))
    noise = [jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, jax.tree.leaves(params), strict=True)]
    direction = jax.tree.unflatten(jax.tree.structure(params), noise)
    ahead, behind = (
      value(jax.tree.map(lambda leaf, step, s=sign: leaf + s * by * step, params, direction)) for sign in (1, -1)
    )
    slope = sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True))
    np.testing.assert_allclose((ahead - behind) / (2 * by), slope, rtol=2e-2, atol=2e-3)


def test_right_after_scoring_a_replayed_ratio_is_exactly_one():
  policy, params, batch = setup()
  for gates in (False, True):
    _, metrics = run(policy, params, batch, UpdateOptions(replay="scoring", replay_gates=gates))
    assert metrics["ratio/p1"] == metrics["ratio/max"] == metrics["shift/gamma_mean"] == 1.0


def test_entropy_kl_and_correction_enter_the_loss_as_their_formulas_say():
  policy, params, batch = setup()
  new = moved(policy, params, batch)
  mask = np.asarray(batch.action_mask)
  scored = jax.jit(functools.partial(score, policy))(new, batch.tokens, batch.valid)
  plain = run(policy, new, batch, UpdateOptions(shift=None))[1]
  rows, length = mask.any(1).sum(), np.maximum(mask.sum(1), 1)

  def mean(x):
    return (np.where(mask, x, 0).sum(1) / length).sum() / rows

  _, found = run(policy, new, batch, UpdateOptions(shift=None, entropy_coefficient=0.7))
  np.testing.assert_allclose(found["loss/objective"], plain["loss/objective"] + 0.7 * mean(scored.entropy), rtol=1e-4)
  _, found = run(policy, new, batch, UpdateOptions(shift=None, kl_coefficient=2.0))
  r = np.asarray(scored.log_prob - batch.reference_log_prob, np.float64)
  np.testing.assert_allclose(
    found["loss/objective"], plain["loss/objective"] - 2.0 * mean(np.exp(-r) - 1 + r), rtol=1e-4, atol=1e-6
  )
  off = batch.replace(
    sampler_log_prob=batch.old_log_prob + jnp.log(2.0)
  )  # the sampler found every token twice as likely
  _, found = run(policy, new, off, UpdateOptions(shift=None, mismatch=MismatchOptions()))
  np.testing.assert_allclose(found["loss/objective"], plain["loss/objective"] / 2, rtol=1e-4)
  np.testing.assert_allclose(found["mismatch/weight_mean"], 0.5, rtol=1e-5)


def test_frozen_parameters_stay_bitwise_and_the_others_learn_as_before():
  policy, params, batch = setup()
  expected = gradient(policy, params, batch)
  options = UpdateOptions(frozen=(ROUTER,))
  frozen = gradient(policy, params, batch, options)
  for layer in ("layers_0", "layers_2"):
    assert expected[layer]["moe"]["router"].any() and not frozen[layer]["moe"]["router"].any()
    assert_close(frozen[layer]["moe"]["gate"], expected[layer]["moe"]["gate"])
  optimizer = freeze(optax.adamw(1e-2, weight_decay=0.1), (ROUTER,))
  state, _ = run(policy, params, batch, options, optimizer)
  np.testing.assert_array_equal(state.params["layers_0"]["moe"]["router"], params["layers_0"]["moe"]["router"])
  assert not np.array_equal(state.params["embedding"], params["embedding"])


def test_the_bias_on_the_choice_rises_for_idle_experts_and_falls_for_busy_ones():
  policy = build_policy(dataclasses.replace(tiny.CONFIG, router_bias=True))
  params = jax.jit(policy.init)(jax.random.key(0))
  batch = tiny.train_batch(policy, params)
  state, metrics = run(policy, params, batch, UpdateOptions(router_bias_rate=0.01))
  bias = np.concatenate([state.params[f"layers_{i}"]["moe"]["router_bias"] for i in (0, 2)])
  _, seen = policy.forward(params, batch.tokens, batch.valid, probe=lambda router, _: router.expert_index)
  actions = np.asarray(to_positions(batch.action_mask))
  load = np.stack([np.bincount(np.asarray(layer)[actions].ravel(), minlength=4) for layer in seen])
  np.testing.assert_allclose(bias, 0.01 * np.sign(load.mean(1, keepdims=True) - load), atol=1e-7)
  assert metrics["router/load_max_over_mean"] > 1
  with pytest.raises(ValueError, match="this model has no bias"):
    make_train_step(tiny.policy_and_params()[0], SGD, UpdateOptions(router_bias_rate=0.01))


def test_the_balance_loss_evens_the_load_out():
  policy, params, batch = setup()
  params = jax.tree_util.tree_map_with_path(
    lambda path, leaf: leaf.at[..., 0].add(0.5) if "router" in jax.tree_util.keystr(path) else leaf, params
  )
  batch = batch.replace(advantage=jnp.zeros_like(batch.advantage))
  step = jax.jit(make_train_step(policy, optax.adam(1e-2), UpdateOptions(shift=None, load_balance_coefficient=1.0)))
  state, losses = fresh_state(params, optax.adam(1e-2)), []
  for _ in range(30):
    state, metrics = step(state, batch)
    losses.append(float(metrics["loss/load_balance"]))
  assert losses[-1] < losses[0] - 0.05 and losses[-1] >= tiny.CONFIG.num_experts_per_tok - 0.05


def test_a_floor_may_follow_the_updates():
  policy, params, batch = setup()
  batch = drifted(batch, by=3.0)
  options = UpdateOptions(shift=ShiftOptions(0.5, floor_start=0.9, floor_updates=2))
  step, state = jax.jit(make_train_step(policy, SGD, options)), fresh_state(params)
  floors = []
  for _ in range(3):
    state, metrics = step(state, batch)
    floors.append(float(metrics["shift/floor"]))
    assert float(metrics["shift/gamma_p10"]) >= floors[-1] - 1e-6
  np.testing.assert_allclose(floors, [0.9, 0.7, 0.5], rtol=1e-6)


def test_missing_trace_is_an_error_that_names_the_cure():
  policy, params, batch = setup()
  for field, options in (
    ("old_routing", UpdateOptions()),
    ("old_routing", UpdateOptions(shift=None, replay="scoring")),
    ("sampler_log_prob", UpdateOptions(mismatch=MismatchOptions())),
    ("reference_log_prob", UpdateOptions(kl_coefficient=0.1)),
  ):
    with pytest.raises(ValueError, match=f"ask for {field}, but the batch has none"):
      run(policy, params, batch.replace(**{field: None}), options)
  without = batch.replace(old_routing=batch.old_routing.replace(all_log_prob=None))
  with pytest.raises(ValueError, match="all_experts=True"):
    run(policy, params, without, UpdateOptions(shift=ShiftOptions(deviation="kl")))
  run(policy, params, batch.replace(old_routing=None), UpdateOptions(shift=None))


def test_a_nonfinite_gradient_changes_nothing_and_is_counted():
  policy, params, batch = setup()
  optimizer = skip_nonfinite(optax.adamw(1e-2))
  broken = batch.replace(advantage=batch.advantage.at[0].set(jnp.nan))
  step = jitted(policy, optimizer, UpdateOptions())
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


def test_layers_written_out_give_the_update_of_scanned_ones_and_start_on_policy():
  config = dataclasses.replace(tiny.CONFIG, mlp_only_layers=())
  policy, params = tiny.policy_and_params(config)
  written_out = build_policy(dataclasses.replace(config, scan_layers=False))
  batch = tiny.train_batch(written_out, params)
  _, metrics = run(written_out, params, batch)
  for name in ("ratio/p1", "ratio/max", "shift/gamma_mean"):
    assert metrics[name] == 1.0, name
  expected, _ = run(policy, params, drifted(batch))
  again, _ = run(written_out, params, drifted(batch))
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


@pytest.mark.parametrize(
  "wrong",
  [
    {"aggregation": "mean"},
    {"replay": "r2"},
    {"kl_estimator": "k4"},
    {"aggregation": "seq_mean_token_sum_norm"},
    {"microbatches": 0},
  ],
)
def test_impossible_options_are_refused(wrong):
  with pytest.raises(ValueError, match="want|start at"):
    UpdateOptions(**wrong)
