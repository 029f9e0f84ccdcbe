"""Chat templates of published checkpoints, rendered as by transformers but without importing it.

Where `read_templates` looks in a folder; the first location with templates is used:

  chat_template.jinja, additional_chat_templates/NAME.jinja   templates in files of their own
  tokenizer_config.json                                       chat_template, one text or several named ones
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

from rspo_jax.files import read_json

# Names of a message's reasoning, the most common first.
_REASONING = ("reasoning_content", "thinking", "reasoning")


class ChatTemplate(NamedTuple):
  """A Jinja template.

  Attributes:
    origin: the file it was read from, for messages.
  """

  text: str
  origin: str


def read_templates(folder: pathlib.Path, config: Mapping[str, Any]) -> dict[str, ChatTemplate]:
  """Chat templates by name; {} if there are none.

  Args:
    config: the content of tokenizer_config.json.
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
    value = read_json(path, absent_ok=True).get("chat_template") or []
  try:
    named = {"default": value} if isinstance(value, str) else {item["name"]: item["template"] for item in value}
  except (KeyError, TypeError) as error:
    raise ValueError(
      f"{path} has a chat_template that is neither text nor a list of {{'name': ..., 'template': ...}}. Correct it, or "
      "write chat_template.jinja beside it, which takes precedence."
    ) from error
  return {name: ChatTemplate(text, f"{name!r} of {path}") for name, text in named.items()}


def choose_template(
  folder: pathlib.Path, templates: Mapping[str, ChatTemplate], template: str | None, tools: Any
) -> ChatTemplate:
  """The template for a conversation.

  Args:
    folder: of the checkpoint, for messages.
    template: a name in `templates`, or Jinja text; None selects 'tool_use' if there are tools and such a template, else
      'default'.
  Raises:
    ValueError: no template of that name.
  """
  if template is None:
    template = "tool_use" if tools is not None and "tool_use" in templates else "default"
  if template in templates:
    return templates[template]
  if "{{" in template or "{%" in template:
    return ChatTemplate(template, "given as template=")
  raise ValueError(
    f"{folder} has no chat template {template!r}; it has {sorted(templates) or 'none'}. Pass one of these, "
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
  """Renders a conversation; `HFTokenizer.render_chat` describes arguments and errors.

  Args:
    special: special tokens by name; a variable of the same name takes precedence.
  """
  context = {"tools": _copy_json(tools, "tools"), "documents": None, **special, **_copy_json(variables, "variables")}
  context["messages"] = _copy_messages(messages)
  context["strftime_now"] = lambda form: (now or datetime.datetime.now()).strftime(form)
  try:
    return _compile(template.text).render(context, add_generation_prompt=add_generation_prompt)
  except jinja2.TemplateSyntaxError as error:
    raise ValueError(
      f"The chat template {template.origin} is not valid Jinja, line {error.lineno}: {error.message}. Correct it, "
      "or pass another template as template=."
    ) from error
  except Exception as error:  # a template is foreign code and can raise anything
    raise ValueError(
      f"The chat template {template.origin} rejects this conversation: {error} ({type(error).__name__}). Pass the "
      "messages that it expects, or another template as template=."
    ) from error


@functools.lru_cache(maxsize=32)
def _compile(text: str) -> jinja2.Template:
  """A compiled template with transformers' settings and extensions, in a sandbox: checkpoints are not trusted."""
  environment = sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, ext.LoopControlExtension]
  )
  environment.filters["tojson"] = _to_json
  environment.globals["raise_exception"] = _raise_exception
  return environment.from_string(text)


class _Generation(ext.Extension):
  """`{% generation %}` ... `{% endgeneration %}` marks the assistant's tokens; it renders as its content."""

  tags = {"generation"}  # noqa: RUF012 (jinja2 requires a set)

  def parse(self, parser: Any) -> nodes.Node:
    line = next(parser.stream).lineno
    return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _to_json(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
  """Replaces Jinja's own filter, which escapes `<` for HTML."""
  return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str):
  raise jinja2.TemplateError(message)


def _copy_json(value: Any, name: str) -> Any:
  """A copy in JSON's types, so that a template cannot change the caller's objects or call their methods."""
  try:
    return json.loads(json.dumps(value))
  except (TypeError, ValueError) as error:
    raise ValueError(
      f"{name} of a chat must be JSON values (dicts, lists, text, numbers, None): {error}. Convert them first."
    ) from error


def _copy_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
  """A copy of the messages without keys that are None, and with the reasoning under each name that templates read."""
  copies = _copy_json(messages, "messages")
  if not isinstance(copies, list) or not copies or not all(isinstance(copy, dict) for copy in copies):
    raise ValueError(f"messages are {messages!r}; want a list of at least one {{'role': ..., 'content': ...}}.")
  copies = [{key: value for key, value in copy.items() if value is not None} for copy in copies]
  for index, copy in enumerate(copies):
    reasoning = next((copy[name] for name in _REASONING if name in copy), None)
    if reasoning is not None:
      copies[index] = {"thinking": reasoning, **copy, "reasoning_content": reasoning}
  return copies
