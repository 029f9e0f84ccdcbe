"""Chat templates in the files of a checkpoint, their features and their limits.

The parity tests compare rendered chats and their ids with transformers: for templates in the style of public ones, and
for templates of published models that an installed package contains.
"""

import datetime
import importlib.util
import pathlib

import pytest

from rspo_jax.tokenization.hf import load_tokenizer
from tests.support.tokenizer_cases import (
  CHATML,
  CHECKPOINTS,
  CONVERSATIONS,
  HELLO,
  OPTIONS,
  TOOLS,
  both,
  config,
  write_checkpoint,
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  return load_tokenizer(write_checkpoint(tmp_path_factory.mktemp("checkpoint"), {"chat_template.jinja": CHATML}))


# Locations of templates


FILE = {"chat_template.jinja": "file"}
OLDER = {"chat_template.json": {"chat_template": "older"}}
TWO = [{"name": "default", "template": "a"}, {"name": "rag", "template": "b"}]


@pytest.mark.parametrize(
  ("files", "expected"),
  [
    ({}, {}),
    (config(chat_template=TWO), {"default": "a", "rag": "b"}),
    (OLDER, {"default": "older"}),
    (FILE | {"additional_chat_templates/tool_use.jinja": "tools"}, {"default": "file", "tool_use": "tools"}),
    (FILE | config(chat_template="config") | OLDER, {"default": "file"}),
    (config(chat_template="config") | OLDER, {"default": "config"}),
  ],
)
def test_templates_are_found_in_all_locations_of_checkpoints(load, files, expected):
  tokenizer = load(files)
  assert {name: template.text for name, template in tokenizer.templates.items()} == expected
  for name, text in expected.items():
    assert tokenizer.render_chat(HELLO, template=name) == text


def test_the_tool_use_template_is_the_default_if_there_are_tools(load):
  tokenizer = load(FILE | {"additional_chat_templates/tool_use.jinja": "{{ tools | length }} tools"})
  assert tokenizer.render_chat(HELLO) == "file"
  assert tokenizer.render_chat(HELLO, tools=TOOLS) == "2 tools"
  assert tokenizer.render_chat(HELLO, tools=TOOLS, template="default") == "file"


# Features of templates


def test_special_tokens_of_a_rendered_chat_become_their_ids(tokenizer):
  text = "<|im_start|>user\nHello<|im_end|>\n"
  assert tokenizer.render_chat(HELLO, add_generation_prompt=False) == text
  assert tokenizer.render_chat(HELLO) == f"{text}<|im_start|>assistant\n"
  ids = tokenizer.encode_chat(HELLO)
  assert ids == tokenizer.encode(f"{text}<|im_start|>assistant\n")
  assert [i for i in ids if i <= 2] == [1, 2, 1]


@pytest.mark.parametrize(
  ("template", "expected"),
  [
    ("  {% if true %}\n  yes\n  {% endif %}\n no\n", "  yes\n no"),  # the line of a block is removed
    ("{{ messages[0].content }}|{{ missing }}|{{ documents }}", "Hello||None"),
    ("{{ {'a': '<é>', 'b': [1, none]} | tojson }}", '{"a": "<é>", "b": [1, null]}'),
    ("{{ {'b': 1, 'a': 2} | tojson(indent=1, sort_keys=true) }}", '{\n "a": 2,\n "b": 1\n}'),
    ("{% for i in 'abc' %}{% if i == 'a' %}{% continue %}{% endif %}{{ i }}{% break %}{% endfor %}", "b"),
    ("a{% generation %}\n  {{- messages[0].content }}{% endgeneration %}b", "aHellob"),
    ("{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}", "21"),
    ("{{ eos_token }}{{ bos_token is defined }}{{ pad_token }}", "<|im_end|>False<|endoftext|>"),
    ("{% macro m(x) %}{{ x }}{{ strftime_now('%d %b %Y') }}{% endmacro %}{{ m('&') }}", "&29 Feb 2024"),
    ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "1"),
    ("{{ enable_thinking }}{{ add_generation_prompt }}{{ tools is none }}", "FalseTrueTrue"),
  ],
)  # fmt: skip
def test_templates_have_the_features_of_transformers(tokenizer, template, expected):
  now = datetime.datetime(2024, 2, 29)
  assert tokenizer.render_chat(HELLO, template=template, now=now, enable_thinking=False) == expected


def test_a_variable_overrides_the_special_token_of_its_name(tokenizer):
  assert tokenizer.render_chat(HELLO, template="{{ eos_token }}", eos_token="</s>") == "</s>"


def test_messages_drop_empty_keys_and_have_reasoning_under_each_name(tokenizer):
  messages = [{"role": "assistant", "content": None, "reasoning": "Hm."}]
  assert tokenizer.render_chat(messages, template="{{ messages[0] | tojson(sort_keys=true) }}") == (
    '{"reasoning": "Hm.", "reasoning_content": "Hm.", "role": "assistant", "thinking": "Hm."}'
  )
  assert messages == [{"role": "assistant", "content": None, "reasoning": "Hm."}]


