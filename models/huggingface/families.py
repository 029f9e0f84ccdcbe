"""The public families: how the entries of their `config.json` belong to the fields of `TransformerConfig`.

A family is the entries it has in common with others under other names, the fields it fixes, and the few lines that
really are its own. What router shift compares (its "router probability"), per family:

| family | router probability | chosen by | weight of a chosen expert |
|---|---|---|---|
| qwen3_moe, qwen2_moe, olmoe | softmax over all experts | it | it; over the chosen ones' sum if `norm_topk_prob` |
| mixtral | softmax over all experts | it | always divided by the sum |
| gpt_oss | softmax over all experts, of logits with a bias | it | always divided by the sum (softmax of the chosen) |
| deepseek_v2 | softmax over all experts | it, in the best groups | it, times `routed_scaling_factor` |
| deepseek_v3 | sigmoid of each expert | it plus a bias, in the best groups | it, divided by the sum, times the factor |
| qwen2, qwen3 | 1: one expert, no router | - | 1 |
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from models.config import TransformerConfig


class Names(NamedTuple):
  """What a family calls the parts of a layer in a checkpoint."""

  block: str = "mlp"
  router: str = "gate"
  router_bias: str = "gate.e_score_correction_bias"
  shared: str = "shared_expert"
  projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
  fused: bool = False  # gpt-oss: all experts of a layer in one tensor, gate and up in alternating columns


@dataclasses.dataclass(frozen=True)
class Family:
  """How one family's `config.json` is read and written.

  Attributes:
    architecture: the class that transformers loads it with.
    keys: our field -> (its key, what transformers takes when it is left out).
    fixed: fields of ours that have one value in this family.
    read: (hf, fields, problems) -> sets the fields that need more than a rename.
    write: config -> the entries behind `read`, and those that transformers must not guess.
    only: (key, values this model has); None stands for a key that is left out.
  """

  architecture: str
  keys: Mapping[str, tuple[str, Any]]
  fixed: Mapping[str, Any]
  read: Callable[[Mapping[str, Any], dict[str, Any], list[str]], None]
  write: Callable[[TransformerConfig], dict[str, Any]]
  names: Names = dataclasses.field(default_factory=Names)
  only: Sequence[tuple[str, tuple[Any, ...]]] = ()


def either(hf: Mapping[str, Any], first: str, second: str, default: Any, problems: list[str]) -> Any:
  """The value of a key that has two spellings."""
  given = [hf[key] for key in (first, second) if hf.get(key) is not None]
  if len(given) == 2 and given[0] != given[1]:
    problems.append(f"{first} is {given[0]!r} but {second} is {given[1]!r}, supported: one value")
  return given[0] if given else default


# What several families share.

_SIZES = {
  "vocab_size": ("vocab_size", 151936),
  "hidden_size": ("hidden_size", 2048),
  "num_hidden_layers": ("num_hidden_layers", 24),
  "num_attention_heads": ("num_attention_heads", 32),
  "rms_norm_eps": ("rms_norm_eps", 1e-6),
}
_SPARSE_LAYERS = {"decoder_sparse_step": ("decoder_sparse_step", 1)}


def _heads(hf: Mapping[str, Any], fields: dict[str, Any], shared: int = 0, head_dim: int = 0) -> None:
  """num_key_value_heads and head_dim. A default of 0, and null in the file, follow from the other sizes."""
  fields["num_key_value_heads"] = hf.get("num_key_value_heads", shared) or fields["num_attention_heads"]
  fields["head_dim"] = hf.get("head_dim") or head_dim or fields["hidden_size"] // fields["num_attention_heads"]


def _write_heads(c: TransformerConfig) -> dict[str, Any]:
  return {"num_key_value_heads": c.num_key_value_heads, "head_dim": c.head_dim}


def _one_expert(hf: Mapping[str, Any], fields: dict[str, Any], default_width: int) -> None:
  fields |= {"num_experts": 1, "num_experts_per_tok": 1, "norm_topk_prob": True}
  fields["moe_intermediate_size"] = hf.get("intermediate_size") or default_width


def _window(hf: Mapping[str, Any], fields: dict[str, Any], default: int | None, slides: Callable[[int], bool]) -> None:
  """Which layers see a window only: `layer_types` where the file has it, else the family's rule."""
  kinds = hf.get("layer_types")
  layers = range(fields["num_hidden_layers"])
  sliding = [i for i in layers if (kinds[i] == "sliding_attention" if kinds else slides(i))]
  fields["sliding_layers"] = tuple(sliding)
  fields["sliding_window"] = (hf.get("sliding_window") or default) if sliding else None


