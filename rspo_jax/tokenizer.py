"""F3: text to token ids and back.

`Tokenizer` is all that the project asks of a tokenizer; `CharTokenizer` fills it in for synthetic tasks. There is no
padding token and no begin token: padding is whatever lies outside `valid`, and masks are made from lengths.
"""

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np


class Tokenizer(Protocol):
  """Text to ids and back.

  Attributes:
    vocab_size: ids are in [0, vocab_size). A model may have a larger vocabulary.
    eos_id: ends a completion.
  """

  vocab_size: int
  eos_id: int

  def encode(self, text: str) -> list[int]:
    """The ids of a text, without an end token."""

  def decode(self, ids: Iterable[int]) -> str:
    """The text of ids up to the first end token, or of all ids if there is none."""


class CharTokenizer:
  """One id per character of an alphabet, after id 0, the end of the sequence.

  Args:
    alphabet: the characters, each once; `alphabet[i]` has id i + 1.
  Raises:
    ValueError: an empty alphabet or a repeated character.
  """

  eos_id = 0

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
      text.append(self.alphabet[i - 1] if 0 < i < self.vocab_size else "\ufffd")
    return "".join(text)


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
