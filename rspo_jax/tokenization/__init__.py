"""Text to token ids and back: characters, bytes, a published `tokenizer.json`, and chat templates."""

from rspo_jax.tokenization.basic import UNKNOWN, ByteTokenizer, CharTokenizer, Tokenizer, pad_left
from rspo_jax.tokenization.hf import HFTokenizer, load_tokenizer

__all__ = ["UNKNOWN", "ByteTokenizer", "CharTokenizer", "HFTokenizer", "Tokenizer", "load_tokenizer", "pad_left"]
