"""Text to token ids and back.

`Tokenizer` is all that the project asks of a tokenizer. `CharTokenizer` fills it in for synthetic tasks,
`ByteTokenizer` for any text without a vocabulary file, `hf_tokenizer.load_tokenizer` for published checkpoints.
Padding is whatever lies outside `valid`: masks are made from lengths, never from a padding token.
"""

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

UNKNOWN = "\ufffd"  # how an id without a token reads: a model may have a larger vocabulary, and draw from all of it


class Tokenizer(Protocol):
  """Text to ids and back.

  Attributes:
    vocab_size: ids are in [0, vocab_size). A model may have a larger vocabulary.
    eos_id: the end token, written after a demonstration.
    stop_ids: each of these ends a completion; eos_id first.
  """

  vocab_size: int
  eos_id: int
  stop_ids: tuple[int, ...]

  def encode(self, text: str) -> list[int]:
    """The ids of a text, without begin or end token."""

  def decode(self, ids: Iterable[int]) -> str:
    """The text of ids up to the first stop token, or of all ids if there is none. Never fails: see `UNKNOWN`."""


class CharTokenizer:
  """One id per character of an alphabet, after id 0, the end of the sequence.

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
    """The text up to the first end token. Ids outside the vocabulary, which a larger model may draw, read as U+FFFD."""
    text = []
    for i in ids:
      if i == self.eos_id:
        break
      text.append(self.alphabet[i - 1] if 0 < i < self.vocab_size else UNKNOWN)
    return "".join(text)


class ByteTokenizer:
  """The bytes of UTF-8: byte b has id b + 1, after id 0, the end of the sequence."""

  vocab_size = 257
  eos_id = 0
  stop_ids = (0,)

  def encode(self, text: str) -> list[int]:
    """The ids of a text, without an end token. UnicodeEncodeError (a ValueError) for half of a surrogate pair."""
    return [byte + 1 for byte in text.encode()]

  def decode(self, ids: Iterable[int]) -> str:
    """The text up to the first end token. What is not UTF-8, and ids outside the vocabulary, read as U+FFFD."""
    text = bytearray()
    for i in ids:
      if i == self.eos_id:
        break
      text += bytes([i - 1]) if 0 < i < self.vocab_size else UNKNOWN.encode()
    return text.decode(errors="replace")


def pad_left(rows: Sequence[Sequence[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
  """Prompts as one array, aligned to the right.

  Args:
    rows: P lists of ids, each with 1 to `length` ids.
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
