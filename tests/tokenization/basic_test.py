"""Round trips of the character and byte tokenizers, and padding of ids to arrays."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rspo_jax.tasks.countdown.problem import ALPHABET
from rspo_jax.tokenization.basic import ByteTokenizer, CharTokenizer, pad_left, pad_right

TOKENIZER = CharTokenizer(ALPHABET)
BYTES = ByteTokenizer()


@given(st.text(alphabet=ALPHABET), st.lists(st.integers(0, 40)))
def test_decode_inverts_encode_up_to_the_first_end_token(text, after):
  ids = TOKENIZER.encode(text)
  assert TOKENIZER.decode(ids) == text
  assert TOKENIZER.decode([*ids, TOKENIZER.eos_id, *after]) == text
  assert TOKENIZER.decode(np.array([*ids, TOKENIZER.eos_id], np.int32)) == text


@pytest.mark.parametrize("tokenizer", [TOKENIZER, BYTES])
def test_id_0_is_the_only_stop_token(tokenizer):
  assert (tokenizer.eos_id, tokenizer.stop_ids) == (0, (0,))


def test_each_character_has_its_own_id_after_the_end_token():
  assert TOKENIZER.vocab_size == len(ALPHABET) + 1
  assert sorted(TOKENIZER.encode(ALPHABET)) == list(range(1, TOKENIZER.vocab_size))


def test_ids_outside_the_alphabet_decode_to_text_that_cannot_be_encoded():
  text = TOKENIZER.decode([1, TOKENIZER.vocab_size, -1, 511, 2])
  assert text == f"{ALPHABET[0]}\ufffd\ufffd\ufffd{ALPHABET[1]}"
  with pytest.raises(ValueError, match="not in the alphabet"):
    TOKENIZER.encode(text)


def test_a_character_outside_the_alphabet_is_named_in_the_error():
  with pytest.raises(ValueError, match=r"'x' in '3x7' is not in the alphabet '0123456789"):
    TOKENIZER.encode("3x7")


@pytest.mark.parametrize("alphabet", ["", "abca"])
def test_an_empty_alphabet_or_a_repeated_character_is_rejected(alphabet):
  with pytest.raises(ValueError, match="only once"):
    CharTokenizer(alphabet)


@given(st.text(), st.lists(st.integers(0, 300)))
def test_decode_of_bytes_inverts_encode_up_to_the_first_end_token(text, after):
  ids = BYTES.encode(text)
  assert all(0 < i < BYTES.vocab_size for i in ids)
  assert BYTES.decode(ids) == text
  assert BYTES.decode([*ids, BYTES.eos_id, *after]) == text
  assert BYTES.decode(np.array([*ids, BYTES.eos_id], np.int32)) == text


def test_the_id_of_a_byte_is_its_value_plus_one():
  assert BYTES.encode("\x00A\x7fé") == [1, 66, 128, 0xC3 + 1, 0xA9 + 1]
  assert BYTES.vocab_size == 257


@given(st.lists(st.integers(-3, 600)))
def test_any_ids_decode_to_text_that_can_be_encoded(ids):
  text = BYTES.decode(ids)
  assert BYTES.decode(BYTES.encode(text)) == text


def test_invalid_bytes_and_ids_outside_the_vocabulary_become_replacement_characters():
  a, z = BYTES.encode("az")
  assert BYTES.decode([a, 257, -1, z]) == "a\ufffd\ufffdz"
  assert BYTES.decode([a, 0xC3 + 1, z]) == "a\ufffdz"  # the first byte of two
  assert BYTES.decode([0xE2 + 1, 999, 0x82 + 1]) == "\ufffd\ufffd\ufffd"  # bytes do not join across an unknown id


def test_an_unpaired_surrogate_is_a_value_error():
  with pytest.raises(ValueError, match="surrogates not allowed"):
    BYTES.encode("\ud83d")


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=7), max_size=5))
def test_left_padding_precedes_the_ids_and_valid_marks_exactly_the_ids(rows):
  tokens, valid = pad_left(rows, 7)
  assert tokens.shape == valid.shape == (len(rows), 7)
  assert (tokens.dtype, valid.dtype) == (np.int32, bool)
  for row, row_tokens, row_valid in zip(rows, tokens, valid, strict=True):
    assert row_tokens[row_valid].tolist() == row
    assert (np.diff(row_valid.astype(int)) >= 0).all()
    assert not row_tokens[~row_valid].any()


def test_rows_may_be_arrays():
  rows = [np.array([3, 1], np.int64), np.array([2])]
  np.testing.assert_array_equal(pad_left(rows, 3)[0], [[0, 3, 1], [0, 0, 2]])
  np.testing.assert_array_equal(pad_right(rows, 3)[0], [[3, 1, 0], [2, 0, 0]])


@given(st.lists(st.lists(st.integers(0, 9), max_size=7), max_size=5), st.sampled_from([np.int32, np.float32]))
def test_right_padding_follows_the_values_and_valid_marks_exactly_the_values(rows, dtype):
  values, valid = pad_right(rows, 7, dtype)
  assert values.shape == valid.shape == (len(rows), 7)
  assert (values.dtype, valid.dtype) == (dtype, bool)
  for row, row_values, row_valid in zip(rows, values, valid, strict=True):
    assert row_values[row_valid].tolist() == row
    assert (np.diff(row_valid.astype(int)) <= 0).all()
    assert not row_values[~row_valid].any()


@pytest.mark.parametrize(("rows", "message"), [([[1], [1, 2, 3]], "Row 1 has 3"), ([[1], [2], []], "Row 2 has 0")])
def test_a_row_too_long_or_too_short_is_named_in_the_error(rows, message):
  with pytest.raises(ValueError, match=message):
    pad_left(rows, 2)


def test_a_completion_longer_than_its_slots_is_named_in_the_error():
  assert pad_right([[], [1, 2]], 2)[1].tolist() == [[False, False], [True, True]]
  with pytest.raises(ValueError, match="Row 1 has 3 tokens; want at most 2. Truncate it or raise the length"):
    pad_right([[], [1, 2, 3]], 2)