def _write_window(c: TransformerConfig, *, kinds: bool = True) -> dict[str, Any]:
  hf: dict[str, Any] = {"sliding_window": c.sliding_window, "use_sliding_window": bool(c.sliding_layers)}
  if kinds:
    words = ("full_attention", "sliding_attention")
    hf["layer_types"] = [words[i in c.sliding_layers] for i in range(c.num_hidden_layers)]
  return hf


def _attention_biases(hf: Mapping[str, Any], fields: dict[str, Any], default: bool = False) -> None:
  given = hf.get("attention_bias")
  fields["qkv_bias"] = fields["attention_out_bias"] = default if given is None else given


# The families.


def _read_qwen3_moe(hf, fields, problems):
  _heads(hf, fields, 4)
  _attention_biases(hf, fields)
  _window(hf, fields, 4096, lambda _: bool(hf.get("use_sliding_window")))
  fields["num_experts"] = either(hf, "num_experts", "num_local_experts", 128, problems)
  fields["mlp_only_layers"] = tuple(hf.get("mlp_only_layers") or ())


def _write_qwen3_moe(c):
  return _write_heads(c) | _write_window(c, kinds=False) | _write_experts(c) | {"attention_bias": c.qkv_bias}


def _write_experts(c):
  return {"num_experts": c.num_experts, "mlp_only_layers": list(c.mlp_only_layers)}


def _read_qwen2_moe(hf, fields, problems):
  _heads(hf, fields, 16)
  slides = bool(hf.get("use_sliding_window"))
  limit = hf.get("max_window_layers", 28)
  _window(hf, fields, 4096, lambda i: slides and i % 2 == 0 and i < limit)
  fields["num_experts"] = either(hf, "num_experts", "num_local_experts", 60, problems)
  fields["mlp_only_layers"] = tuple(hf.get("mlp_only_layers") or ())


def _write_qwen2_moe(c):
  return _write_heads(c) | _write_window(c) | _write_experts(c)


def _read_qwen3(hf, fields, problems):
  _heads(hf, fields, 32, head_dim=128)
  _attention_biases(hf, fields)
  _dense_window(hf, fields)
  _one_expert(hf, fields, 22016)


def _read_qwen2(hf, fields, problems):
  _heads(hf, fields, 32)
  _dense_window(hf, fields)
  _one_expert(hf, fields, 22016)


def _dense_window(hf, fields):
  slides, first = bool(hf.get("use_sliding_window")), hf.get("max_window_layers", 28)
  _window(hf, fields, 4096, lambda i: slides and i >= first)


def _write_dense(c):
  return _write_heads(c) | _write_window(c) | {"intermediate_size": c.moe_intermediate_size}


def _read_olmoe(hf, fields, problems):
  _heads(hf, fields)
  _attention_biases(hf, fields)
  fields["num_experts"] = either(hf, "num_experts", "num_local_experts", 64, problems)


def _read_mixtral(hf, fields, problems):
  _heads(hf, fields, 8)
  fields["sliding_window"] = hf.get("sliding_window")
  fields["sliding_layers"] = tuple(range(fields["num_hidden_layers"])) if hf.get("sliding_window") else ()


