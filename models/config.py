"""What a model is made of, in the names Hugging Face's `config.json` uses."""

import dataclasses
from typing import Any

# Unrolled layers are faster on CPUs, but their compile time grows with their number: 9.7 s instead of 7.2 s for the
# train step of 4 layers.
UNROLLED_LAYERS = 8


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """How rotary frequencies are stretched for contexts longer than the first training's.

  Attributes:
    rope_type: "default" (not at all), "linear" (positions divided by factor) or "yarn" (2309.00071).
    factor: new over original context length.
    original_max_position_embeddings: yarn's, tokens. beta_fast, beta_slow: turns within the original context above
      which a frequency stays, and below which it is divided by factor. truncate: round the bounds to whole pairs.
    attention_factor: what cosines and sines are multiplied by; None: computed from factor, mscale and mscale_all_dim.
    mscale, mscale_all_dim: DeepSeek's weights of log(factor) in attention_factor and in the scale of the scores.
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
      raise ValueError("yarn needs original_max_position_embeddings, the context length of the first training.")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """Low-rank updates beside matrices (arXiv 2106.09685): W + alpha / rank * A B, with B zero at first.

  Attributes:
    rank: 0 is off. alpha: the update's scale times rank.
    targets: regular expressions, searched in the paths of matrices ("layers_0/attention/query", "layers_0/moe/up"):
      attention/{query,key,value,out}, moe/{gate,up,down} (the experts), moe/router, moe/shared/*, mlp/*, and with
      latent attention query_down, latent and key_value.
  """

  rank: int = 0
  alpha: float = 16.0
  targets: tuple[str, ...] = ("attention/",)


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
  """A mixture-of-experts decoder of one of the public families. Sizes are counts.

  Names are transformers' (`Qwen3MoeConfig`, `DeepseekV3Config`, `GptOssConfig`), those marked "ours" apart.
  `models.huggingface.config_json` reads a `config.json` into one; `models.huggingface.families` says what each family
  fixes.

  Attributes:
    model_type: the family, a key of `models.huggingface.families.FAMILIES`: which checkpoints it is read from and
      saved as.
    num_experts: 1 is a dense model: one expert without a router, which every token takes with weight 1.
    mlp_only_layers, decoder_sparse_step: layer i holds experts if it is not listed and (i + 1) is a multiple of the
      step; every other layer holds one dense MLP of width `intermediate_size`.

    head_dim: width of an attention head; with latent attention, of its rotary part.
    qk_norm: RMS norm of queries and keys, "none", over each "head", or over the whole "projection" (ours).
    qkv_bias, attention_out_bias: biases of the attention's projections (ours).
    clip_qkv: bound on the size of queries, keys and values; None is off.
    sliding_window, sliding_layers: these layers see only so many tokens, the query's own included (the second ours).
    attention_sinks: a learnt score per head that takes part in the softmax and carries no value (ours).
    kv_lora_rank: width of the latent that keys and values are made of; 0 is plain attention. q_lora_rank: the same of
      queries, None for none. qk_nope_head_dim, qk_rope_head_dim, v_head_dim: of a head, with latent attention.
    rope_interleave: rotary pairs are neighbours; else the two halves of a head.

    scoring_func: what router logits become, "softmax" over all experts or "sigmoid" of each.
    norm_topk_prob: divide the chosen experts' scores by their sum.
    routed_scaling_factor: what the chosen experts' weights are multiplied by after that.
    router_bias: a bias on the choice of experts, not on their weights (ours; DeepSeek's e_score_correction_bias).
    router_logit_bias: a bias on the router's logits (ours).
    n_group, topk_group: experts are chosen from the best topk_group of n_group groups. group_score: a group counts
      as its "max" or as the sum of its best two, "top2" (ours).
    shared_expert_intermediate_size: width of an expert that every token takes; 0 is none. shared_expert_gate: it is
      weighted by a sigmoid (ours).
    expert_bias: biases of the routed experts' projections (ours).
    swiglu_limit: bound on what enters the experts' SwiGLU, gpt-oss's; None is the plain SwiGLU.

    dtype: of activations and matrix products ("float32" or "bfloat16"); parameters and the router stay float32.
    cache_dtype: of the keys and values that decoding remembers; "" is dtype (ours).
    lora: trainable low-rank updates; the matrices themselves are frozen by whoever trains (ours).
    remat: recompute each layer in the backward pass instead of keeping its activations (ours).
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
        f"num_attention_heads is {self.num_attention_heads} and num_key_value_heads {self.num_key_value_heads}; "
        "each key/value head serves a whole number of query heads, so make the first a multiple of the second."
      )
    if not 1 <= self.num_experts_per_tok <= self.num_experts:
      raise ValueError(
        f"num_experts_per_tok is {self.num_experts_per_tok}; want 1 to num_experts ({self.num_experts})."
      )
    if self.head_dim % 2:
      raise ValueError(f"head_dim is {self.head_dim}; rotary embeddings turn pairs, so make it even.")
    if self.kv_lora_rank and (self.head_dim != self.qk_rope_head_dim or not self.v_head_dim):
      raise ValueError(
        f"with kv_lora_rank, head_dim ({self.head_dim}) must equal qk_rope_head_dim ({self.qk_rope_head_dim}) and "
        f"v_head_dim ({self.v_head_dim}) must be set."
      )
    self._check_groups()
    if self.sliding_layers and not (self.sliding_window and self.sliding_window > 0):
      raise ValueError("sliding_layers are given but no sliding_window; give the window a length in tokens.")
    layers = range(self.num_hidden_layers)
    if not all(self.is_moe_layer(i) for i in layers) and self.intermediate_size < 1:
      raise ValueError("some layers are dense but intermediate_size is not set; give the dense MLP a width.")
    if not any(self.is_moe_layer(i) for i in layers):
      raise ValueError(
        "no layer holds experts, so there is no router to watch; check mlp_only_layers and decoder_sparse_step."
      )

  def _check_groups(self):
    if self.n_group < 1 or self.num_experts % self.n_group or not 1 <= self.topk_group <= self.n_group:
      raise ValueError(
        f"n_group is {self.n_group} and topk_group {self.topk_group} for {self.num_experts} experts; want groups of "
        "equal size and 1 to n_group of them chosen."
      )
    size = self.num_experts // self.n_group
    if self.num_experts_per_tok > self.topk_group * size or (
      self.n_group > 1 and self.group_score == "top2" and size < 2
    ):
      raise ValueError(
        f"{self.topk_group} groups of {size} experts are too few for num_experts_per_tok {self.num_experts_per_tok} "
        f"and group_score {self.group_score!r}."
      )

  def is_moe_layer(self, layer: int) -> bool:
    return layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0

  def window(self, layer: int) -> int | None:
    """Tokens that a layer's queries see, their own included; None for all."""
    return self.sliding_window if layer in self.sliding_layers else None

  @property
  def is_dense(self) -> bool:
    """One expert and no router: a control without routing."""
    return self.num_experts == 1

  @property
  def qk_head_dim(self) -> int:
    """Width of a query and a key."""
    return self.qk_nope_head_dim + self.qk_rope_head_dim if self.kv_lora_rank else self.head_dim

  @property
  def segments(self) -> tuple[tuple[bool, int], ...]:
    """Runs of equal layers, (holds experts, length), in order: each run is one scan."""
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
    """`scan_layers`, with None resolved for a platform of JAX: CPUs unroll up to `UNROLLED_LAYERS` layers.

    Not with `remat`: XLA on CPUs saves memory by recomputation in a loop only.
    """
    if self.scan_layers is not None:
      return self.scan_layers
    return platform != "cpu" or self.remat or self.num_hidden_layers > UNROLLED_LAYERS


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
