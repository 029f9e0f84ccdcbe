import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util
from safetensors.numpy import load_file

from models import lora
from models.config import LoraConfig
from models.huggingface.adapter import SETTINGS, WEIGHTS, load_adapter, save_adapter
from models.huggingface.checkpoint import save_pretrained
from models.huggingface.parameters import params_from_hf
from models.policy import build_policy
from rspo_jax.training import parameters
from tests.support import hf_cases

EVERYWHERE = LoraConfig(rank=3, alpha=6.0, targets=("attention/", "moe/(gate|up|down)$", "router$", "shared/", "mlp/"))


@functools.cache
def adapted(family="qwen3_moe", case="plain", options=EVERYWHERE, seed=0):
  """(config, base parameters, the same with adapters whose B is not zero)."""
  base = hf_cases.small_config(family, case)
  config = dataclasses.replace(base, lora=options)
  params = jax.tree.map(jnp.asarray, params_from_hf(base, hf_cases.random_tensors(base)))
  both = traverse_util.flatten_dict(lora.add_lora(config, params, jax.random.key(seed)))
  rng = np.random.default_rng(seed)
  for path, leaf in both.items():
    if path[-1].endswith("_lora_b"):
      both[path] = jnp.asarray(0.1 * rng.standard_normal(leaf.shape), jnp.float32)
  return config, params, traverse_util.unflatten_dict(both)


@functools.cache
def program(config):
  policy = build_policy(config)
  return jax.jit(lambda params, tokens: policy.unembed(params, policy.forward(params, tokens, tokens >= 0)[0]))


def logits(config, params):
  tokens = jnp.asarray(np.random.default_rng(0).integers(0, config.vocab_size, (2, 9)), jnp.int32)
  return program(config)(params, tokens)


def test_new_adapters_do_not_change_the_function_and_exist_for_every_target():
  config, params, _ = adapted()
  fresh = lora.add_lora(config, params, jax.random.key(1))
  np.testing.assert_array_equal(logits(config, fresh), logits(dataclasses.replace(config, lora=LoraConfig()), params))
  added = {path for path in traverse_util.flatten_dict(fresh)} - {path for path in traverse_util.flatten_dict(params)}
  names = {path[-1].removesuffix("_lora_a") for path in added if path[-1].endswith("_lora_a")}
  assert names == {"query", "key", "value", "out", "gate", "up", "down", "router"}
  shapes = jax.eval_shape(build_policy(config).init, jax.random.key(0))
  assert jax.tree.map(np.shape, fresh) == jax.tree.map(np.shape, shapes)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v2", "gpt_oss"])
def test_merged_model_equals_the_adapted_one_and_base_parameters_are_unchanged(family):
  config, params, both = adapted(family)
  flat, before = traverse_util.flatten_dict(both), traverse_util.flatten_dict(params)
  assert all(np.array_equal(flat[path], leaf) for path, leaf in before.items())
  plain, merged = lora.merge_lora(config, both)
  assert jax.tree.structure(merged) == jax.tree.structure(params)
  expected = logits(config, both)
  assert np.abs(expected - logits(plain, params)).max() > 1e-2
  np.testing.assert_allclose(logits(plain, merged), expected, atol=1e-5 * np.abs(expected).max())


def test_update_is_alpha_over_rank_times_a_b_for_every_expert():
  config, params, both = adapted()
  _, merged = lora.merge_lora(config, both)
  moe, base = both["layers_0"]["moe"], params["layers_0"]["moe"]
  for layer, expert in ((0, 0), (2, 7)):
    product = np.asarray(moe["up_lora_a"])[layer, expert] @ np.asarray(moe["up_lora_b"])[layer, expert]
    update = merged["layers_0"]["moe"]["up"][layer, expert] - base["up"][layer, expert]
    np.testing.assert_allclose(update, 2.0 * product, atol=1e-6)


