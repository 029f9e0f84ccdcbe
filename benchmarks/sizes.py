"""The workload of all comparisons: a tiny Qwen3-MoE in Hugging Face's names, and the numbers of rows and tokens."""

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 64, 32, 64
ROWS, ROW_TOKENS = PROMPTS, PROMPT_TOKENS + NEW_TOKENS

TINY = {
  "vocab_size": 512,
  "hidden_size": 256,
  "intermediate_size": 512,
  "moe_intermediate_size": 128,
  "num_hidden_layers": 4,
  "num_attention_heads": 8,
  "num_key_value_heads": 4,
  "head_dim": 32,
  "num_experts": 16,
  "num_experts_per_tok": 4,
  "norm_topk_prob": True,
  "tie_word_embeddings": False,
}
