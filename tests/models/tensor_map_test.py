"""Names of tensors and entries of config.json, and what is said when they do not fit."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from models.huggingface.config_json import config_from_hf, config_to_hf
from models.huggingface.tensor_map import params_from_hf, params_to_hf
from tests.support.hf_cases import BASES, random_tensors, small_config

BASE = {"model_type": "qwen3_moe", **BASES["qwen3_moe"]}


def test_every_wrong_tensor_is_named():
  config = small_config()
  tensors = random_tensors(config)
  del tensors["model.layers.1.mlp.experts.3.up_proj.weight"]
  tensors["model.layers.2.self_attn.q_proj.bias"] = np.zeros(32, np.float32)
  tensors["model.norm.weight"] = np.zeros(31, np.float32)
  with pytest.raises(ValueError, match="does not fit") as caught:
    params_from_hf(config, tensors)
  message = str(caught.value)
  assert "model.layers.1.mlp.experts.3.up_proj.weight: missing, wanted (24, 32)" in message
  assert "model.layers.2.self_attn.q_proj.bias: not expected" in message
  assert "model.norm.weight: found (31,), wanted (32,)" in message
  assert message.count("\n  ") == 4


def test_fused_in_memory_names_are_explained():
  tensors = {"model.layers.0.mlp.experts.gate_up_proj": np.zeros((8, 48, 32), np.float32)}
  with pytest.raises(ValueError, match="save_pretrained writes the per-expert ones"):
    params_from_hf(small_config(), tensors)


def test_every_wrong_parameter_is_named():
  config = small_config()
  params = params_from_hf(config, random_tensors(config))
  params["head"] = params.pop("lm_head")
  params["final_norm"]["scale"] = params["final_norm"]["scale"][:-1]
  with pytest.raises(ValueError, match="do not fit") as caught:
    params_to_hf(config, params)
  message = str(caught.value)
  assert "lm_head: missing, wanted (32, 61)" in message
  assert "head: not expected" in message
  assert "final_norm/scale: found (31,), wanted (32,)" in message


def test_a_tied_head_must_equal_the_embedding():
  config = small_config(tie_word_embeddings=True)
  tensors = random_tensors(config)
  tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
  assert "lm_head" not in params_from_hf(config, tensors)
  tensors["lm_head.weight"][5, 7] += 1
  with pytest.raises(ValueError, match="tie_word_embeddings"):
    params_from_hf(config, tensors)


def test_reduced_precision_tensors_are_widened_exactly():
  config = small_config()
  tensors = {name: tensor.astype(jnp.bfloat16) for name, tensor in random_tensors(config).items()}
  back = params_to_hf(config, params_from_hf(config, tensors))
  for name, tensor in tensors.items():
    assert back[name].dtype == np.float32
    np.testing.assert_array_equal(back[name], tensor.astype(np.float32))


def test_both_spellings_of_a_configuration_are_the_same():
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
  ("changes", "named"),
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
def test_settings_the_model_does_not_have_are_refused(changes, named):
  with pytest.raises(ValueError, match=named):
    config_from_hf({**BASE, **changes})


@pytest.mark.parametrize(
  ("family", "changes", "named"),
  [
    ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob"),
    ("deepseek_v2", {"scoring_func": "sigmoid"}, "scoring_func"),
    ("deepseek_v3", {"topk_method": "greedy"}, "topk_method"),
    ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq"),
    ("gpt_oss", {"swiglu_alpha": 1.0}, "swiglu_alpha"),
    ("gpt_oss", {"rope_scaling": None}, "rope_scaling"),
  ],
)
def test_settings_that_a_family_never_has_are_refused(family, changes, named):
  with pytest.raises(ValueError, match=named):
    small_config(family, **changes)


def test_a_configuration_that_its_family_cannot_express_is_not_written():
  config = dataclasses.replace(small_config("mixtral"), norm_topk_prob=False)
  with pytest.raises(ValueError, match="norm_topk_prob is False, mixtral would read True"):
    config_to_hf(config)


def test_sizes_that_are_left_out_are_transformers_own():
  # Its Qwen3MoeConfig(), MixtralConfig() and GptOssConfig() in version 5.23.
  config = config_from_hf({"model_type": "qwen3_moe"})
  assert (config.hidden_size, config.num_experts, config.num_key_value_heads, config.head_dim) == (2048, 128, 4, 64)
  assert (config.norm_topk_prob, config.rope_theta) == (False, 10_000.0)
  assert config_from_hf({"model_type": "mixtral"}).rope_theta == 1_000_000.0
