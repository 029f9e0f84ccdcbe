"""Tokenizers and chat templates of published checkpoints, read from their files without torch or transformers.

Files of a folder that `load_tokenizer` reads:

  tokenizer.json                        vocabulary and segmentation; the only required file
  tokenizer_config.json                 added tokens, names of special tokens, add_bos_token
  special_tokens_map.json               names of special tokens, if tokenizer_config.json lists no added tokens
  generation_config.json, config.json   eos_token_id, one or several; config.json is used if the other has none

`rspo_jax.tokenization.chat_template` finds and renders chat templates.

If files disagree, the precedence is that of transformers 5, except for add_bos_token, which transformers 5 ignores and
which is followed here.
"""

import dataclasses
import datetime
import itertools
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import tokenizers

from rspo_jax.files import read_json
from rspo_jax.tokenization.basic import UNKNOWN
from rspo_jax.tokenization.chat_template import ChatTemplate, choose_template, read_templates, render_template

_TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclasses.dataclass(frozen=True, eq=False)
class HFTokenizer:
  """The tokenizer of a checkpoint, from `load_tokenizer`; implements `rspo_jax.tokenization.basic.Tokenizer`.

  Attributes:
    vocab_size: largest id + 1, including added tokens. The model's vocabulary is often larger, for padding.
    eos_id: the end token. stop_ids: eos_id, then the other ids that generation stops at.
    bos_id: first token of a text without a chat template, None for none; from add_bos_token, or from tokenizer.json if
      that is not set. `encode` does not add it.
    special: special tokens by the names that templates use, {'eos_token': '<|im_end|>', ...}.
    templates: chat templates by name. The default is 'default', or 'tool_use' if there are tools.
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
    """The ids of a text, without begin or end token. A special token spelled out in the text becomes its id."""
    try:
      return self.backend.encode(text, add_special_tokens=False).ids
    except TypeError as error:
      raise ValueError(
        f"{text!r} cannot be encoded as UTF-8 (an unpaired surrogate?). Correct or drop the example."
      ) from error

  def decode(self, ids: Iterable[int]) -> str:
    """The text up to the first stop token, without special tokens. Ids without a token become U+FFFD."""
    before_stop = itertools.takewhile(lambda i: i not in self.stop_ids, map(int, ids))
    text = []
    for known, run in itertools.groupby(before_stop, key=self._has_token):
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
    """A conversation in the model's chat format, equal to the result of transformers' `apply_chat_template`.

    Args:
      messages: at least one {'role': 'user', 'content': '...'}, with further keys that the template reads
        ('tool_calls', ...).
      add_generation_prompt: end with the start of an answer.
      tools: JSON schemas of the functions that the model may call.
      template: a name in `templates`, or Jinja text.
      now: the time that `strftime_now` formats; None for the current time. Templates that write the date (gpt-oss, some
        of Llama) give prompts that change at midnight: pass a fixed time to reproduce a run.
      variables: further variables of the template, such as enable_thinking=False.
    Raises:
      ValueError: no such template, arguments that are not JSON values, or a template that is not Jinja or rejects the
        conversation; names the file and the reason.
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
    """The ids of `render_chat(messages, **options)`. Special tokens spelled out in a message become their ids too."""
    return self.encode(self.render_chat(messages, **options))

  def _has_token(self, i: int) -> bool:
    return 0 <= i < self.vocab_size and self.backend.id_to_token(i) is not None


def load_tokenizer(folder: str | os.PathLike) -> HFTokenizer:
  """The tokenizer and the chat templates of a checkpoint's folder; this module's docstring lists the files.

  Raises:
    ValueError: no folder, no tokenizer.json, a file that is broken or contradicts another, no end token; names the
      file and the cure.
  """
  folder = pathlib.Path(folder)
  backend = _read_backend(folder)
  config = read_json(folder / "tokenizer_config.json", absent_ok=True)
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
  """tokenizer.json, with its truncation and padding switched off."""
  if not folder.is_dir():
    raise ValueError(f"{folder} is not a folder. Name the folder of a downloaded checkpoint.")
  path = folder / "tokenizer.json"
  if not path.is_file():
    raise ValueError(
      f"{folder} has no tokenizer.json. Convert its tokenizer once, in an environment with transformers: "
      f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
    )
  try:
    backend = tokenizers.Tokenizer.from_file(str(path))
  except Exception as error:  # the package raises plain Exception
    raise ValueError(
      f"{path} cannot be read: {error}. Download it again (a pointer of Git LFS is not the file); if it is complete, "
      f"install a newer `tokenizers` than {tokenizers.__version__}."
    ) from error
  backend.no_truncation()
  backend.no_padding()
  return backend


