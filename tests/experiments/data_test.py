"""From `config.data` to prompts: chats, prompts that are too long, tokenizers, and settings that do not fit."""

import dataclasses
import json
import logging

import pytest

from experiments.config import DataConfig
from experiments.configs import math_rl
from experiments.setup.build import build
from experiments.setup.config_flags import read_config
from experiments.setup.data import as_chat, make_tokenizer, need_splits, read_data, up_to_length
from rspo_jax.data.examples import Example, Split
from rspo_jax.tokenization.basic import ByteTokenizer
from rspo_jax.tokenization.hf import load_tokenizer
from tests.support.tokenizer_cases import CHATML, config, write_checkpoint

BYTES = ByteTokenizer()
ROWS = [{"question": "x" * (i + 1), "answer": f"#### {i}"} for i in range(9)]
FILES = {"prompt": "question", "gold": "answer", "gold_from": "####"}


@pytest.fixture
def folder(tmp_path):
  for name in ("gsm8k_train", "gsm8k"):
    (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
  return tmp_path


@pytest.fixture
def chat_tokenizer(tmp_path):
  return load_tokenizer(write_checkpoint(tmp_path / "checkpoint", config(chat_template=CHATML)))


def split_of(*prompts, source=""):
  return Split("toy", tuple(Example(prompt, "1", source=source, metadata={"i": 1}) for prompt in prompts))


def data(folder, **changed):
  options = {"train": "gsm8k_train.jsonl", **FILES, **changed.pop("options", {})}
  return DataConfig(name="files", data_dir=str(folder), options=options, **changed)


def test_prompts_become_what_a_user_says_up_to_the_answer(chat_tokenizer):
  split = split_of("2 + 2?", "A\nB")
  chat = as_chat(split, chat_tokenizer)
  assert chat[0].prompt == "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n"
  assert chat[0]._replace(prompt="2 + 2?") == split[0]
  said = as_chat(split, chat_tokenizer, "Be brief.")[1].prompt
  assert said.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nA\nB<|im_end|>")


def test_every_data_set_is_read_as_a_chat_if_the_config_says_so(folder, chat_tokenizer):
  splits = read_data(data(folder, chat=True, system="Add."), chat_tokenizer)
  assert splits["train"][0].prompt.startswith("<|im_start|>system\nAdd.<|im_end|>\n<|im_start|>user\nx<|im_end|>")
  plain = read_data(data(folder), chat_tokenizer)
  assert plain["train"][0].prompt == "x"


def test_templates_that_write_the_date_write_the_same_one_every_day(tmp_path):
  template = "{{ strftime_now('%Y-%m-%d') }} {{ messages[0].content }}"
  tokenizer = load_tokenizer(write_checkpoint(tmp_path, config(chat_template=template)))
  assert as_chat(split_of("x"), tokenizer)[0].prompt == "2025-01-01 x"


def test_a_tokenizer_without_a_chat_template_is_told(tmp_path):
  for tokenizer in (BYTES, load_tokenizer(write_checkpoint(tmp_path, {}))):
    with pytest.raises(ValueError, match="config.data.chat is true, but the tokenizer has no chat template. Set"):
      as_chat(split_of("x"), tokenizer)


def test_prompts_that_are_too_long_are_left_out_and_counted(folder, caplog, chat_tokenizer):
  with caplog.at_level(logging.WARNING):
    splits = read_data(data(folder, max_prompt_tokens=4), BYTES)
  assert [example.prompt for example in splits["train"].examples] == ["x", "xx", "xxx", "xxxx"]
  (warning,) = caplog.messages
  assert "5 of 9 prompts have more than 4 tokens (the longest has 9) and are left out" in warning
  caplog.clear()
  assert up_to_length(splits["train"], BYTES, 4) == splits["train"]
  assert not caplog.messages
  with pytest.raises(ValueError, match=r"max_prompt_tokens is 4, which leaves no prompt in train of"):
    read_data(data(folder, chat=True, max_prompt_tokens=4), chat_tokenizer)  # the template counts


def test_no_source_of_a_mixture_is_left_out_as_a_whole_without_a_word():
  examples = split_of("x", source="short").examples + split_of("xxxx", "xxxxx", source="long").examples
  split = Split("both", examples, weights={"short": 1.0, "long": 1.0})
  with pytest.raises(ValueError, match="leaves no prompt from long in both; its prompts have 1 to 5 tokens. Raise it"):
    up_to_length(split, BYTES, 3)
  kept = up_to_length(split, BYTES, 4)
  assert len(kept) == 2 and kept.weights == split.weights


def test_bytes_are_a_tokenizer_and_files_have_no_characters_of_their_own():
  assert isinstance(make_tokenizer("bytes", "files"), ByteTokenizer)
  with pytest.raises(ValueError, match="config.tokenizer is ''.*files has no list.*'bytes'"):
    make_tokenizer("", "files")


@pytest.mark.parametrize(
  ("changed", "message"),
  [
    ({"options": {"gold_form": "boxed"}}, "no setting gold_form"),
    ({"options": {"train": "none.jsonl"}}, "none.jsonl is no file"),
    ({"system": "Be brief."}, "config.data.system is for chats only; set config.data.chat=true"),
  ],
)
def test_settings_that_do_not_fit_are_told(folder, changed, message):
  with pytest.raises(ValueError, match=message):
    read_data(data(folder, **changed), BYTES)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({}, "do not fit mixture: missing a required .*argument: 'sources'"),
    ({"source": {}}, "do not fit mixture: .*source"),
  ],
)
def test_options_that_a_data_set_does_not_have_are_told(options, message):
  with pytest.raises(ValueError, match=f"config.data.options {message}"):
    read_data(DataConfig(name="mixture", options=options), BYTES)


def test_a_split_that_is_not_there_is_told_with_the_ways_to_get_it():
  with pytest.raises(ValueError, match=r"no test split, only train.*config.data.options.test, hold some of train out"):
    need_splits({"train": None}, "train", "test")
  with pytest.raises(ValueError, match=r"no train split, only test\. Name its files in config.data.options.train \("):
    need_splits({"test": None}, "train")


def test_the_worked_example_is_built_from_the_files_it_names(folder):
  given = math_rl.get_config()
  given.data.data_dir = str(folder)
  given.data.options.limit = 5
  parts = build(read_config(given))
  with parts.reward as reward:
    prompt = parts.splits["train"][2].prompt
    assert prompt == "xxx\nReason step by step, and put your answer in \\boxed{}."
    assert parts.splits["test"][2].gold == "2" and len(parts.splits["test"]) == 5
    assert parts.prompt_length == len(prompt) + 2
    assert reward("So \\boxed{2}", parts.splits["test"][2]).success
  given.data.options.test = ""
  with pytest.raises(ValueError, match="config.data gives no test split, only train"):
    build(read_config(given))
  given.data.max_prompt_tokens = -1
  with pytest.raises(ValueError, match="config.data.max_prompt_tokens is -1; want 0 or more"):
    read_config(given)


def test_the_settings_of_a_mixture_survive_the_way_through_flags():
  given = math_rl.get_config()
  given.data.name = "mixture"
  sources = {"gsm8k": {"name": "files", "weight": 2.0, "options": FILES}}
  with given.unlocked(), given.ignore_type():
    given.data.options = {"sources": sources}
  config = read_config(given)
  assert config.data.options == {"sources": sources}
  assert dataclasses.asdict(config)["data"]["options"] == {"sources": sources}