def _read_deepseek(hf, fields, dense_layers, shared_experts):
  fields["num_key_value_heads"] = fields["num_attention_heads"]
  fields["head_dim"] = fields["qk_rope_head_dim"]
  fields["q_lora_rank"] = hf.get("q_lora_rank", 1536)
  _attention_biases(hf, fields)
  fields["mlp_only_layers"] = tuple(range(hf.get("first_k_dense_replace", dense_layers)))
  shared_experts = hf.get("n_shared_experts", shared_experts)
  fields["shared_expert_intermediate_size"] = shared_experts * fields["moe_intermediate_size"]
  fields["n_group"], fields["topk_group"] = fields["n_group"] or 1, fields["topk_group"] or 1


def _read_deepseek_v2(hf, fields, problems):
  _read_deepseek(hf, fields, 0, 2)
  if (hf.get("topk_method") or "greedy") == "greedy":
    fields["n_group"] = fields["topk_group"] = 1


def _read_deepseek_v3(hf, fields, problems):
  _read_deepseek(hf, fields, 3, 1)


def _write_deepseek(c):
  dense = len(c.mlp_only_layers)
  hf = {"attention_bias": c.qkv_bias, "num_key_value_heads": c.num_key_value_heads, "q_lora_rank": c.q_lora_rank}
  return hf | {
    "first_k_dense_replace": dense,
    "n_shared_experts": c.shared_expert_intermediate_size // c.moe_intermediate_size,
    "moe_layer_freq": 1,
    "num_nextn_predict_layers": 0,
    "scoring_func": c.scoring_func,
  }


def _write_deepseek_v2(c):
  return _write_deepseek(c) | {"topk_method": "greedy" if c.n_group == 1 else "group_limited_greedy"}


def _write_deepseek_v3(c):
  return _write_deepseek(c) | {"topk_method": "noaux_tc", "rope_interleave": c.rope_interleave}


def _read_gpt_oss(hf, fields, problems):
  _heads(hf, fields, 8, head_dim=64)
  _attention_biases(hf, fields, default=True)
  _window(hf, fields, 128, lambda i: i % 2 == 0)
  if not hf.get("rope_scaling") and not hf.get("rope_parameters"):
    problems.append("rope_scaling is left out, supported: the published YaRN settings, written out")


def _write_gpt_oss(c):
  # transformers wants a window even where no layer slides.
  window = _write_window(c) | {"sliding_window": c.sliding_window or 128}
  return _write_heads(c) | window | {"attention_bias": c.qkv_bias, "swiglu_alpha": 1.702}


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
    _read_qwen3_moe,
    _write_qwen3_moe,
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
    _read_qwen2_moe,
    _write_qwen2_moe,
  ),
  "qwen3": Family(
    "Qwen3ForCausalLM",
    _SIZES | {"hidden_size": ("hidden_size", 4096), "num_hidden_layers": ("num_hidden_layers", 32)},
    {"qk_norm": "head"},
    _read_qwen3,
    lambda c: _write_dense(c) | {"attention_bias": c.qkv_bias},
  ),
  "qwen2": Family(
    "Qwen2ForCausalLM",
    _SIZES | {"hidden_size": ("hidden_size", 4096), "num_hidden_layers": ("num_hidden_layers", 32)},
    {"qk_norm": "none", "qkv_bias": True},
    _read_qwen2,
    _write_dense,
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
    _read_olmoe,
    lambda c: _write_heads(c) | {"num_experts": c.num_experts, "attention_bias": c.qkv_bias},
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
    _read_mixtral,
    lambda c: _write_heads(c) | {"sliding_window": c.sliding_window},
    Names(block="block_sparse_moe", projections=("w1", "w3", "w2")),
  ),
  "deepseek_v2": Family(
    "DeepseekV2ForCausalLM",
    _DEEPSEEK_KEYS,
    {"qk_norm": "none", "norm_topk_prob": False, "rope_interleave": True, "group_score": "max"},
    _read_deepseek_v2,
    _write_deepseek_v2,
    Names(shared="shared_experts"),
    # Public implementations of norm_topk_prob disagree about the scaling factor; no published V2 model has it.
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
    _read_deepseek_v3,
    _write_deepseek_v3,
    Names(shared="shared_experts"),
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
    _read_gpt_oss,
    _write_gpt_oss,
    Names(router="router", fused=True),
    (("swiglu_alpha", (1.702, None)),),
  ),
}
