"""Text to token ids and back: characters, bytes, a published `tokenizer.json`, chat templates, and padding of ids.

Tokenizers know neither data sets nor models; choosing one for a run belongs to the experiments.
"""

from rspo_jax.tokenization.basic import UNKNOWN, ByteTokenizer, CharTokenizer, Tokenizer, pad_left, pad_right
from rspo_jax.tokenization.hf import HFTokenizer, load_tokenizer

__all__ = [
  "UNKNOWN",
  "ByteTokenizer",
  "CharTokenizer",
  "HFTokenizer",
  "Tokenizer",
  "load_tokenizer",
  "pad_left",
  "pad_right",
]