def _add_tokens(folder: pathlib.Path, config: Mapping[str, Any], backend: tokenizers.Tokenizer) -> None:
  """Adds the tokens of `added_tokens_decoder`; its flags override those of tokenizer.json."""
  path = str(folder / "tokenizer_config.json")
  listed = {int(i): _added_token(fields, path) for i, fields in (config.get("added_tokens_decoder") or {}).items()}
  backend.add_tokens([listed[i] for i in sorted(listed)])
  for i, token in listed.items():
    actual = backend.token_to_id(token.content)
    if actual != i:
      raise ValueError(
        f"{path} gives {token.content!r} the id {i}, but tokenizer.json gives it {actual}. The two files belong to "
        "different checkpoints: download both from the same one."
      )


def _name_special_tokens(
  folder: pathlib.Path, config: Mapping[str, Any], backend: tokenizers.Tokenizer
) -> dict[str, str]:
  """{'eos_token': '<|im_end|>', ...}; tokens that are plain in tokenizer.json become special in the backend."""
  if "added_tokens_decoder" not in config:
    config = {**config, **read_json(folder / "special_tokens_map.json", absent_ok=True)}
  files = f"{folder}: tokenizer_config.json or special_tokens_map.json"
  named = {name: token for name, token in config.items() if name.endswith("_token") and isinstance(token, str | dict)}
  unnamed = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
  if isinstance(unnamed, dict):
    named, unnamed = {**named, **unnamed}, []
  named = {name: _added_token(token, files) for name, token in named.items()}
  added = {token.content for token in backend.get_added_tokens_decoder().values()}
  for token in (*named.values(), *(_added_token(token, files) for token in unnamed)):
    # A token without an id does not get one: the model has no embedding for it.
    if token.content not in added and backend.token_to_id(token.content) is not None:
      backend.add_special_tokens([token])
  return {name: token.content for name, token in named.items()}


def _added_token(value: str | Mapping[str, Any], origin: str) -> tokenizers.AddedToken:
  fields = {"content": value, "special": True} if isinstance(value, str) else value
  try:
    return tokenizers.AddedToken(fields["content"], **{flag: fields[flag] for flag in _TOKEN_FLAGS if flag in fields})
  except (KeyError, TypeError) as error:
    raise ValueError(
      f"{origin} describes a token by {value!r}; want its text, or an object with the text as 'content'. Correct it."
    ) from error


def _read_stop_ids(
  folder: pathlib.Path, eos: str | None, backend: tokenizers.Tokenizer, vocab_size: int
) -> tuple[int, ...]:
  """The id of the end token, then those of generation_config.json or else config.json, without duplicates."""
  ids = []
  if eos is not None:
    ids.append(backend.token_to_id(eos))
    if ids == [None]:
      raise ValueError(
        f"{folder}: tokenizer.json has no token {eos!r}, the eos_token of tokenizer_config.json or "
        "special_tokens_map.json. Set eos_token to one of its tokens."
      )
  for path in (folder / "generation_config.json", folder / "config.json"):
    value = read_json(path, absent_ok=True).get("eos_token_id")
    listed = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(i) is int and 0 <= i < vocab_size for i in listed):
      raise ValueError(
        f"{path} has eos_token_id {value!r}; want ids of tokenizer.json, 0 to {vocab_size - 1}. Correct it, or "
        "download both files from the same checkpoint."
      )
    if listed:
      ids += listed
      break
  if not ids:
    raise ValueError(
      f"{folder} names no end token, so no completion would end. Write its text as eos_token into "
      "tokenizer_config.json, or eos_token_id into generation_config.json."
    )
  return tuple(dict.fromkeys(ids))
