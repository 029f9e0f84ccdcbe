"""How families read and write the entries of `config.json` that need more than another name.

A reader (hf, fields, problems) sets `fields` of `TransformerConfig` from the entries `hf`, and appends to `problems`
the entries that the model does not support. A writer returns the entries that its reader reads, and entries for which
transformers has another default.
"""

from collections.abc import Callable, Mapping
from typing import Any

from models.config import TransformerConfig

Entries = Mapping[str, Any]  # a parsed config.json
Fields = dict[str, Any]  # fields of TransformerConfig
Problems = list[str]


def read_alias(hf: Entries, first: str, second: str, default: Any, problems: Problems) -> Any:
  """The value of an entry with two spellings; a problem if both are given and differ."""
  values = [hf[key] for key in (first, second) if hf.get(key) is not None]
  if len(values) == 2 and values[0] != values[1]:
    problems.append(f"{first} is {values[0]!r} but {second} is {values[1]!r}, supported: one value")
  return values[0] if values else default


# Entries that several families share.


def _read_heads(hf: Entries, fields: Fields, kv_heads: int = 0, head_dim: int = 0) -> None:
  """num_key_value_heads and head_dim. Defaults of 0, and null entries, are derived from the other sizes."""
  fields["num_key_value_heads"] = hf.get("num_key_value_heads", kv_heads) or fields["num_attention_heads"]
  fields["head_dim"] = hf.get("head_dim") or head_dim or fields["hidden_size"] // fields["num_attention_heads"]


def _write_heads(c: TransformerConfig) -> dict[str, Any]:
  return {"num_key_value_heads": c.num_key_value_heads, "head_dim": c.head_dim}


def _read_attention_biases(hf: Entries, fields: Fields, default: bool = False) -> None:
  value = hf.get("attention_bias")
  fields["qkv_bias"] = fields["attention_out_bias"] = default if value is None else value


def _read_window(hf: Entries, fields: Fields, default: int | None, is_sliding: Callable[[int], bool]) -> None:
  """Layers with a sliding window: from `layer_types` if the file has it, else by the rule of the family."""
  kinds = hf.get("layer_types")
  layers = range(fields["num_hidden_layers"])
  sliding = [i for i in layers if (kinds[i] == "sliding_attention" if kinds else is_sliding(i))]
  fields["sliding_layers"] = tuple(sliding)
  fields["sliding_window"] = (hf.get("sliding_window") or default) if sliding else None


def _write_window(c: TransformerConfig, *, layer_types: bool = True) -> dict[str, Any]:
  hf: dict[str, Any] = {"sliding_window": c.sliding_window, "use_sliding_window": bool(c.sliding_layers)}
  if layer_types:
    kinds = ("full_attention", "sliding_attention")
    hf["layer_types"] = [kinds[i in c.sliding_layers] for i in range(c.num_hidden_layers)]
  return hf


def _read_experts(hf: Entries, fields: Fields, default: int, problems: Problems) -> None:
  fields["num_experts"] = read_alias(hf, "num_experts", "num_local_experts", default, problems)
  fields["mlp_only_layers"] = tuple(hf.get("mlp_only_layers") or ())


def _write_experts(c: TransformerConfig) -> dict[str, Any]:
  return {"num_experts": c.num_experts, "mlp_only_layers": list(c.mlp_only_layers)}


# Dense families: one expert without a router.


def _read_dense(hf: Entries, fields: Fields) -> None:
  sliding, first = bool(hf.get("use_sliding_window")), hf.get("max_window_layers", 28)
  _read_window(hf, fields, 4096, lambda i: sliding and i >= first)
  fields |= {"num_experts": 1, "num_experts_per_tok": 1, "norm_topk_prob": True}
  fields["moe_intermediate_size"] = hf.get("intermediate_size") or 22016


def read_qwen2(hf: Entries, fields: Fields, problems: Problems) -> None:
  _read_heads(hf, fields, 32)
  _read_dense(hf, fields)


def write_qwen2(c: TransformerConfig) -> dict[str, Any]:
  return _write_heads(c) | _write_window(c) | {"intermediate_size": c.moe_intermediate_size}


def read_qwen3(hf: Entries, fields: Fields, problems: Problems) -> None:
  _read_heads(hf, fields, 32, head_dim=128)
  _read_attention_biases(hf, fields)
  _read_dense(hf, fields)


def write_qwen3(c: TransformerConfig) -> dict[str, Any]:
  return write_qwen2(c) | {"attention_bias": c.qkv_bias}


# Mixtures of experts.


