"""The tokenizer and the examples of `config.tokenizer` and `config.data`, with prompts as the policy reads them."""

import dataclasses
import datetime
import inspect
from collections.abc import Mapping

from absl import logging

from experiments.config import DataConfig
from rspo_jax.data.datasets import ALPHABETS, DATASETS, load_dataset
from rspo_jax.data.examples import Split
from rspo_jax.lookup import look_up
from rspo_jax.tokenization.basic import ByteTokenizer, CharTokenizer, Tokenizer
from rspo_jax.tokenization.hf import HFTokenizer, load_tokenizer

# The date in chat templates that write one. Constant, so that a run resumed on another day reads the same prompts.
CHAT_DATE = datetime.datetime(2025, 1, 1)


def make_tokenizer(name: str, dataset: str) -> Tokenizer:
  """The tokenizer of a config.

  Args:
    name: `config.tokenizer`: a folder, "bytes", or '' for the characters of the data set.
    dataset: `config.data.name`.
  Raises:
    ValueError: the folder cannot be read, or the data set has no list of characters.
  """
  if name == "bytes":
    return ByteTokenizer()
  if name:
    return load_tokenizer(name)
  if dataset not in ALPHABETS:
    raise ValueError(
      f"config.tokenizer is '', a token for each character of the data set, but {dataset} has no list of characters; "
      f"only {', '.join(ALPHABETS)} have one. Set config.tokenizer to a folder with a tokenizer.json, or to 'bytes'."
    )
  return CharTokenizer(ALPHABETS[dataset])


def read_data(data: DataConfig, tokenizer: Tokenizer) -> dict[str, Split]:
  """The splits of a data set, with `chat`, `system` and `max_prompt_tokens` applied.

  Raises:
    ValueError: an error of the data set, an option that it does not have, a prompt that cannot be rendered as a chat,
      or no prompt that is short enough.
  """
  loader = look_up("config.data.name", data.name, DATASETS)
  try:
    inspect.signature(loader).bind(None, **data.options)
  except TypeError as error:
    raise ValueError(f"config.data.options do not fit {data.name}: {error}.") from error
  if data.system and not data.chat:
    raise ValueError("config.data.system is for chats only; set config.data.chat=true, or leave it out.")
  splits = load_dataset(data.name, data.data_dir or None, **data.options)
  if data.chat:
    splits = {name: as_chat(split, tokenizer, data.system) for name, split in splits.items()}
  if data.max_prompt_tokens:
    splits = {name: up_to_length(split, tokenizer, data.max_prompt_tokens) for name, split in splits.items()}
  return splits


def need_splits(splits: Mapping[str, Split], *names: str) -> None:
  """Raises ValueError if one of the named splits is missing."""
  for name in names:
    if name not in splits:
      hold_out = "" if name == "train" else ", hold some of train out with config.data.options.holdout"
      raise ValueError(
        f"config.data gives no {name} split, only {', '.join(splits)}. Name its files in config.data.options.{name}"
        f"{hold_out} (docs/data.md)."
      )


def as_chat(split: Split, tokenizer: Tokenizer, system: str = "") -> Split:
  """Renders every prompt as a user message by the tokenizer's chat template, up to the start of the answer.

  Args:
    system: content of a system message before it; '' is none.
  Raises:
    ValueError: the tokenizer has no chat template, or the template rejects the messages.
  """
  if not isinstance(tokenizer, HFTokenizer) or not tokenizer.templates:
    raise ValueError(
      "config.data.chat is true, but the tokenizer has no chat template. Set config.tokenizer to the folder of a chat "
      "model, write chat_template.jinja there, or set config.data.chat=false."
    )
  system_messages = [{"role": "system", "content": system}] if system else []

  def render(prompt: str) -> str:
    return tokenizer.render_chat([*system_messages, {"role": "user", "content": prompt}], now=CHAT_DATE)

  examples = tuple(example._replace(prompt=render(example.prompt)) for example in split.examples)
  return dataclasses.replace(split, examples=examples)


def up_to_length(split: Split, tokenizer: Tokenizer, limit: int) -> Split:
  """The examples whose prompts have at most `limit` tokens. Logs a warning with the number of the others.

  Raises:
    ValueError: no example is left, in the split or from one of the sources of a mixture.
  """
  lengths = [len(tokenizer.encode(example.prompt)) for example in split.examples]
  short = tuple(example for example, length in zip(split.examples, lengths, strict=True) if length <= limit)
  if empty := sorted({example.source for example in split.examples} - {example.source for example in short}):
    sources = f" from {', '.join(empty)}" if all(empty) else ""
    raise ValueError(
      f"config.data.max_prompt_tokens is {limit}, which leaves no prompt{sources} in {split.name}; its prompts have "
      f"{min(lengths)} to {max(lengths)} tokens. Raise it."
    )
  if len(short) < len(lengths):
    logging.warning(
      "%s: %d of %d prompts have more than %d tokens (the longest has %d) and are left out.",
      split.name,
      len(lengths) - len(short),
      len(lengths),
      limit,
      max(lengths),
    )
  return dataclasses.replace(split, examples=short)
