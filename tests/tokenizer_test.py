"""Round trips of the character tokenizer, and the left padding of prompts."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rspo_jax.countdown import ALPHABET
from rspo_jax.tokenizer import CharTokenizer, pad_left

TOKENIZER = CharTokenizer(ALPHABET)


@given(st.text(alphabet=ALPHABET), st.lists(st.integers(0, 40)))
def test_decode_undoes_encode_and_stops_at_the_first_end_token(text, after):
  ids = TOKENIZER.encode(text)
  assert TOKENIZER.decode(ids) == text
  assert TOKENIZER.decode([*ids, TOKENIZER.eos_id, *after]) == text
  assert TOKENIZER.decode(np.array([*ids, TOKENIZER.eos_id], np.int32)) == text


def test_ids_are_the_end_token_and_one_per_character():
  assert TOKENIZER.eos_id == 0
  assert TOKENIZER.vocab_size == len(ALPHABET) + 1
  assert sorted(TOKENIZER.encode(ALPHABET)) == list(range(1, TOKENIZER.vocab_size))


def test_ids_of_a_larger_model_vocabulary_decode_to_something_no_encoder_takes():
  text = TOKENIZER.decode([1, TOKENIZER.vocab_size, -1, 511, 2])
  assert text == f"{ALPHABET[0]}\ufffd\ufffd\ufffd{ALPHABET[1]}"
  with pytest.raises(ValueError, match="not in the alphabet"):
    TOKENIZER.encode(text)


def test_a_character_outside_the_alphabet_is_named():
  with pytest.raises(ValueError, match=r"'x' in '3x7' is not in the alphabet '0123456789"):
    TOKENIZER.encode("3x7")


@pytest.mark.parametrize("alphabet", ["", "abca"])
def test_an_alphabet_without_characters_or_with_one_twice_is_refused(alphabet):
  with pytest.raises(ValueError, match="only once"):
    CharTokenizer(alphabet)


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=7), max_size=5))
def test_padding_goes_left_and_valid_marks_exactly_the_ids(rows):
  tokens, valid = pad_left(rows, 7)
  assert tokens.shape == valid.shape == (len(rows), 7)
  assert (tokens.dtype, valid.dtype) == (np.int32, bool)
  for row, row_tokens, row_valid in zip(rows, tokens, valid, strict=True):
    assert row_tokens[row_valid].tolist() == row
    assert (np.diff(row_valid.astype(int)) >= 0).all()
    assert not row_tokens[~row_valid].any()


@pytest.mark.parametrize(("rows", "message"), [([[1], [1, 2, 3]], "Row 1 has 3"), ([[1], [2], []], "Row 2 has 0")])
def test_a_row_that_does_not_fit_is_named(rows, message):
  with pytest.raises(ValueError, match=message):
    pad_left(rows, 2)
