"""Tokenizers and chat templates of published checkpoints, read from their files. No torch, no transformers.

What `load_tokenizer` reads from a folder:

  tokenizer.json                        the vocabulary and the way a text is cut; the one file that must be there
  tokenizer_config.json                 added tokens, names of special tokens, add_bos_token
  special_tokens_map.json               names of special tokens, if the file above does not list added tokens
  generation_config.json, config.json   eos_token_id, one or several; config.json counts where the other has none

Chat templates are found and rendered by `rspo_jax.tokenization.chat_template`.

Where files disagree, the one counts that counts for transformers 5; but add_bos_token, which that ignores, counts here.
"""

import dataclasses
import datetime
import itertools
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import tokenizers

from rspo_jax.tokenization.basic import UNKNOWN
from rspo_jax.tokenization.chat_template import (
  ChatTemplate,
  choose_template,
  read_json,
  read_templates,
  render_template,
)

_TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclasses.dataclass(frozen=True, eq=False)
class HFTokenizer:
  """The tokenizer of a checkpoint, as `load_tokenizer` reads it; it fills in `rspo_jax.tokenization.basic.Tokenizer`.

  Attributes:
    vocab_size: largest id + 1, added tokens included. The model's vocabulary is often larger, for padding.
    eos_id: the end token. stop_ids: eos_id, then the others that generation stops at.
    bos_id: what a text without a chat template begins with, None if with nothing. `encode` does not write it.
      add_bos_token says so, or tokenizer.json where that is silent.
    special: special tokens by the names templates use, {'eos_token': '<|im_end|>', ...}.
    templates: chat templates by name. 'default' is used unless another is asked for, 'tool_use' if there are tools.
  """

  folder: pathlib.Path
  backend: tokenizers.Tokenizer = dataclasses.field(repr=False)
  vocab_size: int
  eos_id: int
  stop_ids: tuple[int, ...]
  bos_id: int | None
  special: Mapping[str, str]
  templates: Mapping[str, ChatTemplate] = dataclasses.field(repr=False)

  def encode(self, text: str) -> list[int]:
    """The ids of a text. None is added; a special token written out in the text becomes its id, wherever it stands."""
    try:
      return self.backend.encode(text, add_special_tokens=False).ids
    except TypeError as error:
      raise ValueError(f"{text!r} is no text in UTF-8 (half a surrogate pair?). Mend or drop the example.") from error

  def decode(self, ids: Iterable[int]) -> str:
    """The text up to the first stop token, without special tokens. Ids that no token has read as U+FFFD."""
    kept = itertools.takewhile(lambda i: i not in self.stop_ids, map(int, ids))
    text = []
    for known, run in itertools.groupby(kept, key=self._has_token):
      run = list(run)
      text.append(self.backend.decode(run, skip_special_tokens=True) if known else UNKNOWN * len(run))
    return "".join(text)

  def render_chat(
    self,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    template: str | None = None,
    now: datetime.datetime | None = None,
    **variables: Any,
  ) -> str:
    """A conversation as the model was trained to read it, as transformers' `apply_chat_template` writes it.

    Args:
      messages: at least one {'role': 'user', 'content': '...'}, with what else the template reads ('tool_calls', ...).
      add_generation_prompt: end with the beginning of an answer.
      tools: JSON schemas of the functions the model may call.
      template: a name in `templates`, or Jinja text.
      now: the time `strftime_now` tells, by default the clock's. Templates that write the date (gpt-oss, some of Llama)
        make prompts that change at midnight: fix it where runs are to repeat.
      variables: what else the template reads, such as enable_thinking=False.
    Raises:
      ValueError: no such template, arguments that JSON cannot hold, or a template that is not Jinja or refuses the
        conversation; says which file and why.
    """
    chosen = choose_template(self.folder, self.templates, template, tools)
    return render_template(
      chosen,
      messages,
      add_generation_prompt=add_generation_prompt,
      tools=tools,
      now=now,
      special=self.special,
      variables=variables,
    )

  def encode_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
    """The ids of `render_chat(messages, **options)`. Special tokens that a message writes out count as such, too."""
    return self.encode(self.render_chat(messages, **options))

  def _has_token(self, i: int) -> bool:
    return 0 <= i < self.vocab_size and self.backend.id_to_token(i) is not None


def load_tokenizer(folder: str | os.PathLike) -> HFTokenizer:
  """The tokenizer and the chat templates of a checkpoint's folder (this module's docstring says from which files).

  Raises:
    ValueError: no folder, no tokenizer.json, a file that is broken or contradicts another, no end token; names the
      file and the cure.
  """
  folder = pathlib.Path(folder)
  backend = _read_backend(folder)
  config = read_json(folder / "tokenizer_config.json")
  _add_tokens(folder, config, backend)
  special = _name_special_tokens(folder, config, backend)
  vocab_size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
  stop_ids = _read_stop_ids(folder, special.get("eos_token"), backend, vocab_size)
  bos_id = backend.token_to_id(special.get("bos_token", ""))
  if not config.get("add_bos_token", bos_id in backend.encode("").ids[:1]):
    bos_id = None
  return HFTokenizer(
    folder, backend, vocab_size, stop_ids[0], stop_ids, bos_id, special, read_templates(folder, config)
  )


