"""Chat templates of published checkpoints, rendered as transformers does, without it.

Where `read_templates` looks in a folder; the first place that has any counts:

  chat_template.jinja, additional_chat_templates/NAME.jinja   templates in files of their own
  tokenizer_config.json                                       chat_template, one text or several with names
  chat_template.json                                          the same, in older checkpoints
"""

import datetime
import functools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
from jinja2 import ext, nodes, sandbox

# What a message's reasoning is called, the usual name first.
_REASONING = ("reasoning_content", "thinking", "reasoning")


class ChatTemplate(NamedTuple):
  """A template in Jinja.

  Attributes:
    place: the file it came from, for messages.
  """

  text: str
  place: str


def read_templates(folder: pathlib.Path, config: Mapping[str, Any]) -> dict[str, ChatTemplate]:
  """Chat templates by name, `config` being the content of tokenizer_config.json; {} if there are none.

  Raises:
    ValueError: a chat_template that is neither text nor a list of named ones; names the file.
  """
  path = folder / "chat_template.jinja"
  files = {"default": path} if path.is_file() else {}
  files |= {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
  if files:
    return {name: ChatTemplate(path.read_text(encoding="utf-8"), str(path)) for name, path in files.items()}
  path, value = folder / "tokenizer_config.json", config.get("chat_template")
  if not value:
    path = folder / "chat_template.json"
    value = read_json(path).get("chat_template") or []
  try:
    named = {"default": value} if isinstance(value, str) else {each["name"]: each["template"] for each in value}
  except (KeyError, TypeError) as error:
    raise ValueError(
      f"{path} has a chat_template that is neither text nor a list of {{'name': ..., 'template': ...}}. Correct it, or "
      "write chat_template.jinja beside it, which counts before it."
    ) from error
  return {name: ChatTemplate(text, f"{name!r} of {path}") for name, text in named.items()}


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """The object in a JSON file of a checkpoint, {} if there is no such file. A broken one is a ValueError."""
  if not path.is_file():
    return {}
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
      raise ValueError(f"it holds a {type(value).__name__}, not an object")
  except ValueError as error:
    raise ValueError(f"{path} cannot be read: {error}. Download it again.") from error
  return value


def choose_template(
  folder: pathlib.Path, templates: Mapping[str, ChatTemplate], wanted: str | None, tools: Any
) -> ChatTemplate:
  """The one that `wanted` names or is, as Jinja text; if None, 'tool_use' where there are tools, else 'default'."""
  if wanted is None:
    wanted = "tool_use" if tools is not None and "tool_use" in templates else "default"
  if wanted in templates:
    return templates[wanted]
  if "{{" in wanted or "{%" in wanted:
    return ChatTemplate(wanted, "given as template=")
  raise ValueError(
    f"{folder} has no chat template {wanted!r}; it has {sorted(templates) or 'none'}. Pass one of these, "
    "or Jinja text, as template=, or write chat_template.jinja there."
  )


def render_template(
  template: ChatTemplate,
  messages: Sequence[Mapping[str, Any]],
  *,
  add_generation_prompt: bool,
  tools: Sequence[Mapping[str, Any]] | None,
  now: datetime.datetime | None,
  special: Mapping[str, str],
  variables: Mapping[str, Any],
) -> str:
  """A conversation as a template writes it; `HFTokenizer.render_chat` describes arguments and errors.

  Args:
    special: special tokens by name; a variable of the same name goes before.
  """
  given = {"tools": _plain(tools, "tools"), "documents": None, **special, **_plain(variables, "variables")}
  given["messages"] = _plain_messages(messages)
  given["strftime_now"] = lambda form: (now or datetime.datetime.now()).strftime(form)
  try:
    return _compile(template.text).render(given, add_generation_prompt=add_generation_prompt)
  except jinja2.TemplateSyntaxError as error:
    raise ValueError(
      f"The chat template {template.place} is not valid Jinja, line {error.lineno}: {error.message}. Correct it there, "
      "or pass another as template=."
    ) from error
  except Exception as error:  # a template is foreign code and fails as it likes
    raise ValueError(
      f"The chat template {template.place} refuses this conversation: {error} ({type(error).__name__}). Give the "
      "messages it wants, or pass another as template=."
    ) from error


@functools.lru_cache(maxsize=32)
def _compile(text: str) -> jinja2.Template:
  """A template in the dialect that chat templates are written in, in a sandbox: they come from strangers."""
  environment = sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, ext.LoopControlExtension]
  )
  environment.filters["tojson"] = _to_json
  environment.globals["raise_exception"] = _raise_exception
  return environment.from_string(text)


class _Generation(ext.Extension):
  """`{% generation %}` ... `{% endgeneration %}` marks what the model wrote; it renders as what it encloses."""

  tags = {"generation"}  # noqa: RUF012 (jinja2 wants a set)

  def parse(self, parser: Any) -> nodes.Node:
    line = next(parser.stream).lineno
    return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _to_json(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
  """Jinja's own filter would write `<` as an escape, for HTML."""
  return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str):
  raise jinja2.TemplateError(message)


def _plain(value: Any, name: str) -> Any:
  """A copy of JSON's own types: a template gets nothing it could change, and no methods beyond theirs."""
  try:
    return json.loads(json.dumps(value))
  except (TypeError, ValueError) as error:
    raise ValueError(
      f"{name} of a chat must be what JSON can hold (dicts, lists, text, numbers, None): {error}."
    ) from error


def _plain_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
  """Messages without keys that are None, and with reasoning under each name that templates look for."""
  rows = _plain(messages, "messages")
  if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
    raise ValueError(f"messages are {messages!r}; want a list of at least one {{'role': ..., 'content': ...}}.")
  rows = [{key: value for key, value in row.items() if value is not None} for row in rows]
  for index, row in enumerate(rows):
    reasoning = next((row[name] for name in _REASONING if name in row), None)
    if reasoning is not None:
      rows[index] = {"thinking": reasoning, **row, "reasoning_content": reasoning}
  return rows
