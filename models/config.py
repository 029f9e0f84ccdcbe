"""Configuration of a decoder, with the field names of Hugging Face's `config.json`."""

import dataclasses
from typing import Any

# Unrolled layers are faster on CPUs (0.91 of the time of a train step of width 256), but compile time grows with their
# number: 9.7 s instead of 7.2 s for 4 layers. In narrow models they do not pay: at width 64, scoring took 1.15 of the
# time
# (BENCHMARKS.md).
UNROLLED_LAYERS, UNROLLED_WIDTH = 8, 128


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """Scaling of rotary frequencies for contexts longer than those of pretraining.

  Attributes:
    rope_type: "default" (none), "linear" (positions divided by factor) or "yarn" (arXiv 2309.00071).
    factor: new context length divided by the original one.
    original_max_position_embeddings: context length of pretraining in tokens; yarn only.
    beta_fast, beta_slow: rotations within the original context. Frequencies with more than beta_fast rotations stay
      unchanged, frequencies with fewer than beta_slow are divided by factor; yarn only.
    truncate: round the bounds between them to whole pairs.
    attention_factor: multiplier of cosines and sines; None computes it from factor, mscale and mscale_all_dim.
    mscale, mscale_all_dim: DeepSeek's weights of log(factor) in attention_factor and in the scale of attention scores.
  """

  rope_type: str = "default"
  factor: float = 1.0
  original_max_position_embeddings: int = 0
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  truncate: bool = True
  attention_factor: float | None = None
  mscale: float | None = None
  mscale_all_dim: float | None = None

  def __post_init__(self):
    if self.rope_type not in ("default", "linear", "yarn"):
      raise ValueError(f"rope_type is {self.rope_type!r}; want 'default', 'linear' or 'yarn'.")
    if self.rope_type == "yarn" and self.original_max_position_embeddings < 1:
      raise ValueError(
        f"original_max_position_embeddings is {self.original_max_position_embeddings} with rope_type 'yarn'; set it to "
        "the context length of pretraining, in tokens."
      )


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """Low-rank updates beside matrices (arXiv 2106.09685): W + alpha / rank * A B, with B initialised to zero.

  Attributes:
    rank: 0 switches LoRA off.
    alpha: scale of the update, times rank.
    targets: regular expressions that are searched in the paths of matrices ("layers_0/attention/query",
      "layers_0/moe/up"): attention/{query,key,value,out}, moe/{gate,up,down} (the experts), moe/router, moe/shared/*,
      mlp/*, and with latent attention query_down, latent and key_value.
  """

  rank: int = 0
  alpha: float = 16.0
  targets: tuple[str, ...] = ("attention/",)


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
  """A mixture-of-experts decoder of one of the public families. Sizes are counts.

  Field names are those of transformers (`Qwen3MoeConfig`, `DeepseekV3Config`, `GptOssConfig`); fields marked "ours" do
  not exist there. `models.huggingface.config_json` reads a `config.json`; `models.huggingface.families` has the values
  that a family fixes.

  Attributes:
    model_type: the family, a key of `models.huggingface.families.FAMILIES`: the checkpoint format it is loaded from and
      saved in.
    num_experts: 1 is a dense model: one expert without a router, applied to every token with weight 1.
    mlp_only_layers, decoder_sparse_step: layer i has experts if it is not listed and (i + 1) is a multiple of the step;
      every other layer has one dense MLP of width `intermediate_size`.

    head_dim: width of an attention head; with latent attention, of its rotary part.
    qk_norm: RMS norm of queries and keys: "none", over each "head", or over the whole "projection" (ours).
    qkv_bias, attention_out_bias: biases of the attention projections (ours).
    clip_qkv: bound on the absolute value of queries, keys and values; None is off.
    sliding_window, sliding_layers: the listed layers attend to this many tokens, the query's own included
      (sliding_layers is ours).
    attention_sinks: a learnt score per head that enters the softmax and has no value vector (ours).
    kv_lora_rank: width of the latent from which keys and values are projected; 0 is plain attention. q_lora_rank: the
      same for queries; None projects them from the hidden state. qk_nope_head_dim, qk_rope_head_dim, v_head_dim: widths
      of the parts of a head with latent attention.
    rope_interleave: rotary pairs are adjacent entries; otherwise entries of the two halves of a head.

    scoring_func: router scores are the "softmax" of the logits over all experts, or the "sigmoid" of each logit.
    norm_topk_prob: divide the scores of the selected experts by their sum.
    routed_scaling_factor: multiplier of the gates, after norm_topk_prob.
    router_bias: a bias on the selection of experts that does not enter their gates (ours; DeepSeek's
      e_score_correction_bias).
    router_logit_bias: a bias on the router logits (ours).
    n_group, topk_group: experts are selected from the best topk_group of n_group groups. group_score: score of a group,
      the "max" of its experts' or the sum of the two largest, "top2" (ours).
    shared_expert_intermediate_size: width of an expert that is applied to every token; 0 is none. shared_expert_gate:
      its output is multiplied by a sigmoid gate (ours).
    expert_bias: biases of the routed experts' projections (ours).
    swiglu_limit: clamp of the inputs of the experts' SwiGLU, as in gpt-oss; None is the plain SwiGLU.

    dtype: of activations and matrix products, "float32" or "bfloat16"; parameters and the router stay float32.
    cache_dtype: of the key/value cache; "" is dtype (ours).
    lora: trainable low-rank updates. Training must freeze the matrices themselves (ours).
    remat: recompute each layer in the backward pass instead of storing its activations (ours).
    scan_layers: True runs the layers of the training forward in a loop, so that one layer is compiled; False unrolls
      them, which compiles longer and takes 0.91 of the time of a train step on CPUs. None: `build_policy` chooses for
      the platform of the mesh, see `scans_layers` (ours).
    expert_backend: how the experts are computed, see `models.layers.experts.run_experts` (ours).
  """

  vocab_size: int
  hidden_size: int
  num_hidden_layers: int
  num_attention_heads: int
  num_key_value_heads: int
  head_dim: int
  num_experts: int
  num_experts_per_tok: int
  moe_intermediate_size: int
  model_type: str = "qwen3_moe"
  intermediate_size: int = 0
  mlp_only_layers: tuple[int, ...] = ()
  decoder_sparse_step: int = 1

  qk_norm: str = "head"
  qkv_bias: bool = False
  attention_out_bias: bool = False
  clip_qkv: float | None = None
  sliding_window: int | None = None
  sliding_layers: tuple[int, ...] = ()
  attention_sinks: bool = False
  kv_lora_rank: int = 0
  q_lora_rank: int | None = None
  qk_nope_head_dim: int = 0
  qk_rope_head_dim: int = 0
  v_head_dim: int = 0
  rope_theta: float = 1_000_000.0
  rope_scaling: RopeScaling = RopeScaling()
  rope_interleave: bool = False

  scoring_func: str = "softmax"
  norm_topk_prob: bool = True
  routed_scaling_factor: float = 1.0
  router_bias: bool = False
  router_logit_bias: bool = False
  n_group: int = 1
  topk_group: int = 1
  group_score: str = "max"
  shared_expert_intermediate_size: int = 0
  shared_expert_gate: bool = False
  expert_bias: bool = False
  swiglu_limit: float | None = None

  rms_norm_eps: float = 1e-6
  tie_word_embeddings: bool = False
  lora: LoraConfig = LoraConfig()
  dtype: str = "float32"
  cache_dtype: str = ""
  remat: bool = False
  scan_layers: bool | None = None
  expert_backend: str = "auto"

  def __post_init__(self):
    for name, allowed in (
      ("dtype", ("float32", "bfloat16")),
      ("cache_dtype", ("", "float32", "bfloat16")),
      ("qk_norm", ("none", "head", "projection")),
      ("scoring_func", ("softmax", "sigmoid")),
      ("group_score", ("max", "top2")),
    ):
      if getattr(self, name) not in allowed:
        raise ValueError(f"{name} is {getattr(self, name)!r}; want {' or '.join(map(repr, allowed))}.")
    if self.num_attention_heads % self.num_key_value_heads:
      raise ValueError(
        f"num_attention_heads is {self.num_attention_heads} and num_key_value_heads is {self.num_key_value_heads}; "
        "want num_attention_heads to be a multiple of num_key_value_heads."
      )
    if not 1 <= self.num_experts_per_tok <= self.num_experts:
      raise ValueError(
        f"num_experts_per_tok is {self.num_experts_per_tok}; want 1 to num_experts ({self.num_experts})."
      )
    if self.head_dim % 2:
      raise ValueError(f"head_dim is {self.head_dim}; want an even number, because rotary embeddings rotate pairs.")
    if self.kv_lora_rank and (self.head_dim != self.qk_rope_head_dim or not self.v_head_dim):
      raise ValueError(
        f"with kv_lora_rank, head_dim ({self.head_dim}) must equal qk_rope_head_dim ({self.qk_rope_head_dim}) and "
        f"v_head_dim ({self.v_head_dim}) must be set."
      )
    self._check_groups()
    if self.sliding_layers and not (self.sliding_window and self.sliding_window > 0):
      raise ValueError(
        f"sliding_window is {self.sliding_window} with sliding_layers {self.sliding_layers}; want a number of tokens."
      )
    layers = range(self.num_hidden_layers)
    if not all(self.is_moe_layer(i) for i in layers) and self.intermediate_size < 1:
      raise ValueError(
        f"intermediate_size is {self.intermediate_size}, but some layers are dense; set the width of the dense MLP."
      )
    if not any(self.is_moe_layer(i) for i in layers):
      raise ValueError(
        f"mlp_only_layers is {self.mlp_only_layers} and decoder_sparse_step is {self.decoder_sparse_step}, so no layer "
        "has experts; leave at least one layer with experts."
      )

  def _check_groups(self):
    if self.n_group < 1 or self.num_experts % self.n_group or not 1 <= self.topk_group <= self.n_group:
      raise ValueError(
        f"n_group is {self.n_group} and topk_group is {self.topk_group} for {self.num_experts} experts; want groups of "
        "equal size and topk_group from 1 to n_group."
      )
    size = self.num_experts // self.n_group
    if self.num_experts_per_tok > self.topk_group * size or (
      self.n_group > 1 and self.group_score == "top2" and size < 2
    ):
      raise ValueError(
        f"{self.topk_group} groups of {size} experts are too few for num_experts_per_tok {self.num_experts_per_tok} "
        f"and group_score {self.group_score!r}; select from more groups, or make the groups larger."
      )

  def is_moe_layer(self, layer: int) -> bool:
    return layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0

  def window(self, layer: int) -> int | None:
    """Length of a layer's sliding window in tokens, the query's own included; None if it attends to all."""
    return self.sliding_window if layer in self.sliding_layers else None

  @property
  def is_dense(self) -> bool:
    """Whether the model has one expert and no router."""
    return self.num_experts == 1

  @property
  def qk_head_dim(self) -> int:
    """Width of a query and a key."""
    return self.qk_nope_head_dim + self.qk_rope_head_dim if self.kv_lora_rank else self.head_dim

  @property
  def segments(self) -> tuple[tuple[bool, int], ...]:
    """Runs of consecutive layers of the same kind, (has experts, length), in order; each run is one scan."""
    runs: list[tuple[bool, int]] = []
    for layer in range(self.num_hidden_layers):
      moe = self.is_moe_layer(layer)
      if runs and runs[-1][0] == moe:
        runs[-1] = (moe, runs[-1][1] + 1)
      else:
        runs.append((moe, 1))
    return tuple(runs)

  @property
  def num_moe_layers(self) -> int:
    return sum(length for moe, length in self.segments if moe)

  def scans_layers(self, platform: str) -> bool:
    """`scan_layers`, with None resolved for a platform of JAX.

    CPUs unroll up to `UNROLLED_LAYERS` layers of width `UNROLLED_WIDTH` or more. Not with `remat`: XLA on CPUs saves
    memory by recomputation in a loop only.
    """
    if self.scan_layers is not None:
      return self.scan_layers
    unrolls = self.num_hidden_layers <= UNROLLED_LAYERS and self.hidden_size >= UNROLLED_WIDTH and not self.remat
    return platform != "cpu" or not unrolls


def tiny_moe(vocab_size: int, **changes: Any) -> TransformerConfig:
  """A Qwen3-style mixture of experts that trains on a laptop CPU: 4 layers of width 64, 8 experts, 2 of them active.

  Args:
    changes: fields of `TransformerConfig` that differ from it.
  """
  fields = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "rope_theta": 10_000.0,
  }
  return TransformerConfig(vocab_size, **{**fields, **changes})
