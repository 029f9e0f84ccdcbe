import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.config import TransformerConfig
from models.layers.experts import platform_of
from models.policy import build_policy
from rspo_jax import mesh
from rspo_jax.types import Layout, Replay
from tests.support import tiny


def outputs(policy, params, tokens, valid, **keywords):
  """(logits, output of the probe) of one forward."""
  hidden, probed = jax.jit(lambda: policy.forward(params, tokens, valid, **keywords))()
  return policy.unembed(params, hidden), probed


def test_default_probe_returns_the_router_logits_of_the_moe_layers():
  policy, params = tiny.policy_and_params()
  tokens, valid = tiny.prompts()
  _, router_logits = outputs(policy, params, tokens, valid)
  assert router_logits.shape == (2, 8, 5, 4) == (policy.num_moe_layers, *tokens.shape, policy.num_experts)
  assert router_logits.dtype == jnp.float32


def test_probe_gets_the_executed_routing_and_the_inputs_of_its_layer():
  policy, params = tiny.policy_and_params()
  tokens, valid = tiny.prompts()

  def probe(router, probe_inputs):
    return router.logits, router.expert_index, probe_inputs

  layers = jnp.arange(policy.num_moe_layers)
  _, probed = outputs(policy, params, tokens, valid, probe=probe, probe_inputs=layers)
  router_logits, expert_index, inputs = probed
  np.testing.assert_array_equal(expert_index, jax.lax.top_k(router_logits, 2)[1])
  np.testing.assert_array_equal(inputs, layers)


def test_replayed_experts_are_executed_and_the_same_experts_change_nothing():
  policy, params = tiny.policy_and_params()
  tokens, valid = tiny.prompts()
  expected, router_logits = outputs(policy, params, tokens, valid)
  own = Replay(jax.lax.top_k(router_logits, 2)[1])
  same, _ = outputs(policy, params, tokens, valid, replay=own)
  np.testing.assert_array_equal(same, expected)
  other, _ = outputs(policy, params, tokens, valid, replay=Replay(jax.lax.top_k(-router_logits, 2)[1]))
  assert np.abs(other - expected)[np.asarray(valid)].max() > 1e-3


def test_replayed_gates_are_executed_and_the_router_gets_no_gradient():
  policy, params = tiny.policy_and_params()
  tokens, valid = tiny.prompts()
  expected, router = outputs(policy, params, tokens, valid, probe=lambda router, probe_inputs: router)
  same, _ = outputs(policy, params, tokens, valid, replay=Replay(router.expert_index, router.gate))
  np.testing.assert_array_equal(same, expected)
  other, _ = outputs(policy, params, tokens, valid, replay=Replay(router.expert_index, router.gate * 2))
  assert np.abs(other - expected)[np.asarray(valid)].max() > 1e-3

  def total(params, replay):
    return jnp.sum(policy.forward(params, tokens, valid, replay=replay)[0] ** 2 * valid[..., None])

  of_router = [
    jax.jit(jax.grad(total))(params, Replay(router.expert_index, gate))["layers_0"]["moe"]["router"]
    for gate in (None, router.gate)
  ]
  assert of_router[0].any() and not of_router[1].any()


def test_router_bias_changes_the_selection_but_not_the_gates_and_has_no_gradient():
  biased = build_policy(dataclasses.replace(tiny.CONFIG, router_bias=True))
  params = jax.jit(biased.init)(jax.random.key(0))
  tokens, valid = tiny.prompts()
  _, before = outputs(biased, params, tokens, valid, probe=lambda router, probe_inputs: router)
  step = jnp.zeros((biased.num_moe_layers, 4)).at[1, 3].set(10.0)
  moved = biased.add_router_bias(params, step)
  _, after = outputs(biased, moved, tokens, valid, probe=lambda router, probe_inputs: router)
  np.testing.assert_array_equal(after.expert_index[0], before.expert_index[0])
  assert (after.expert_index[1] == 3).any(axis=-1).all() and not (before.expert_index[1] == 3).any(axis=-1).all()
  score = jnp.take_along_axis(jax.nn.softmax(after.logits), after.expert_index, axis=-1)
  np.testing.assert_allclose(after.gate, score / score.sum(-1, keepdims=True), rtol=1e-5)
  gradient = jax.jit(jax.grad(lambda params: jnp.sum(biased.forward(params, tokens, valid)[0] ** 2)))(moved)
  assert not any(gradient[f"layers_{i}"]["moe"]["router_bias"].any() for i in (0, 2))


