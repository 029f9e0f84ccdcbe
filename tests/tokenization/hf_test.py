"""Tokenizers of checkpoints with tiny vocabularies; the parity tests compare them with transformers."""

import itertools
import json
import re

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors

from rspo_jax.tokenization.hf import load_tokenizer
from tests.support.paths import SHARED
from tests.support.tokenizer_cases import (
  CHECKPOINTS,
  CONVERSATIONS,
  CORPUS,
  SPECIAL,
  WRITTEN,
  both,
  byte_level,
  config,
  token_id,
  write_checkpoint,
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  return load_tokenizer(write_checkpoint(tmp_path_factory.mktemp("checkpoint"), {}))


# Text and ids


@given(text=st.text())
def test_decode_inverts_encode_for_any_text(tokenizer, text):
  ids = tokenizer.encode(text)
  assert all(0 <= i < tokenizer.vocab_size for i in ids)
  assert tokenizer.decode(ids) == text
  assert tokenizer.decode(np.array([*ids, tokenizer.eos_id, 5], np.int32)) == text


SPECIAL_AND_SIMILAR = [*SPECIAL, "<|", "|>", "im_start", "im_end", "endoftext", "<", "|", ">", " "]


@given(text=st.lists(st.sampled_from(SPECIAL_AND_SIMILAR) | st.text()).map("".join))
def test_exactly_the_spelled_out_special_tokens_become_their_ids(tokenizer, text):
  parts = re.split("(" + "|".join(map(re.escape, SPECIAL)) + ")", text)
  ids = [[SPECIAL.index(part)] if part in SPECIAL else tokenizer.encode(part) for part in parts]
  assert tokenizer.encode(text) == list(itertools.chain(*ids))
  assert all(i >= len(SPECIAL) for i in itertools.chain(*ids[::2]))


def test_decoding_drops_special_tokens_and_keeps_other_added_tokens(tokenizer):
  text = "<|im_start|>assistant\n<think>Hm.</think>Yes<|endoftext|>."
  assert tokenizer.decode(tokenizer.encode(text)) == "assistant\n<think>Hm.</think>Yes."


def test_ids_without_a_token_become_replacement_characters(tokenizer):
  a, z = tokenizer.encode("a!")
  size = tokenizer.vocab_size
  assert tokenizer.decode([a, size, size + 7, -1, z, 10**9]) == "a\ufffd\ufffd\ufffd!\ufffd"


def test_the_vocabulary_size_includes_added_tokens(tokenizer):
  assert tokenizer.vocab_size == 330 + len(WRITTEN)
  assert token_id(tokenizer, WRITTEN[-1]) == tokenizer.vocab_size - 1


def test_truncation_and_padding_of_the_file_are_ignored(load):
  backend = tokenizers.Tokenizer.from_str(byte_level())
  backend.enable_truncation(4)
  backend.enable_padding(length=64)
  text = CORPUS[0]
  tokenizer = load({"tokenizer.json": backend.to_str()})
  assert tokenizer.decode(tokenizer.encode(text)) == text
  assert 4 < len(tokenizer.encode(text)) < 64


def test_an_unpaired_surrogate_is_a_value_error(tokenizer):
  with pytest.raises(ValueError, match="an unpaired surrogate"):
    tokenizer.encode("a\ud83d")


# Begin and end tokens


@pytest.mark.parametrize(
  ("files", "expected"),
  [
    ({}, ["<|im_end|>"]),
    ({"generation_config.json": {"eos_token_id": [0, 1, 2]}}, ["<|im_end|>", "<|endoftext|>", "<|im_start|>"]),
    ({"generation_config.json": {"eos_token_id": 0}}, ["<|im_end|>", "<|endoftext|>"]),
    (
      {"generation_config.json": {"eos_token_id": 1}, "config.json": {"eos_token_id": 0}},
      ["<|im_end|>", "<|im_start|>"],
    ),
    ({"generation_config.json": {"top_k": 20}, "config.json": {"eos_token_id": 0}}, ["<|im_end|>", "<|endoftext|>"]),
    (
      {"tokenizer_config.json": {}, "generation_config.json": {"eos_token_id": [1, 0]}},
      ["<|im_start|>", "<|endoftext|>"],
    ),
    ({"tokenizer_config.json": None, "config.json": {"eos_token_id": 0}}, ["<|endoftext|>"]),
    ({"tokenizer_config.json": {"eos_token": {"content": "<|im_start|>", "lstrip": False}}}, ["<|im_start|>"]),
  ],
)
def test_stop_ids_are_the_end_token_and_the_eos_ids_of_generation(load, files, expected):
  tokenizer = load(files)
  assert tokenizer.stop_ids == tuple(token_id(tokenizer, token) for token in expected)
  assert tokenizer.eos_id == tokenizer.stop_ids[0]
  for stop in expected:
    assert tokenizer.decode(tokenizer.encode(f"3+7{stop}12")) == "3+7"


def test_the_begin_token_follows_the_config_then_the_file(load):
  begin = processors.TemplateProcessing("<|endoftext|> $A", None, [("<|endoftext|>", 0)])
  backend = tokenizers.Tokenizer.from_str(byte_level())
  backend.post_processor = begin
  with_begin = {"tokenizer.json": backend.to_str()}
  bos = {"bos_token": "<|endoftext|>"}
  assert load(config(**bos)).bos_id is None
  assert load(config(**bos, add_bos_token=True)).bos_id == 0
  assert load(config(**bos) | with_begin).bos_id == 0
  assert load(config(**bos, add_bos_token=False) | with_begin).bos_id is None
  assert load(with_begin).bos_id is None  # bos_token is not named
  assert load(config(**bos) | with_begin).encode("3+7")[0] != 0


# Special and added tokens


def test_the_map_of_special_tokens_is_used_only_if_added_tokens_are_not_listed(load):
  special_map = {"eos_token": {"content": "<|endoftext|>", "rstrip": False}, "additional_special_tokens": ["<think>"]}
  files = {"special_tokens_map.json": special_map}
  assert load(files).eos_id == 0
  listed = {"2": {"content": "<|im_end|>", "special": True}}
  assert load(files | config(added_tokens_decoder=listed)).eos_id == 2


CALLED_SPECIAL = [  # entries of tokenizer_config.json; ID is replaced by the token's id
  {"bos_token": "and"},
  {"image_token": "and"},
  {"extra_special_tokens": ["and"]},
  {"extra_special_tokens": {"joining_token": "and"}},
  {"additional_special_tokens": [{"content": "and", "special": True, "__type": "AddedToken"}]},
  {"added_tokens_decoder": {"ID": {"content": "and", "special": True}}},
]


def fill_in(entries, i):
  return json.loads(json.dumps(entries).replace("ID", str(i)))


@pytest.mark.parametrize("entries", CALLED_SPECIAL)
def test_a_plain_token_listed_as_special_in_the_config_is_special(load, entries):
  i = token_id(load({}), "and")
  assert i is not None
  assert load({}).decode([i]) == "and"
  tokenizer = load(config(**fill_in(entries, i)))
  assert tokenizer.decode([i]) == ""
  assert tokenizer.encode("randy") == [*tokenizer.encode("r"), i, *tokenizer.encode("y")]


def test_tokens_listed_only_in_the_config_are_added_in_the_order_of_their_ids(load):
  size = load({}).vocab_size
  listed = {str(size + k): {"content": f"<t{k}>", "special": k % 2 == 0} for k in (10, 2, 1, 0, 3, 4, 5, 6, 7, 8, 9)}
  tokenizer = load(config(added_tokens_decoder=listed))
  assert tokenizer.vocab_size == size + 11
  assert tokenizer.encode("<t10><t2>") == [size + 10, size + 2]
  assert tokenizer.decode([size, size + 1]) == "<t1>"


def test_a_special_token_without_an_id_does_not_get_one(load):
  tokenizer = load(config(pad_token="<pad>"))
  assert tokenizer.vocab_size == load({}).vocab_size
  assert tokenizer.special["pad_token"] == "<pad>"


# Mistakes


@pytest.mark.parametrize(
  ("files", "message"),
  [
    ({"tokenizer.json": None}, r"has no tokenizer.json. Convert .* AutoTokenizer"),
    ({"tokenizer.json": "version https://git-lfs.github.com/spec/v1"}, r"tokenizer.json cannot be read: .*Git LFS"),
    ({"tokenizer_config.json": "{"}, r"tokenizer_config.json cannot be read: .*Download it again"),
    ({"generation_config.json": "[1]"}, r"generation_config.json cannot be read: it holds a list"),
    ({"tokenizer_config.json": {}}, r"names no end token.*eos_token"),
    (config(eos_token="</s>"), r"tokenizer.json has no token '</s>'"),
    (
      {"generation_config.json": {"eos_token_id": [2, 151643]}},
      r"generation_config.json has eos_token_id \[2, 151643\]",
    ),
    ({"config.json": {"eos_token_id": "2"}}, r"config.json has eos_token_id '2'"),
    (config(pad_token={"text": "x"}), r"tokenizer_config.json or special_tokens_map.json describes a token"),
    (
      config(added_tokens_decoder={"7": {"content": "<|im_end|>"}}),
      r"gives '<\|im_end\|>' the id 7, but tokenizer.json gives it 2",
    ),
  ],
)
def test_errors_in_the_files_of_a_checkpoint_are_named(load, files, message):
  with pytest.raises(ValueError, match=message):
    load(files)


def test_an_absent_folder_is_named_in_the_error(tmp_path):
  with pytest.raises(ValueError, match=r"nowhere is not a folder"):
    load_tokenizer(tmp_path / "nowhere")


# Comparison with transformers


def texts():
  for conversation in CONVERSATIONS.values():
    yield from (message["content"] for message in conversation if isinstance(message["content"], str))
  yield from CORPUS
  for special in (*SPECIAL, *WRITTEN, "<s>", "</s>", "<unk>", "<new>"):
    yield f"{special}{special} {special} a {special}\n{special}b<|{special}|>"
  shared = SHARED / "gsm8k.jsonl"
  if shared.exists():
    with open(shared, encoding="utf-8") as lines:
      yield from (json.loads(line)["answer"] for line, _ in zip(lines, range(200), strict=False))


@pytest.mark.parity
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_ids_and_texts_equal_transformers(tmp_path, checkpoint):
  ours, theirs = both(tmp_path, CHECKPOINTS[checkpoint])
  assert ours.vocab_size == len(theirs)
  assert ours.eos_id == theirs.eos_token_id
  assert ours.special == theirs.special_tokens_map
  for text in texts():
    ids = ours.encode(text)
    assert ids == theirs(text, add_special_tokens=False)["input_ids"], text
    assert ([] if ours.bos_id is None else [ours.bos_id]) + ids == theirs(text)["input_ids"], text
    if ours.eos_id not in ids:
      assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text


@pytest.mark.parity
@pytest.mark.parametrize("entries", CALLED_SPECIAL)
def test_transformers_treats_the_same_tokens_as_special(tmp_path, tokenizer, entries):
  i = token_id(tokenizer, "and")
  ours, theirs = both(tmp_path, config(**fill_in(entries, i)))
  assert ours.special == theirs.special_tokens_map
  assert theirs("randy and", add_special_tokens=False)["input_ids"] == ours.encode("randy and")
  assert theirs.decode([i], skip_special_tokens=True) == ours.decode([i]) == ""