@pytest.mark.parametrize(
  "template",
  [
    "{{ messages.append(1) }}",
    "{{ messages[0].update(a=1) }}",
    "{{ ''.__class__.__mro__ }}",
    "{{ raise_exception.__globals__.json }}",
  ],
)
def test_a_template_cannot_change_its_arguments_or_access_python(tokenizer, template):
  messages = [dict(HELLO[0])]
  with pytest.raises(ValueError, match="SecurityError"):
    tokenizer.render_chat(messages, template=template)
  assert messages == HELLO


# Mistakes


@pytest.mark.parametrize(
  ("files", "message"),
  [
    (config(chat_template=[{"name": "default"}]), r"tokenizer_config.json has a chat_template that is neither"),
    ({"chat_template.json": {"chat_template": 7}}, r"chat_template.json has a chat_template that is neither"),
  ],
)
def test_a_file_with_a_malformed_chat_template_is_named_in_the_error(load, files, message):
  with pytest.raises(ValueError, match=message):
    load(files)


@pytest.mark.parametrize(
  ("messages", "options", "message"),
  [
    (HELLO, {"template": "rag"}, r"no chat template 'rag'; it has \['default'\]"),
    (
      HELLO,
      {"template": "{{ raise_exception('No tools here.') }}"},
      r"template= rejects this conversation: No tools here.",
    ),
    (HELLO, {"template": "a\n{% if %}"}, r"template= is not valid Jinja, line 2"),
    (HELLO, {"template": "{{ 1 + 'a' }}"}, r"rejects this conversation: .*TypeError"),
    ([{"role": "user"}], {}, r"chat_template.jinja rejects this conversation: .*UndefinedError"),
    ([], {}, r"messages are \[\]; want a list"),
    (["Hello"], {}, r"messages are \['Hello'\]; want a list"),
    ([{"role": "user", "content": b"Hello"}], {}, r"messages of a chat must be JSON values"),
    (HELLO, {"tools": [len]}, r"tools of a chat must be JSON values"),
  ],
)
def test_a_chat_that_cannot_be_rendered_is_rejected_with_the_reason(tokenizer, messages, options, message):
  with pytest.raises(ValueError, match=message):
    tokenizer.render_chat(messages, **options)


def test_a_checkpoint_without_a_template_is_an_error_with_the_cure(load):
  with pytest.raises(ValueError, match=r"no chat template 'default'; it has none.*chat_template.jinja"):
    load({}).render_chat(HELLO)


# Comparison with transformers

STYLES = {
  "chatml_with_tools_and_thoughts": """{%- set ns = namespace(last=-1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages | length - 1) - loop.index0 %}
    {%- if ns.last < 0 and message.role == "user" and message.content is string %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- if tools %}
    {{- '<|im_start|>system\\n' + (messages[0].content + '\\n\\n' if messages[0].role == 'system' else '') }}
    {{- 'Functions:' }}
    {%- for tool in tools %}
        {{- '\\n' }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' ~ messages[0].content ~ '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- set text = message.content if message.content is string else '' %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + text + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set thought = message.reasoning_content if message.reasoning_content is string else '' %}
        {%- if '</think>' in text %}
            {%- set thought = text.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set text = text.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last and (loop.last or thought) %}
            {{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- text }}
        {%- for call in message.tool_calls or [] %}
            {%- set call = call.function if call.function else call %}
            {{- '\\n<call>{"name": "' ~ call.name ~ '", "arguments": ' }}
            {{- call.arguments if call.arguments is string else call.arguments | tojson }}
            {{- '}</call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or loop.previtem.role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<result>' + text + '</result>' }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
""",
  "strictly_in_turns": """{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content %}
{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% set system = '' %}{% endif %}
{% for message in rest %}
  {% if (message.role == 'user') != (loop.index0 % 2 == 0) %}
    {{ raise_exception('Roles must alternate: user, assistant, user, ...') }}
  {% endif %}
  {% if message.role == 'user' %}
[INST] {{ (system + '\n\n' if loop.first and system else '') + message.content | trim }} [/INST]
  {%- else %}
 {{ message.content | trim }}{{ eos_token }}
  {% endif %}
{% endfor %}
""",
  "headers_and_a_date": """{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}
{{- "<|start|>system<|end|>\\n\\nToday is " + date_string + "\\n" }}
{%- if tools is not none %}
{%- for tool in tools %}{{- tool | tojson(indent=4) }}{{- "\\n\\n" }}{%- endfor %}
{%- endif %}
{%- for document in documents or [] %}{{- document.title | upper ~ ': ' ~ document.text }}{%- endfor %}
{%- for message in messages %}
    {{- '<|start|>' + message['role'] + '<|end|>\\n\\n' }}
    {%- if 'tool_calls' in message %}
        {%- if message.tool_calls | length != 1 %}{{- raise_exception("One call at a time!") }}{%- endif %}
        {{- message.tool_calls[0].function | tojson }}
    {%- elif message.content is mapping or (message.content is iterable and message.content is not string) %}
        {{- message.content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join('') }}
    {%- else %}
        {{- message.content | trim }}
    {%- endif %}
    {{- '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant<|end|>\\n\\n' }}{%- endif %}
""",
  "macros_loop_controls_and_generation": """{#- Comments leave nothing. -#}
{%- macro types(schema, depth=0) -%}
    {%- for name, property in schema.items() | sort -%}
        {{- ' ' * depth ~ name ~ ': ' -}}
        {{- (property.type if property.type is string else property.type | join('|')) ~ (', ' if not loop.last) -}}
    {%- endfor -%}
{%- endmacro -%}
{% for tool in tools or [] %}
    {% if tool.function.parameters.properties == {} %}
        {% continue %}
    {% endif %}
  {{ tool.function.name }}({{ types(tool.function.parameters.properties, 1) }})
{% endfor %}
    {% for message in messages %}
    {% if message.role == 'judge' %}{% break %}{% endif %}
{{ '<' ~ message.role ~ '>' }}
        {% if message.role == 'assistant' %}
          {% generation %}
 {{ message.thinking | default('', true) }}|{{ message.content | default(none) }}
 {% for call in message.tool_calls %}{{ loop.index }}/{{ loop.length }} {{ call.function.arguments }}{% endfor %}
          {% endgeneration %}
        {% else %}
{{ message.content }}
        {% endif %}
    {% endfor %}
{{ messages | map(attribute='role') | list }} {{ messages[-1] }}
{% if add_generation_prompt %}<assistant>{% endif %}


""",
}  # fmt: skip