def test_prefill_and_decode_equal_the_full_forward():
  policy, params = tiny.policy_and_params()
  tokens, valid = tiny.prompts(length=9)
  valid = valid.at[:, 6:].set(True)
  hidden, router_logits = policy.forward(params, tokens, valid)
  weights = policy.for_decode(params, 9)
  cache = policy.init_cache(8, 9)
  prompt_hidden, prompt_logits, cache = policy.prefill(weights, tokens[:, :6], valid[:, :6], cache)
  hidden_parts, logits_parts = [prompt_hidden], [prompt_logits]
  decode = jax.jit(policy.decode)
  for slot in range(6, 9):
    step_hidden, step_logits, cache = decode(weights, tokens[:, slot], valid[:, slot], cache)
    hidden_parts.append(step_hidden[:, None])
    logits_parts.append(step_logits[:, :, None])
  mask = np.asarray(valid)
  np.testing.assert_allclose(jnp.concatenate(hidden_parts, 1)[mask], hidden[mask], atol=1e-5)
  np.testing.assert_allclose(jnp.concatenate(logits_parts, 2)[:, mask], router_logits[:, mask], atol=1e-5)


def prefill(policy, params):
  """(hidden [valid positions, D], the cache) after a prefill of the whole batch."""
  tokens, valid = tiny.prompts()
  weights = policy.for_decode(params, tokens.shape[1])
  hidden, _, cache = jax.jit(policy.prefill)(weights, tokens, valid, policy.init_cache(*tokens.shape))
  return np.asarray(hidden, np.float32)[np.asarray(valid)], cache


def test_bfloat16_decode_weights_are_cast_once_and_give_the_same_hidden_states():
  _, params = tiny.policy_and_params()
  policy = build_policy(dataclasses.replace(tiny.CONFIG, dtype="bfloat16"))
  weights = policy.for_decode(params, 5)
  dtypes = {jax.tree_util.keystr(path): leaf.dtype for path, leaf in jax.tree_util.tree_leaves_with_path(weights)}
  float32 = {path for path, dtype in dtypes.items() if dtype == jnp.float32}
  assert len(dtypes) - len(float32) > 20 and all("router" in path or "rotary" in path for path in float32)
  tokens, valid = tiny.prompts()
  expected = jax.jit(policy.forward)(params, tokens, valid)[0][valid]
  error = np.abs(prefill(policy, params)[0] - np.asarray(expected, np.float32)).max(axis=-1)
  assert np.median(error) < 0.02  # sums have another order, so near ties of the router select other experts


def test_bfloat16_cache_has_half_the_size_and_a_small_error():
  policy, params = tiny.policy_and_params()
  bfloat16 = build_policy(dataclasses.replace(tiny.CONFIG, cache_dtype="bfloat16"))
  (expected, cache), (actual, small) = prefill(policy, params), prefill(bfloat16, params)
  assert jax.tree.leaves(small.layers)[0].dtype == jnp.bfloat16
  assert sum(leaf.nbytes for leaf in small.layers[0]) * 2 == sum(leaf.nbytes for leaf in cache.layers[0])
  assert 0 < np.median(np.abs(actual - expected).max(axis=-1)) < 0.02


def test_padding_tokens_do_not_change_valid_positions():
  policy, params = tiny.policy_and_params()
  tokens, valid = tiny.prompts()
  expected, _ = outputs(policy, params, tokens, valid)
  other, _ = outputs(policy, params, jnp.where(valid, tokens, 7), valid)
  mask = np.asarray(valid)
  np.testing.assert_array_equal(other[mask], expected[mask])
  assert np.isfinite(other).all()


def test_later_tokens_do_not_change_earlier_positions():
  policy, params = tiny.policy_and_params()
  tokens, valid = tiny.prompts()
  expected, _ = outputs(policy, params, tokens, valid)
  other, _ = outputs(policy, params, tokens.at[:, -1].set(3), valid)
  np.testing.assert_allclose(other[:, :-1], expected[:, :-1], atol=1e-6)


def test_default_unrolls_up_to_eight_wide_layers_on_cpus():
  narrow = dataclasses.replace(tiny.CONFIG, scan_layers=None)
  assert narrow.scans_layers("cpu")
  config = dataclasses.replace(narrow, hidden_size=128)
  assert not config.scans_layers("cpu")
  assert config.scans_layers("gpu") and config.scans_layers("tpu")
  assert not dataclasses.replace(config, num_hidden_layers=8).scans_layers("cpu")
  assert dataclasses.replace(config, num_hidden_layers=9).scans_layers("cpu")
  assert dataclasses.replace(config, remat=True).scans_layers("cpu")
  for scan in (True, False):
    explicit = dataclasses.replace(config, scan_layers=scan)
    assert explicit.scans_layers("cpu") == explicit.scans_layers("gpu") == scan