def read_qwen2_moe(hf: Entries, fields: Fields, problems: Problems) -> None:
  _read_heads(hf, fields, 16)
  sliding, limit = bool(hf.get("use_sliding_window")), hf.get("max_window_layers", 28)
  _read_window(hf, fields, 4096, lambda i: sliding and i % 2 == 0 and i < limit)
  _read_experts(hf, fields, 60, problems)


def write_qwen2_moe(c: TransformerConfig) -> dict[str, Any]:
  return _write_heads(c) | _write_window(c) | _write_experts(c)


def read_qwen3_moe(hf: Entries, fields: Fields, problems: Problems) -> None:
  _read_heads(hf, fields, 4)
  _read_attention_biases(hf, fields)
  _read_window(hf, fields, 4096, lambda _: bool(hf.get("use_sliding_window")))
  _read_experts(hf, fields, 128, problems)


def write_qwen3_moe(c: TransformerConfig) -> dict[str, Any]:
  return _write_heads(c) | _write_window(c, layer_types=False) | _write_experts(c) | {"attention_bias": c.qkv_bias}


def read_olmoe(hf: Entries, fields: Fields, problems: Problems) -> None:
  _read_heads(hf, fields)
  _read_attention_biases(hf, fields)
  fields["num_experts"] = read_alias(hf, "num_experts", "num_local_experts", 64, problems)


def write_olmoe(c: TransformerConfig) -> dict[str, Any]:
  return _write_heads(c) | {"num_experts": c.num_experts, "attention_bias": c.qkv_bias}


def read_mixtral(hf: Entries, fields: Fields, problems: Problems) -> None:
  _read_heads(hf, fields, 8)
  fields["sliding_window"] = hf.get("sliding_window")
  fields["sliding_layers"] = tuple(range(fields["num_hidden_layers"])) if hf.get("sliding_window") else ()


def write_mixtral(c: TransformerConfig) -> dict[str, Any]:
  return _write_heads(c) | {"sliding_window": c.sliding_window}


def _read_deepseek(hf: Entries, fields: Fields, dense_layers: int, shared_experts: int) -> None:
  fields["num_key_value_heads"] = fields["num_attention_heads"]
  fields["head_dim"] = fields["qk_rope_head_dim"]
  fields["q_lora_rank"] = hf.get("q_lora_rank", 1536)
  _read_attention_biases(hf, fields)
  fields["mlp_only_layers"] = tuple(range(hf.get("first_k_dense_replace", dense_layers)))
  shared_experts = hf.get("n_shared_experts", shared_experts)
  fields["shared_expert_intermediate_size"] = shared_experts * fields["moe_intermediate_size"]
  fields["n_group"], fields["topk_group"] = fields["n_group"] or 1, fields["topk_group"] or 1


def _write_deepseek(c: TransformerConfig) -> dict[str, Any]:
  return {
    "attention_bias": c.qkv_bias,
    "num_key_value_heads": c.num_key_value_heads,
    "q_lora_rank": c.q_lora_rank,
    "first_k_dense_replace": len(c.mlp_only_layers),
    "n_shared_experts": c.shared_expert_intermediate_size // c.moe_intermediate_size,
    "moe_layer_freq": 1,
    "num_nextn_predict_layers": 0,
    "scoring_func": c.scoring_func,
  }


def read_deepseek_v2(hf: Entries, fields: Fields, problems: Problems) -> None:
  _read_deepseek(hf, fields, 0, 2)
  if (hf.get("topk_method") or "greedy") == "greedy":
    fields["n_group"] = fields["topk_group"] = 1


def write_deepseek_v2(c: TransformerConfig) -> dict[str, Any]:
  return _write_deepseek(c) | {"topk_method": "greedy" if c.n_group == 1 else "group_limited_greedy"}


def read_deepseek_v3(hf: Entries, fields: Fields, problems: Problems) -> None:
  _read_deepseek(hf, fields, 3, 1)


def write_deepseek_v3(c: TransformerConfig) -> dict[str, Any]:
  return _write_deepseek(c) | {"topk_method": "noaux_tc", "rope_interleave": c.rope_interleave}


def read_gpt_oss(hf: Entries, fields: Fields, problems: Problems) -> None:
  _read_heads(hf, fields, 8, head_dim=64)
  _read_attention_biases(hf, fields, default=True)
  _read_window(hf, fields, 128, lambda i: i % 2 == 0)
  if not hf.get("rope_scaling") and not hf.get("rope_parameters"):
    problems.append("rope_scaling is left out, supported: the published YaRN settings, written out")


def write_gpt_oss(c: TransformerConfig) -> dict[str, Any]:
  # transformers requires a window even if no layer uses it.
  window = _write_window(c) | {"sliding_window": c.sliding_window or 128}
  return _write_heads(c) | window | {"attention_bias": c.qkv_bias, "swiglu_alpha": 1.702}
