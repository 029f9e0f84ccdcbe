"""The `Tokenizer` protocol, tokenizers over characters and bytes, and padding of ids to arrays.

`CharTokenizer` is for synthetic tasks, `ByteTokenizer` for any text without a vocabulary file; tokenizers of published
checkpoints come from `rspo_jax.tokenization.hf`. Masks are computed from lengths, never from the id of a padding token.
"""

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

UNKNOWN = "\ufffd"  # text of an id without a token: a model with a larger vocabulary can sample such ids


class Tokenizer(Protocol):
  """The interface of all tokenizers here.

  Attributes:
    vocab_size: ids are in [0, vocab_size). A model can have a larger vocabulary.
    eos_id: the end token, appended to a demonstration.
    stop_ids: ids that end a completion; eos_id first.
  """

  vocab_size: int
  eos_id: int
  stop_ids: tuple[int, ...]

  def encode(self, text: str) -> list[int]:
    """The ids of a text, without begin or end token."""

  def decode(self, ids: Iterable[int]) -> str:
    """The text of ids up to the first stop token, or of all ids if there is none. Never raises: see `UNKNOWN`."""


class CharTokenizer:
  """One id per character of an alphabet; id 0 is the end token.

  Args:
    alphabet: the characters, each once; `alphabet[i]` has id i + 1.
  Raises:
    ValueError: an empty alphabet or a repeated character.
  """

  eos_id = 0
  stop_ids = (0,)

  def __init__(self, alphabet: str):
    if not alphabet or len(set(alphabet)) != len(alphabet):
      raise ValueError(f"The alphabet is {alphabet!r}; want at least one character, and each only once.")
    self.alphabet = alphabet
    self.vocab_size = len(alphabet) + 1
    self._ids = {character: i for i, character in enumerate(alphabet, start=1)}

  def encode(self, text: str) -> list[int]:
    """The ids of a text, without an end token. ValueError for a character outside the alphabet."""
    try:
      return [self._ids[character] for character in text]
    except KeyError as error:
      raise ValueError(
        f"{error.args[0]!r} in {text!r} is not in the alphabet {self.alphabet!r}. Add it there, or use a tokenizer "
        "that covers this text."
      ) from None

  def decode(self, ids: Iterable[int]) -> str:
    """The text up to the first end token. Ids outside the vocabulary become U+FFFD."""
    text = []
    for i in ids:
      if i == self.eos_id:
        break
      text.append(self.alphabet[i - 1] if 0 < i < self.vocab_size else UNKNOWN)
    return "".join(text)


class ByteTokenizer:
  """The bytes of UTF-8: byte b has id b + 1; id 0 is the end token."""

  vocab_size = 257
  eos_id = 0
  stop_ids = (0,)

  def encode(self, text: str) -> list[int]:
    """The ids of a text, without an end token. UnicodeEncodeError (a ValueError) for an unpaired surrogate."""
    return [byte + 1 for byte in text.encode()]

  def decode(self, ids: Iterable[int]) -> str:
    """The text up to the first end token. Invalid UTF-8 and ids outside the vocabulary become U+FFFD."""
    text = bytearray()
    for i in ids:
      if i == self.eos_id:
        break
      text += bytes([i - 1]) if 0 < i < self.vocab_size else UNKNOWN.encode()
    return text.decode(errors="replace")


def pad_left(rows: Sequence[Sequence[int] | np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
  """Prompts as one array, aligned to the right.

  Args:
    rows: P sequences of ids, each with 1 to `length` ids.
    length: Tp, token slots.
  Returns:
    tokens [P, Tp] int32, 0 where not valid; valid [P, Tp] bool.
  Raises:
    ValueError: a row that is empty or longer than length; names the row.
  """
  tokens = np.zeros((len(rows), length), np.int32)
  valid = np.zeros((len(rows), length), bool)
  for index, row in enumerate(rows):
    if not 0 < len(row) <= length:
      cure = "Raise the prompt length or drop the example." if len(row) else "A completion needs a prompt before it."
      raise ValueError(f"Row {index} has {len(row)} tokens; want 1 to {length}. {cure}")
    tokens[index, length - len(row) :] = row
    valid[index, length - len(row) :] = True
  return tokens, valid


def pad_right(
  rows: Sequence[Sequence[int] | np.ndarray], length: int, dtype: type = np.int32
) -> tuple[np.ndarray, np.ndarray]:
  """Completions, or values of their tokens, as one array, aligned to the left.

  Args:
    rows: B sequences, each with 0 to `length` ids or values.
    length: T, token slots.
    dtype: of the values.
  Returns:
    values [B, T] of dtype, 0 where not valid; valid [B, T] bool.
  Raises:
    ValueError: a row longer than length; names the row.
  """
  values = np.zeros((len(rows), length), dtype)
  valid = np.zeros((len(rows), length), bool)
  for index, row in enumerate(rows):
    if len(row) > length:
      raise ValueError(f"Row {index} has {len(row)} tokens; want at most {length}. Truncate it or raise the length.")
    values[index, : len(row)] = row
    valid[index, : len(row)] = True
  return values, valid
