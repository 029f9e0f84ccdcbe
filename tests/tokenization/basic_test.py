"""Round trips of the character and the byte tokenizer, and the left padding of prompts."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rspo_jax.tasks.countdown.problem import ALPHABET
from rspo_jax.tokenization.basic import ByteTokenizer, CharTokenizer, pad_left

TOKENIZER = CharTokenizer(ALPHABET)
BYTES = ByteTokenizer()


@given(st.text(alphabet=ALPHABET), st.lists(st.integers(0, 40)))
def test_decode_undoes_encode_and_stops_at_the_first_end_token(text, after):
  ids = TOKENIZER.encode(text)
  assert TOKENIZER.decode(ids) == text
  assert TOKENIZER.decode([*ids, TOKENIZER.eos_id, *after]) == text
  assert TOKENIZER.decode(np.array([*ids, TOKENIZER.eos_id], np.int32)) == text


@pytest.mark.parametrize("tokenizer", [TOKENIZER, BYTES])
def test_the_only_token_that_ends_a_completion_is_id_0(tokenizer):
  assert (tokenizer.eos_id, tokenizer.stop_ids) == (0, (0,))


def test_ids_are_the_end_token_and_one_per_character():
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


@given(st.text(), st.lists(st.integers(0, 300)))
def test_any_text_survives_its_bytes_up_to_the_first_end_token(text, after):
  ids = BYTES.encode(text)
  assert all(0 < i < BYTES.vocab_size for i in ids)
  assert BYTES.decode(ids) == text
  assert BYTES.decode([*ids, BYTES.eos_id, *after]) == text
  assert BYTES.decode(np.array([*ids, BYTES.eos_id], np.int32)) == text


def test_every_byte_has_its_value_plus_one_as_id():
  assert BYTES.encode("\x00A\x7fé") == [1, 66, 128, 0xC3 + 1, 0xA9 + 1]
  assert BYTES.vocab_size == 257


@given(st.lists(st.integers(-3, 600)))
def test_any_ids_decode_to_text_that_can_be_encoded_again(ids):
  text = BYTES.decode(ids)
  assert BYTES.decode(BYTES.encode(text)) == text


def test_broken_bytes_and_ids_outside_the_vocabulary_read_as_replacement_characters():
  a, z = BYTES.encode("az")
  assert BYTES.decode([a, 257, -1, z]) == "a\ufffd\ufffdz"
  assert BYTES.decode([a, 0xC3 + 1, z]) == "a\ufffdz"  # the first of two bytes
  assert BYTES.decode([0xE2 + 1, 999, 0x82 + 1]) == "\ufffd\ufffd\ufffd"  # nothing joins across an unknown id


def test_half_a_surrogate_pair_is_refused_as_a_value_error():
  with pytest.raises(ValueError, match="surrogates not allowed"):
    BYTES.encode("\ud83d")


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
