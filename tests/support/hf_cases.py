"""Small checkpoints of every public family: configurations that cover each option, and random weights."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from models.config import TransformerConfig
from models.huggingface import config_json
from models.huggingface.tensor_map import tensor_map

_COMMON = {
  "vocab_size": 61,
  "hidden_size": 32,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
}
_MLA = {
  **_COMMON,
  "num_key_value_heads": 4,
  "intermediate_size": 40,
  "moe_intermediate_size": 24,
  "kv_lora_rank": 16,
  "q_lora_rank": None,
  "qk_nope_head_dim": 8,
  "qk_rope_head_dim": 4,
  "v_head_dim": 12,
  "n_routed_experts": 8,
  "n_shared_experts": 1,
  "num_experts_per_tok": 3,
  "first_k_dense_replace": 1,
}
YARN = {
  "rope_type": "yarn",
  "factor": 4.0,
  "original_max_position_embeddings": 8,
  "beta_fast": 4.0,
  "beta_slow": 1.0,
}
_UPPER_WINDOW = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, "num_hidden_layers": 3}
_DEEPSEEK_YARN = {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}

BASES: dict[str, dict[str, Any]] = {
  "qwen3_moe": {
    **_COMMON,
    "intermediate_size": 40,
    "moe_intermediate_size": 24,
    "head_dim": 8,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "norm_topk_prob": True,
  },
  "qwen2_moe": {
    **_COMMON,
    "intermediate_size": 40,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 20,
    "num_experts": 8,
    "num_experts_per_tok": 3,
  },
  "qwen3": {**_COMMON, "intermediate_size": 40, "head_dim": 8},
  "qwen2": {**_COMMON, "intermediate_size": 40},
  "olmoe": {**_COMMON, "intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 3},
  "mixtral": {**_COMMON, "intermediate_size": 24, "num_local_experts": 6, "num_experts_per_tok": 2},
  "deepseek_v2": {**_MLA, "topk_method": "greedy", "n_group": 1, "topk_group": 1},
  "deepseek_v3": {**_MLA, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5},
  "gpt_oss": {
    **_COMMON,
    "intermediate_size": 24,
    "head_dim": 8,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "sliding_window": 6,
    "swiglu_limit": 0.7,
    "rope_theta": 150.0,
    "rope_scaling": {**YARN, "truncate": False},
  },
}

CASES: dict[str, dict[str, dict[str, Any]]] = {
  "qwen3_moe": {
    "plain": {"num_hidden_layers": 3},
    "wide_heads_shared_by_four": {"head_dim": 20, "num_key_value_heads": 1},
    "own_key_value_heads_not_renormalised": {"num_key_value_heads": 4, "norm_topk_prob": False},
    "tied": {"tie_word_embeddings": True, "hidden_size": 48, "head_dim": 6},
    "dense_first_and_fourth": {"mlp_only_layers": [0, 3], "num_hidden_layers": 5},
    "every_second_layer_dense": {"decoder_sparse_step": 2, "num_hidden_layers": 4, "rms_norm_eps": 1e-3},
    "short_rotary_period": {"rope_theta": 50.0, "num_experts": 5, "num_experts_per_tok": 2},
    "long_rotary_period_all_experts": {"rope_theta": 1e6, "num_experts": 4, "num_experts_per_tok": 4},
    "one_expert_of_sixteen": {"num_experts": 16, "num_experts_per_tok": 1, "norm_topk_prob": False},
    "yarn_and_biases": {"rope_scaling": YARN, "attention_bias": True},
    "sliding_window": {"use_sliding_window": True, "sliding_window": 5},
  },
  "qwen2_moe": {
    "plain": {},
    "renormalised_wide_shared_expert": {"norm_topk_prob": True, "shared_expert_intermediate_size": 44},
    "without_biases_own_heads": {"qkv_bias": False, "num_key_value_heads": 4},
    "dense_layer_between": {"mlp_only_layers": [1], "num_hidden_layers": 3},
    "tied_shared_heads": {"tie_word_embeddings": True, "num_key_value_heads": 1},
    "sliding_window_in_alternating_layers": {
      "use_sliding_window": True,
      "sliding_window": 4,
      "max_window_layers": 3,
      "num_hidden_layers": 4,
    },
    "linear_rope": {"rope_scaling": {"rope_type": "linear", "factor": 3.0}, "num_experts_per_tok": 1},
  },
  "qwen3": {
    "plain": {},
    "wide_heads_shared_by_four": {"head_dim": 20, "num_key_value_heads": 1},
    "tied_own_heads": {"tie_word_embeddings": True, "num_key_value_heads": 4},
    "biases_short_rotary_period": {"attention_bias": True, "rope_theta": 50.0},
    "yarn": {"rope_scaling": YARN},
    "sliding_window_in_upper_layers": _UPPER_WINDOW,
  },
  "qwen2": {
    "plain": {},
    "heads_shared_by_four": {"num_key_value_heads": 1},
    "tied_own_heads": {"tie_word_embeddings": True, "num_key_value_heads": 4},
    "loose_norm_short_rotary_period": {"rms_norm_eps": 1e-3, "rope_theta": 50.0},
    "yarn": {"rope_scaling": YARN},
    "sliding_window_in_upper_layers": _UPPER_WINDOW,
  },
  "olmoe": {
    "plain": {},
    "clipped": {"clip_qkv": 0.8},
    "renormalised_own_heads": {"norm_topk_prob": True, "num_key_value_heads": 4},
    "heads_shared_by_four_biases": {"num_key_value_heads": 1, "attention_bias": True},
    "tied_one_expert": {"tie_word_embeddings": True, "num_experts_per_tok": 1},
    "yarn_all_experts": {"rope_scaling": YARN, "num_experts": 4, "num_experts_per_tok": 4},
  },
  "mixtral": {
    "plain": {},
    "wide_heads_shared_by_four": {"head_dim": 20, "num_key_value_heads": 1},
    "own_heads_short_rotary_period": {"num_key_value_heads": 4, "rope_theta": 50.0},
    "sliding_window": {"sliding_window": 5},
    "tied_three_of_six": {"tie_word_embeddings": True, "num_experts_per_tok": 3},
    "deep": {"num_hidden_layers": 4, "rms_norm_eps": 1e-3},
  },
  "deepseek_v2": {
    "plain": {"num_hidden_layers": 3},
    "low_rank_queries": {"q_lora_rank": 20, "num_key_value_heads": 4},
    "group_limited": {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
    "scaled_two_shared_experts": {"routed_scaling_factor": 3.0, "n_shared_experts": 2},
    "yarn": {"rope_scaling": _DEEPSEEK_YARN},
    "no_dense_layer_biases_tied": {
      "first_k_dense_replace": 0,
      "attention_bias": True,
      "q_lora_rank": 20,
      "tie_word_embeddings": True,
    },
  },
  "deepseek_v3": {
    "plain": {"num_hidden_layers": 3},
    "low_rank_queries_two_shared_experts": {"q_lora_rank": 20, "n_shared_experts": 2},
    "one_group_not_renormalised": {"n_group": 1, "topk_group": 1, "norm_topk_prob": False},
    "yarn": {"rope_scaling": _DEEPSEEK_YARN, "routed_scaling_factor": 1.0},
    "rotary_pairs_not_interleaved": {"rope_interleave": False},
    "no_dense_layer_biases_tied": {
      "first_k_dense_replace": 0,
      "attention_bias": True,
      "q_lora_rank": 20,
      "tie_word_embeddings": True,
    },
  },
  "gpt_oss": {
    "plain": {},
    "published_limit_wide_heads": {"swiglu_limit": 7.0, "head_dim": 20, "num_key_value_heads": 1},
    "own_heads_rounded_yarn": {"num_key_value_heads": 4, "rope_scaling": {**YARN, "truncate": True}},
    "all_layers_full": {"layer_types": ["full_attention", "full_attention"]},
    "short_window_last": {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 2},
    "tied_without_attention_bias": {"tie_word_embeddings": True, "attention_bias": False, "num_experts_per_tok": 3},
  },
}

ALL_CASES = [(family, case) for family, cases in CASES.items() for case in cases]
ONE_PER_FAMILY = [(family, next(iter(cases))) for family, cases in CASES.items()]


def public_config(family: str, case: str = "plain", **changes: Any) -> dict[str, Any]:
  """The entries of the `config.json` of a case, with some changed."""
  return {"model_type": family, "tie_word_embeddings": False, **BASES[family], **CASES[family][case], **changes}


def small_config(family: str = "qwen3_moe", case: str = "plain", **changes: Any) -> TransformerConfig:
  """The configuration of `public_config`."""
  return config_json.config_from_hf(public_config(family, case, **changes))


def random_tensors(config: TransformerConfig, seed: int = 0) -> dict[str, np.ndarray]:
  """Random tensors by public name: norms are not 1, biases are not 0, and router logits are far from ties."""
  rng = np.random.default_rng(seed)
  tensors = {}
  for name, (first, *_) in tensor_map(config).items():
    shape = first.tensor_shape
    noise = rng.standard_normal(shape)
    if "norm" in name:
      value = 1 + 0.2 * noise
    elif name.endswith(("bias", "sinks")):
      value = 0.3 * noise
    elif ".gate.weight" in name or name.endswith("router.weight"):
      value = 2 * noise / np.sqrt(shape[-1])
    elif "experts." in name and "_proj" in name and not name.endswith("weight"):  # fused, [E, inputs, outputs]
      value = noise / np.sqrt(shape[1])
    else:
      value = noise / np.sqrt(shape[-1])
    tensors[name] = value.astype(np.float32)
  return tensors


def write_checkpoint(folder: Path, config: dict[str, Any], tensors: dict[str, np.ndarray], shards: int = 1) -> Path:
  """Writes a checkpoint folder: config.json and safetensors files, with an index if there are several."""
  from safetensors.numpy import save_file

  folder.mkdir(parents=True, exist_ok=True)
  (folder / "config.json").write_text(json.dumps(config))
  names = list(tensors)
  if shards == 1:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
  weight_map = {}
  for number in range(shards):
    file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
    part = {name: tensors[name] for name in names[number::shards]}
    save_file(part, folder / file, metadata={"format": "pt"})
    weight_map |= dict.fromkeys(part, file)
  (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
  return folder
