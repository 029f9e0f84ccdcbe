"""The public families: how the entries of their `config.json` map to the fields of `TransformerConfig`.

A family is a table of entries with the same meaning under another name, the fields that it fixes, and a reader and a
writer for the other entries (`models.huggingface.family_entries`). Router shift compares router probabilities:

| family | router probability | selection by | gate of a selected expert |
|---|---|---|---|
| qwen3_moe, qwen2_moe, olmoe | softmax over all experts | probability | probability, normalised if `norm_topk_prob` |
| mixtral | softmax over all experts | probability | normalised probability |
| gpt_oss | softmax over all experts, of logits with a bias | probability | normalised (softmax of the selected) |
| deepseek_v2 | softmax over all experts | probability, in the best groups | probability, scaled |
| deepseek_v3 | sigmoid of each expert | probability plus bias, in the best groups | normalised probability, scaled |
| qwen2, qwen3 | 1: one expert, no router | - | 1 |

Normalised: divided by the sum over the selected experts. Scaled: multiplied by `routed_scaling_factor`.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from models.config import TransformerConfig
from models.huggingface import family_entries as entries


class TensorNames(NamedTuple):
  """Names of the parts of a layer in the checkpoints of a family.

  Attributes:
    block: the experts and their router. router, router_bias, shared: within it.
    projections: gate, up and down of an MLP.
    fused: all experts of a layer are one tensor, gate and up projections in alternating columns (gpt-oss).
  """

  block: str = "mlp"
  router: str = "gate"
  router_bias: str = "gate.e_score_correction_bias"
  shared: str = "shared_expert"
  projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
  fused: bool = False


@dataclasses.dataclass(frozen=True)
class Family:
  """How the `config.json` of one family is read and written.

  Attributes:
    architecture: the class of transformers that loads it.
    keys: field of `TransformerConfig` -> (entry, default of transformers).
    fixed: fields with the same value in all models of the family.
    read, write: of the other entries, see `models.huggingface.family_entries`.
    names: of the tensors in a checkpoint.
    supported: (entry, supported values), None for an absent entry.
  """

  architecture: str
  keys: Mapping[str, tuple[str, Any]]
  fixed: Mapping[str, Any]
  read: Callable[[Mapping[str, Any], dict[str, Any], list[str]], None]
  write: Callable[[TransformerConfig], dict[str, Any]]
  names: TensorNames = dataclasses.field(default_factory=TensorNames)
  supported: Sequence[tuple[str, tuple[Any, ...]]] = ()


_SIZES = {
  "vocab_size": ("vocab_size", 151936),
  "hidden_size": ("hidden_size", 2048),
  "num_hidden_layers": ("num_hidden_layers", 24),
  "num_attention_heads": ("num_attention_heads", 32),
  "rms_norm_eps": ("rms_norm_eps", 1e-6),
}
_SPARSE_LAYERS = {"decoder_sparse_step": ("decoder_sparse_step", 1)}
_DENSE_SIZES = _SIZES | {"hidden_size": ("hidden_size", 4096), "num_hidden_layers": ("num_hidden_layers", 32)}
_DEEPSEEK_KEYS = _SIZES | {
  "num_experts": ("n_routed_experts", 64),
  "num_experts_per_tok": ("num_experts_per_tok", None),
  "moe_intermediate_size": ("moe_intermediate_size", 1407),
  "intermediate_size": ("intermediate_size", 11008),
  "kv_lora_rank": ("kv_lora_rank", 512),
  "qk_nope_head_dim": ("qk_nope_head_dim", 128),
  "qk_rope_head_dim": ("qk_rope_head_dim", 64),
  "v_head_dim": ("v_head_dim", 128),
  "n_group": ("n_group", None),
  "topk_group": ("topk_group", None),
  "routed_scaling_factor": ("routed_scaling_factor", 1.0),
}

FAMILIES: dict[str, Family] = {
  "qwen3_moe": Family(
    "Qwen3MoeForCausalLM",
    _SIZES
    | _SPARSE_LAYERS
    | {
      "num_experts_per_tok": ("num_experts_per_tok", 8),
      "moe_intermediate_size": ("moe_intermediate_size", 768),
      "intermediate_size": ("intermediate_size", 6144),
      "norm_topk_prob": ("norm_topk_prob", False),
    },
    {"qk_norm": "head"},
    entries.read_qwen3_moe,
    entries.write_qwen3_moe,
  ),
  "qwen2_moe": Family(
    "Qwen2MoeForCausalLM",
    _SIZES
    | _SPARSE_LAYERS
    | {
      "num_attention_heads": ("num_attention_heads", 16),
      "num_experts_per_tok": ("num_experts_per_tok", 4),
      "moe_intermediate_size": ("moe_intermediate_size", 1408),
      "shared_expert_intermediate_size": ("shared_expert_intermediate_size", 5632),
      "intermediate_size": ("intermediate_size", 5632),
      "norm_topk_prob": ("norm_topk_prob", False),
      "qkv_bias": ("qkv_bias", True),
    },
    {"qk_norm": "none", "shared_expert_gate": True},
    entries.read_qwen2_moe,
    entries.write_qwen2_moe,
  ),
  "qwen3": Family(
    "Qwen3ForCausalLM",
    _DENSE_SIZES,
    {"qk_norm": "head"},
    entries.read_qwen3,
    entries.write_qwen3,
  ),
  "qwen2": Family(
    "Qwen2ForCausalLM",
    _DENSE_SIZES,
    {"qk_norm": "none", "qkv_bias": True},
    entries.read_qwen2,
    entries.write_qwen2,
  ),
  "olmoe": Family(
    "OlmoeForCausalLM",
    _SIZES
    | {
      "vocab_size": ("vocab_size", 50304),
      "num_hidden_layers": ("num_hidden_layers", 16),
      "num_attention_heads": ("num_attention_heads", 16),
      "rms_norm_eps": ("rms_norm_eps", 1e-5),
      "num_experts_per_tok": ("num_experts_per_tok", 8),
      "moe_intermediate_size": ("intermediate_size", 2048),
      "norm_topk_prob": ("norm_topk_prob", False),
      "clip_qkv": ("clip_qkv", None),
    },
    {"qk_norm": "projection"},
    entries.read_olmoe,
    entries.write_olmoe,
  ),
  "mixtral": Family(
    "MixtralForCausalLM",
    _SIZES
    | {
      "vocab_size": ("vocab_size", 32000),
      "hidden_size": ("hidden_size", 4096),
      "num_hidden_layers": ("num_hidden_layers", 32),
      "rms_norm_eps": ("rms_norm_eps", 1e-5),
      "num_experts": ("num_local_experts", 8),
      "num_experts_per_tok": ("num_experts_per_tok", 2),
      "moe_intermediate_size": ("intermediate_size", 14336),
    },
    {"qk_norm": "none", "norm_topk_prob": True, "rope_theta": 1_000_000.0},
    entries.read_mixtral,
    entries.write_mixtral,
    TensorNames(block="block_sparse_moe", projections=("w1", "w3", "w2")),
  ),
  "deepseek_v2": Family(
    "DeepseekV2ForCausalLM",
    _DEEPSEEK_KEYS,
    {"qk_norm": "none", "norm_topk_prob": False, "rope_interleave": True, "group_score": "max"},
    entries.read_deepseek_v2,
    entries.write_deepseek_v2,
    TensorNames(shared="shared_experts"),
    # Public implementations of norm_topk_prob disagree about the scaling factor, and no published V2 model uses it.
    (
      ("norm_topk_prob", (False, None)),
      ("topk_method", ("greedy", "group_limited_greedy", None)),
      ("scoring_func", ("softmax", None)),
      ("moe_layer_freq", (1, None)),
      ("mlp_bias", (False, None)),
    ),
  ),
  "deepseek_v3": Family(
    "DeepseekV3ForCausalLM",
    _DEEPSEEK_KEYS
    | {
      "num_experts": ("n_routed_experts", 256),
      "num_experts_per_tok": ("num_experts_per_tok", 8),
      "moe_intermediate_size": ("moe_intermediate_size", 2048),
      "intermediate_size": ("intermediate_size", 18432),
      "n_group": ("n_group", 8),
      "topk_group": ("topk_group", 4),
      "routed_scaling_factor": ("routed_scaling_factor", 2.5),
      "norm_topk_prob": ("norm_topk_prob", True),
      "rope_interleave": ("rope_interleave", True),
    },
    {"qk_norm": "none", "scoring_func": "sigmoid", "router_bias": True, "group_score": "top2"},
    entries.read_deepseek_v3,
    entries.write_deepseek_v3,
    TensorNames(shared="shared_experts"),
    (("topk_method", ("noaux_tc", None)), ("scoring_func", ("sigmoid", None)), ("moe_layer_freq", (1, None))),
  ),
  "gpt_oss": Family(
    "GptOssForCausalLM",
    _SIZES
    | {
      "vocab_size": ("vocab_size", 201088),
      "hidden_size": ("hidden_size", 2880),
      "num_hidden_layers": ("num_hidden_layers", 36),
      "num_attention_heads": ("num_attention_heads", 64),
      "rms_norm_eps": ("rms_norm_eps", 1e-5),
      "num_experts": ("num_local_experts", 128),
      "num_experts_per_tok": ("num_experts_per_tok", 4),
      "moe_intermediate_size": ("intermediate_size", 2880),
      "swiglu_limit": ("swiglu_limit", 7.0),
    },
    {
      "qk_norm": "none",
      "norm_topk_prob": True,
      "attention_sinks": True,
      "router_logit_bias": True,
      "expert_bias": True,
      "rope_theta": 150_000.0,
    },
    entries.read_gpt_oss,
    entries.write_gpt_oss,
    TensorNames(router="router", fused=True),
    (("swiglu_alpha", (1.702, None)),),
  ),
}