def _read_backend(folder: pathlib.Path) -> tokenizers.Tokenizer:
  """tokenizer.json, without the truncation and padding that some of them ask for."""
  if not folder.is_dir():
    raise ValueError(f"{folder} is not a folder. Name the folder that a checkpoint was downloaded to.")
  path = folder / "tokenizer.json"
  if not path.is_file():
    raise ValueError(
      f"{folder} has no tokenizer.json. Convert what it has once, where transformers is installed: "
      f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
    )
  try:
    backend = tokenizers.Tokenizer.from_file(str(path))
  except Exception as error:  # of this very type is what the package raises
    raise ValueError(
      f"{path} cannot be read: {error}. Download it again (a pointer of Git LFS is not the file); if it is whole, "
      f"install a newer `tokenizers` than {tokenizers.__version__}."
    ) from error
  backend.no_truncation()
  backend.no_padding()
  return backend


def _add_tokens(folder: pathlib.Path, config: Mapping[str, Any], backend: tokenizers.Tokenizer) -> None:
  """Adds what `added_tokens_decoder` lists; a token that tokenizer.json has gets the flags it has here."""
  place = str(folder / "tokenizer_config.json")
  listed = {int(i): _added_token(fields, place) for i, fields in (config.get("added_tokens_decoder") or {}).items()}
  backend.add_tokens([listed[i] for i in sorted(listed)])
  for i, token in listed.items():
    found = backend.token_to_id(token.content)
    if found != i:
      raise ValueError(
        f"{place} says that {token.content!r} has id {i}, but with tokenizer.json it gets {found}. The two are of "
        "different checkpoints: download both from one."
      )


def _name_special_tokens(
  folder: pathlib.Path, config: Mapping[str, Any], backend: tokenizers.Tokenizer
) -> dict[str, str]:
  """{'eos_token': '<|im_end|>', ...}; those that tokenizer.json has as plain tokens become special in the backend."""
  if "added_tokens_decoder" not in config:
    config = {**config, **read_json(folder / "special_tokens_map.json")}
  place = f"{folder}: tokenizer_config.json or special_tokens_map.json"
  named = {name: token for name, token in config.items() if name.endswith("_token") and isinstance(token, str | dict)}
  others = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
  if isinstance(others, dict):
    named, others = {**named, **others}, []
  named = {name: _added_token(token, place) for name, token in named.items()}
  added = {token.content for token in backend.get_added_tokens_decoder().values()}
  for token in (*named.values(), *(_added_token(token, place) for token in others)):
    # A token without an id is given none: the model has no embedding for it.
    if token.content not in added and backend.token_to_id(token.content) is not None:
      backend.add_special_tokens([token])
  return {name: token.content for name, token in named.items()}


def _added_token(value: str | Mapping[str, Any], place: str) -> tokenizers.AddedToken:
  fields = {"content": value, "special": True} if isinstance(value, str) else value
  try:
    return tokenizers.AddedToken(fields["content"], **{flag: fields[flag] for flag in _TOKEN_FLAGS if flag in fields})
  except (KeyError, TypeError) as error:
    raise ValueError(
      f"{place} describes a token by {value!r}; want its text, or an object with it as 'content'. Correct it there."
    ) from error


def _read_stop_ids(
  folder: pathlib.Path, eos: str | None, backend: tokenizers.Tokenizer, vocab_size: int
) -> tuple[int, ...]:
  """The id of the end token, then those of generation_config.json or else config.json, each once."""
  ids = []
  if eos is not None:
    ids.append(backend.token_to_id(eos))
    if ids == [None]:
      raise ValueError(
        f"{folder}: tokenizer.json has no token {eos!r}, the eos_token of tokenizer_config.json or "
        "special_tokens_map.json. Name one that it has."
      )
  for path in (folder / "generation_config.json", folder / "config.json"):
    value = read_json(path).get("eos_token_id")
    listed = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(i) is int and 0 <= i < vocab_size for i in listed):
      raise ValueError(
        f"{path} has eos_token_id {value!r}; want ids that tokenizer.json has, from 0 to {vocab_size - 1}. Correct it, "
        "or download both files from one checkpoint."
      )
    if listed:
      ids += listed
      break
  if not ids:
    raise ValueError(
      f"{folder} names no end token, so no completion would end. Write eos_token, its text, into "
      "tokenizer_config.json, or eos_token_id into generation_config.json."
    )
  return tuple(dict.fromkeys(ids))
