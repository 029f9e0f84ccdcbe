"""Floating-point operations of a model, counted from its sizes: 2 per multiply-add, matrix products only.

Counted are the K active experts, the keys that a causal query attends to, and every token once. Padding of expert
blocks, masked scores and recomputation are overhead: they are not counted and lower the share of peak.
"""

from models.config import TransformerConfig


def token_flops(config: TransformerConfig) -> int:
  """Per token, all layers, without attention scores and without the unembedding."""
  width = config.hidden_size
  heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
  attention = 2 * width * heads * config.head_dim
  experts = 2 * width * config.num_experts + 6 * width * config.moe_intermediate_size * config.num_experts_per_tok
  dense = 6 * width * config.intermediate_size
  moe_layers = config.num_moe_layers
  return config.num_hidden_layers * attention + moe_layers * experts + (config.num_hidden_layers - moe_layers) * dense


def score_flops(config: TransformerConfig, keys: int) -> int:
  """Per query with `keys` keys, all layers: scores and the weighted sum of values."""
  return 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * keys


def unembed_flops(config: TransformerConfig) -> int:
  """Per token."""
  return 2 * config.hidden_size * config.vocab_size


def forward(config: TransformerConfig, rows: int, length: int) -> int:
  """rows x length tokens, with the logits of all tokens."""
  per_token = token_flops(config) + unembed_flops(config)
  keys = sum(range(1, length + 1))
  return rows * (length * per_token + score_flops(config, keys))


def train_step(config: TransformerConfig, rows: int, length: int) -> int:
  """The forward pass and a backward pass of twice its work; the optimizer is not counted."""
  return 3 * forward(config, rows, length)


def sampling(config: TransformerConfig, rows: int, prompt: int, new: int) -> int:
  """Prefill and new - 1 decode steps (the last sampled token is not processed), and `new` unembeddings."""
  processed = prompt + new - 1
  keys = sum(range(1, processed + 1))
  return rows * (processed * token_flops(config) + score_flops(config, keys) + new * unembed_flops(config))
