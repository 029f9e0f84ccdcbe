"""Names and shapes of tensors, entries of `config.json`, and the errors for those that do not fit."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from models.huggingface.config_json import config_from_hf, config_to_hf
from models.huggingface.parameters import params_from_hf, params_to_hf
from tests.support.hf_cases import BASES, random_tensors, small_config

BASE = {"model_type": "qwen3_moe", **BASES["qwen3_moe"]}


def test_error_lists_every_tensor_that_does_not_fit():
  config = small_config()
  tensors = random_tensors(config)
  del tensors["model.layers.1.mlp.experts.3.up_proj.weight"]
  tensors["model.layers.2.self_attn.q_proj.bias"] = np.zeros(32, np.float32)
  tensors["model.norm.weight"] = np.zeros(31, np.float32)
  with pytest.raises(ValueError, match="does not fit") as caught:
    params_from_hf(config, tensors)
  message = str(caught.value)
  assert "model.layers.1.mlp.experts.3.up_proj.weight: missing, want (24, 32)" in message
  assert "model.layers.2.self_attn.q_proj.bias: not expected" in message
  assert "model.norm.weight: is (31,), want (32,)" in message
  assert message.count("\n  ") == 4


def test_error_explains_fused_tensor_names():
  tensors = {"model.layers.0.mlp.experts.gate_up_proj": np.zeros((8, 48, 32), np.float32)}
  with pytest.raises(ValueError, match="save_pretrained writes the per-expert tensors"):
    params_from_hf(small_config(), tensors)


def test_error_lists_every_parameter_that_does_not_fit():
  config = small_config()
  params = params_from_hf(config, random_tensors(config))
  params["head"] = params.pop("lm_head")
  params["final_norm"]["scale"] = params["final_norm"]["scale"][:-1]
  with pytest.raises(ValueError, match="do not fit") as caught:
    params_to_hf(config, params)
  message = str(caught.value)
  assert "lm_head: missing, want (32, 61)" in message
  assert "head: not expected" in message
  assert "final_norm/scale: is (31,), want (32,)" in message


def test_tied_head_must_equal_the_embedding():
  config = small_config(tie_word_embeddings=True)
  tensors = random_tensors(config)
  tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
  assert "lm_head" not in params_from_hf(config, tensors)
  tensors["lm_head.weight"][5, 7] += 1
  with pytest.raises(ValueError, match="tie_word_embeddings"):
    params_from_hf(config, tensors)


def test_bfloat16_tensors_convert_to_float32_exactly():
  config = small_config()
  tensors = {name: tensor.astype(jnp.bfloat16) for name, tensor in random_tensors(config).items()}
  widened = params_to_hf(config, params_from_hf(config, tensors))
  for name, tensor in tensors.items():
    assert widened[name].dtype == np.float32
    np.testing.assert_array_equal(widened[name], tensor.astype(np.float32))


def test_both_spellings_of_config_json_give_the_same_configuration():
  public = {**BASE, "rope_theta": 1e6, "rope_scaling": None, "torch_dtype": "bfloat16", "attention_bias": False}
  newer = {**BASE, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}, "dtype": "bfloat16"}
  newer["num_local_experts"] = newer.pop("num_experts")
  assert config_from_hf(public) == config_from_hf(newer)
  assert config_from_hf(public).rope_theta == 1e6
  assert config_from_hf(public).dtype == "bfloat16"
  assert config_from_hf(public, dtype="float32", remat=True) == dataclasses.replace(
    config_from_hf(newer), dtype="float32", remat=True
  )


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"model_type": "llama"}, "llama"),
    ({"attention_dropout": 0.1}, "attention_dropout"),
    ({"hidden_act": "gelu"}, "hidden_act"),
    ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, "dynamic"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "short_factor": [1.0]}}, "short_factor"),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ({"num_local_experts": 9}, "num_local_experts"),
  ],
)
def test_unsupported_entries_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    config_from_hf({**BASE, **changes})


@pytest.mark.parametrize(
  ("family", "changes", "message"),
  [
    ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob"),
    ("deepseek_v2", {"scoring_func": "sigmoid"}, "scoring_func"),
    ("deepseek_v3", {"topk_method": "greedy"}, "topk_method"),
    ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq"),
    ("gpt_oss", {"swiglu_alpha": 1.0}, "swiglu_alpha"),
    ("gpt_oss", {"rope_scaling": None}, "rope_scaling"),
  ],
)
def test_entries_that_a_family_does_not_support_are_refused(family, changes, message):
  with pytest.raises(ValueError, match=message):
    small_config(family, **changes)


def test_configuration_that_its_family_cannot_express_is_refused():
  config = dataclasses.replace(small_config("mixtral"), norm_topk_prob=False)
  with pytest.raises(ValueError, match="norm_topk_prob is False, but would be read as True"):
    config_to_hf(config)


def test_absent_entries_have_the_defaults_of_transformers():
  # Qwen3MoeConfig() and MixtralConfig() of transformers 5.23.
  config = config_from_hf({"model_type": "qwen3_moe"})
  assert (config.hidden_size, config.num_experts, config.num_key_value_heads, config.head_dim) == (2048, 128, 4, 64)
  assert (config.norm_topk_prob, config.rope_theta) == (False, 10_000.0)
  assert config_from_hf({"model_type": "mixtral"}).rope_theta == 1_000_000.0