TRL = importlib.util.find_spec("trl")  # contains templates of published models; located, not imported
REAL = sorted((pathlib.Path(TRL.origin).parent / "chat_templates").glob("*.jinja")) if TRL else []
NO_REAL = "no installed package has chat templates of published models; pip install --no-deps trl (0.9 MB) does"


def outcome(render):
  """The rendered text, or None if the template rejects the conversation."""
  try:
    return render()
  except Exception:
    return None


def assert_same_chats(ours, theirs):
  """Every conversation under all options gives the same text and ids, or is rejected by both."""
  rendered = 0
  for name, messages in CONVERSATIONS.items():
    for options_name, options in OPTIONS.items():
      options = {"add_generation_prompt": True, **options}
      text = outcome(lambda: ours.render_chat(messages, **options))  # noqa: B023
      expected = outcome(lambda: theirs.apply_chat_template(messages, tokenize=False, **options))  # noqa: B023
      assert text == expected, (name, options_name)
      if text is not None:
        rendered += 1
        ids = theirs.apply_chat_template(messages, tokenize=True, return_dict=False, **options)
        assert ours.encode_chat(messages, **options) == ids, (name, options_name)
  assert rendered >= len(OPTIONS) * 4, "a template that rejects nearly every conversation tests nothing"


@pytest.mark.parity
@pytest.mark.parametrize("checkpoint", ["byte_level", "sentence_piece"])
@pytest.mark.parametrize("style", STYLES)
def test_chats_in_the_style_of_public_templates_equal_transformers(tmp_path, style, checkpoint):
  assert_same_chats(*both(tmp_path, {**CHECKPOINTS[checkpoint], "chat_template.jinja": STYLES[style]}))


@pytest.mark.parity
@pytest.mark.skipif(not REAL, reason=NO_REAL)
@pytest.mark.parametrize("path", REAL, ids=lambda path: path.stem)
def test_chats_of_published_templates_equal_transformers(tmp_path, path):
  files = {"chat_template.jinja": path.read_text(encoding="utf-8")}
  assert_same_chats(*both(tmp_path, files | config(bos_token="<|im_start|>")))


@pytest.mark.parity
@pytest.mark.parametrize(
  "files",
  [
    config(chat_template=CHATML),
    config(chat_template=[{"name": "default", "template": CHATML}, {"name": "tool_use", "template": "{{ tools }}"}]),
    {"chat_template.jinja": CHATML, "additional_chat_templates/tool_use.jinja": "{{ tools }}"},
    {"chat_template.jinja": CHATML} | config(chat_template="no"),
    {"chat_template.jinja": CHATML.replace("\n", "\r\n"), "chat_template.json": {"chat_template": "no"}},
    {"chat_template.jinja": CHATML, "special_tokens_map.json": {"eos_token": "<|endoftext|>"}},
    config(image_token="<think>", chat_template="{{ image_token }}{{ messages }}"),
  ],
)
def test_transformers_reads_the_same_template_and_special_tokens(tmp_path, files):
  assert_same_chats(*both(tmp_path, files))