def test_training_with_a_frozen_base_changes_only_the_adapters():
  config, _, both = adapted()
  policy = build_policy(config)
  tokens = jnp.asarray(np.random.default_rng(0).integers(0, config.vocab_size, (2, 9)), jnp.int32)
  optimizer = parameters.freeze(optax.adam(1e-2), (lora.BASE,))

  @jax.jit
  def step(params, state):
    def loss(params):
      params = parameters.stop_gradients(params, (lora.BASE,))
      return jnp.mean(policy.unembed(params, policy.forward(params, tokens, tokens >= 0)[0]) ** 2)

    updates, state = optimizer.update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, updates), state

  after, _ = step(both, optimizer.init(both))
  for path, leaf in traverse_util.flatten_dict(after).items():
    same = np.array_equal(leaf, traverse_util.flatten_dict(both)[path])
    assert same == ("_lora_" not in path[-1]), path
  moments = jax.tree.leaves(optimizer.init(both))
  adapters = [leaf for path, leaf in traverse_util.flatten_dict(both).items() if "_lora_" in path[-1]]
  assert sum(leaf.size for leaf in moments) == 2 * sum(leaf.size for leaf in adapters) + 1


def test_saved_adapter_loads_bitwise_equal_and_has_the_names_of_peft(tmp_path):
  config, params, both = adapted("qwen2_moe")
  save_adapter(tmp_path, config, both, base="some/base")
  back = load_adapter(tmp_path, config, params)
  jax.tree.map(np.testing.assert_array_equal, back, both)
  tensors = load_file(tmp_path / WEIGHTS)
  prefix = "base_model.model.model.layers.1"
  assert tensors[f"{prefix}.self_attn.q_proj.lora_A.weight"].shape == (3, 32)
  assert tensors[f"{prefix}.self_attn.k_proj.lora_B.weight"].shape == (16, 3)
  assert tensors[f"{prefix}.mlp.experts.7.down_proj.lora_A.weight"].shape == (3, 24)
  settings = json.loads((tmp_path / SETTINGS).read_text())
  assert (settings["r"], settings["lora_alpha"], settings["base_model_name_or_path"]) == (3, 6.0, "some/base")
  assert "model.layers.0.mlp.gate" in settings["target_modules"]


def test_error_of_an_adapter_that_does_not_fit_says_the_cure(tmp_path):
  config, params, both = adapted()
  save_adapter(tmp_path, config, both)
  with pytest.raises(ValueError, match=r"set lora\.rank"):
    load_adapter(tmp_path, dataclasses.replace(config, lora=dataclasses.replace(EVERYWHERE, rank=4)), params)
  fewer = dataclasses.replace(config, lora=dataclasses.replace(EVERYWHERE, targets=("attention/query",)))
  with pytest.raises(ValueError, match=r"not a target[\s\S]*lora\.targets"):
    load_adapter(tmp_path, fewer, params)
  with pytest.raises(ValueError, match="no adapters"):
    save_adapter(tmp_path, dataclasses.replace(config, lora=LoraConfig()), params)
  fused, _, tensors = adapted("gpt_oss", options=LoraConfig(rank=2, targets=("moe/up$",)))
  with pytest.raises(ValueError, match="merge them instead"):
    save_adapter(tmp_path, fused, tensors)


@pytest.mark.parity
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "qwen2"])
def test_peft_loads_the_adapter_and_computes_the_same_logits(family, tmp_path):
  torch = pytest.importorskip("torch")
  peft = pytest.importorskip("peft")
  transformers = pytest.importorskip("transformers")
  config, params, both = adapted(family, options=LoraConfig(rank=3, alpha=6.0, targets=("attention/",)))
  base = dataclasses.replace(config, lora=LoraConfig())
  save_pretrained(tmp_path / "base", base, params)
  save_adapter(tmp_path / "adapter", config, both, base=str(tmp_path / "base"))
  model = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / "base", dtype=torch.float32, attn_implementation="eager"
  )
  model = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
  tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 9))
  with torch.no_grad():
    reference = model(torch.from_numpy(tokens)).logits.numpy()
  ours = np.asarray(logits(config, both))
  assert np.abs(ours - reference).max() < 1e-5 * np.abs(reference).max()
