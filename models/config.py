"""What a model is made of, in the names Hugging Face's `config.json` uses."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
  """A Qwen3-style decoder. Sizes are counts; names as in transformers' `Qwen3MoeConfig`, except where said.

  Attributes:
    mlp_only_layers, decoder_sparse_step: layer i holds experts if it is not listed and (i + 1) is a multiple of the
      step; every other layer holds one dense MLP of width `intermediate_size`.
    norm_topk_prob: divide the chosen experts' router probabilities by their sum.
    router_bias: a bias on the choice of experts (not on their gates) that only `Policy.add_router_bias` moves (ours).
    dtype: of activations and matrix products ("float32" or "bfloat16"); parameters and the router stay float32.
    remat: recompute each layer in the backward pass instead of keeping its activations (ours).
    expert_backend: way of running the experts, see `models.moe.run_experts` (ours).
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
  intermediate_size: int = 0
  mlp_only_layers: tuple[int, ...] = ()
  decoder_sparse_step: int = 1
  norm_topk_prob: bool = True
  router_bias: bool = False
  rope_theta: float = 1_000_000.0
  rms_norm_eps: float = 1e-6
  tie_word_embeddings: bool = False
  dtype: str = "float32"
  remat: bool = False
  expert_backend: str = "auto"

  def __post_init__(self):
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
    if self.dtype not in ("float32", "bfloat16"):
      raise ValueError(f"dtype is {self.dtype!r}; want 'float32' or 'bfloat16'.")
    if not all(self.is_moe_layer(i) for i in range(self.num_hidden_layers)) and self.intermediate_size < 1:
      raise ValueError("some layers are dense but intermediate_size is not set; give the dense MLP a width.")
    if not any(self.is_moe_layer(i) for i in range(self.num_hidden_layers)):
      raise ValueError(
        "no layer holds experts, so there is no router to watch; check mlp_only_layers and decoder_sparse_step."
      )

  def is_moe_layer(self, layer: int) -> bool:
    return layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0

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