def test_platform_is_that_of_the_devices_of_the_mesh(monkeypatch):
  devices = np.array([[types.SimpleNamespace(platform="gpu")]])
  assert platform_of(Layout(types.SimpleNamespace(devices=devices), mesh.RULES)) == "gpu"
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  assert platform_of(mesh.make_layout()) == platform_of(None) == "cpu"


def test_auto_on_cpus_means_unrolled_layers_and_blocks():
  config = dataclasses.replace(tiny.CONFIG, hidden_size=128, mlp_only_layers=(), scan_layers=None)
  params = jax.eval_shape(build_policy(config).init, jax.random.key(0))
  tokens, valid = tiny.prompts()

  def program(**changes):
    policy = build_policy(dataclasses.replace(config, **changes))
    return str(jax.make_jaxpr(policy.forward)(params, tokens, valid))

  assert program() == program(scan_layers=False, expert_backend="blocks")
  assert program() != program(scan_layers=True)
  assert program() != program(expert_backend="ragged")


def test_scanned_and_unrolled_layers_have_the_same_parameters():
  config = dataclasses.replace(tiny.CONFIG, num_hidden_layers=4)
  auto, scanned, unrolled = (
    jax.jit(build_policy(dataclasses.replace(config, scan_layers=scan)).init)(jax.random.key(0))
    for scan in (None, True, False)
  )
  jax.tree.map(np.testing.assert_array_equal, auto, scanned)
  jax.tree.map(np.testing.assert_array_equal, unrolled, scanned)


def test_logical_axes_name_every_axis_of_every_parameter():
  policy, params = tiny.policy_and_params()

  def check(leaf, names):
    assert len(names) == leaf.ndim
    assert set(names) <= {None, *mesh.RULES}

  jax.tree.map(check, params, policy.logical_axes())


@pytest.mark.parametrize("backend", ["dense", "ragged", "blocks", "gathered"])
def test_every_expert_backend_gives_the_same_logits(backend):
  _, params = tiny.policy_and_params()
  tokens, valid = tiny.prompts()
  expected, _ = outputs(build_policy(tiny.CONFIG), params, tokens, valid)
  other = build_policy(dataclasses.replace(tiny.CONFIG, expert_backend=backend))
  mask = np.asarray(valid)
  np.testing.assert_allclose(outputs(other, params, tokens, valid)[0][mask], expected[mask], atol=1e-5)


def test_bfloat16_activations_stay_near_float32_and_the_router_stays_float32():
  _, params = tiny.policy_and_params()
  tokens, valid = tiny.prompts()
  expected, _ = outputs(build_policy(tiny.CONFIG), params, tokens, valid)
  logits, router_logits = outputs(
    build_policy(dataclasses.replace(tiny.CONFIG, dtype="bfloat16")), params, tokens, valid
  )
  assert logits.dtype == router_logits.dtype == jnp.float32
  # Near ties of the router select other experts; most tokens must still agree.
  error = np.abs(logits - expected)[np.asarray(valid)].max(axis=-1)
  assert np.median(error) < 0.05 * np.abs(expected).max()


def test_segments_are_runs_of_layers_of_the_same_kind():
  config = dataclasses.replace(tiny.CONFIG, num_hidden_layers=6, mlp_only_layers=(0,), decoder_sparse_step=2)
  assert config.segments == ((False, 1), (True, 1), (False, 1), (True, 1), (False, 1), (True, 1))
  assert tiny.CONFIG.segments == ((True, 1), (False, 1), (True, 1))
  assert dataclasses.replace(tiny.CONFIG, mlp_only_layers=()).segments == ((True, 3),)


@pytest.mark.parametrize(
  "changes",
  [
    {"num_key_value_heads": 3},
    {"num_experts_per_tok": 5},
    {"head_dim": 7},
    {"dtype": "float16"},
    {"intermediate_size": 0},
    {"mlp_only_layers": (0, 1, 2)},
  ],
  ids=str,
)
def test_impossible_models_are_refused(changes):
  with pytest.raises(ValueError):  # noqa: PT011 - each names its field; that it is a ValueError is the contract
    dataclasses.replace(tiny.CONFIG, **changes)


def test_qwen3_30b_a3b_has_its_published_parameter_count():
  config = TransformerConfig(
    vocab_size=151_936,
    hidden_size=2048,
    num_hidden_layers=48,
    num_attention_heads=32,
    num_key_value_heads=4,
    head_dim=128,
    num_experts=128,
    num_experts_per_tok=8,
    moe_intermediate_size=768,
  )
  shapes = jax.eval_shape(build_policy(config).init, jax.random.key(0))
  assert round(sum(leaf.size for leaf in jax.tree.leaves(shapes)) / 1e9, 1) == 30.5
