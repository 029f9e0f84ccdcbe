"""Tokenizers and chat templates from the files of a checkpoint; the checkpoints are made here, with tiny vocabularies.

The parity tests hold them against transformers: ids, texts and rendered chats, for templates written here in the style
of public ones and for the real ones that an installed package carries.
"""

import datetime
import functools
import importlib.util
import json
import pathlib

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from rspo_jax.hf_tokenizer import load_tokenizer
from rspo_jax.tokenizer import pad_left

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
WRITTEN = ("<think>", "</think>")  # added tokens that are not special: text that happens to be one token
CORPUS = [
  "The quick brown fox jumps over the lazy dog. 3 7 12=22: 3+7+12",
  "def area(r):\n  return 3.14 * r ** 2  # the area of a circle\n",
  "Äpfel, Öl und Übermut; naïve café; Привет, мир; 你好,世界; \t tabs\nand   spaces",
]
CONFIG = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
CHATML = (
  "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + eos_token + '\n' }}"
  "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HELLO = [{"role": "user", "content": "Hello"}]


@functools.cache
def byte_level() -> str:
  """tokenizer.json of a byte-level BPE, as Qwen, Llama 3 and gpt-oss have."""
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=330,
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    special_tokens=list(SPECIAL),
    show_progress=False,
  )
  tokenizer.train_from_iterator(CORPUS, trainer)
  tokenizer.add_tokens([tokenizers.AddedToken(token, special=False, normalized=False) for token in WRITTEN])
  return tokenizer.to_str()


def config(**entries) -> dict:
  """tokenizer_config.json with more entries, or other ones, than CONFIG."""
  return {"tokenizer_config.json": CONFIG | entries}


def write_checkpoint(folder: pathlib.Path, files: dict) -> pathlib.Path:
  """Files by name, JSON where they are not text, None for one that is missing."""
  for name, content in {"tokenizer.json": byte_level(), "tokenizer_config.json": CONFIG, **files}.items():
    if content is not None:
      path = folder / name
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
  return folder


@pytest.fixture
def load(tmp_path):
  """(files) -> the tokenizer of a checkpoint that has them."""
  return lambda files: load_tokenizer(write_checkpoint(tmp_path, files))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  return load_tokenizer(write_checkpoint(tmp_path_factory.mktemp("checkpoint"), {"chat_template.jinja": CHATML}))


def token_id(tokenizer, text):
  return tokenizer.backend.token_to_id(text)


# Text and ids


@given(text=st.text())
def test_any_text_survives_byte_level_tokens(tokenizer, text):
  ids = tokenizer.encode(text)
  assert all(0 <= i < tokenizer.vocab_size for i in ids)
  assert tokenizer.decode(ids) == text
  assert tokenizer.decode(np.array([*ids, tokenizer.eos_id, 5], np.int32)) == text


@given(before=st.text(), after=st.text(), special=st.sampled_from(SPECIAL))
def test_a_special_token_written_out_is_one_id_wherever_it_stands(tokenizer, before, after, special):
  ids = tokenizer.encode(before + special + after)
  assert ids == [*tokenizer.encode(before), token_id(tokenizer, special), *tokenizer.encode(after)]


@given(text=st.lists(st.sampled_from(["<|", "|>", "im_start", "im_end", "endoftext", "<", "|", ">", " "])).map("".join))
def test_text_without_special_tokens_never_becomes_one(tokenizer, text):
  wanted = [special for special in SPECIAL if special in text]
  found = [i for i in tokenizer.encode(text) if i in {token_id(tokenizer, special) for special in SPECIAL}]
  assert bool(found) == bool(wanted)


def test_decoding_leaves_out_special_tokens_and_keeps_the_other_added_ones(tokenizer):
  text = "<|im_start|>assistant\n<think>Hm.</think>Yes<|endoftext|>."
  assert tokenizer.decode(tokenizer.encode(text)) == "assistant\n<think>Hm.</think>Yes."


def test_ids_without_a_token_read_as_replacement_characters(tokenizer):
  a, z = tokenizer.encode("a!")
  size = tokenizer.vocab_size
  assert tokenizer.decode([a, size, size + 7, -1, z, 10**9]) == "a\ufffd\ufffd\ufffd!\ufffd"


def test_the_vocabulary_counts_added_tokens(tokenizer):
  assert tokenizer.vocab_size == 330 + len(WRITTEN)
  assert token_id(tokenizer, WRITTEN[-1]) == tokenizer.vocab_size - 1


def test_truncation_and_padding_of_the_file_are_off(load):
  backend = tokenizers.Tokenizer.from_str(byte_level())
  backend.enable_truncation(4)
  backend.enable_padding(length=64)
  text = CORPUS[0]
  tokenizer = load({"tokenizer.json": backend.to_str()})
  assert tokenizer.decode(tokenizer.encode(text)) == text
  assert 4 < len(tokenizer.encode(text)) < 64


def test_half_a_surrogate_pair_is_refused_as_a_value_error(tokenizer):
  with pytest.raises(ValueError, match="half a surrogate pair"):
    tokenizer.encode("a\ud83d")


def test_an_encoded_prompt_fits_the_padding_of_prompts(tokenizer):
  tokens, valid = pad_left([tokenizer.encode_chat(HELLO), tokenizer.encode("Hi")], 32)
  assert tokenizer.decode(tokens[1][valid[1]]) == "Hi"


# End and begin tokens


@pytest.mark.parametrize(
  ("files", "wanted"),
  [
    ({}, ["<|im_end|>"]),
    ({"generation_config.json": {"eos_token_id": [2, 0]}}, ["<|im_end|>", "<|endoftext|>"]),
    ({"generation_config.json": {"eos_token_id": [0, 1, 2]}}, ["<|im_end|>", "<|endoftext|>", "<|im_start|>"]),
    ({"generation_config.json": {"eos_token_id": 0}}, ["<|im_end|>", "<|endoftext|>"]),
    ({"config.json": {"eos_token_id": 0}}, ["<|im_end|>", "<|endoftext|>"]),
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
def test_stop_ids_are_the_end_token_and_what_generation_stops_at(load, files, wanted):
  tokenizer = load(files)
  assert tokenizer.stop_ids == tuple(token_id(tokenizer, token) for token in wanted)
  assert tokenizer.eos_id == tokenizer.stop_ids[0]
  for stop in wanted:
    assert tokenizer.decode(tokenizer.encode(f"3+7{stop}12")) == "3+7"


def test_a_text_begins_with_what_the_file_or_the_config_puts_there(load):
  begins = processors.TemplateProcessing("<|endoftext|> $A", None, [("<|endoftext|>", 0)])
  backend = tokenizers.Tokenizer.from_str(byte_level())
  backend.post_processor = begins
  begun = {"tokenizer.json": backend.to_str()}
  bos = {"bos_token": "<|endoftext|>"}
  assert load(config(**bos)).bos_id is None
  assert load(config(**bos, add_bos_token=True)).bos_id == 0
  assert load(config(**bos) | begun).bos_id == 0
  assert load(config(**bos, add_bos_token=False) | begun).bos_id is None
  assert load(begun).bos_id is None  # the token has no name here
  assert load(config(**bos) | begun).encode("3+7")[0] != 0


# Special and added tokens


def test_names_come_from_the_map_of_special_tokens_only_where_added_tokens_are_not_listed(load):
  special_map = {"eos_token": {"content": "<|endoftext|>", "rstrip": False}, "additional_special_tokens": ["<think>"]}
  files = {"special_tokens_map.json": special_map}
  assert load(files).eos_id == 0
  listed = {"2": {"content": "<|im_end|>", "special": True}}
  assert load(files | config(added_tokens_decoder=listed)).eos_id == 2


CALLED_SPECIAL = [  # entries of tokenizer_config.json; ID stands for the token's
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
def test_a_plain_token_that_the_config_calls_special_is_special(load, entries):
  i = token_id(load({}), "and")
  assert i is not None
  assert load({}).decode([i]) == "and"
  tokenizer = load(config(**fill_in(entries, i)))
  assert tokenizer.decode([i]) == ""
  assert tokenizer.encode("randy") == [*tokenizer.encode("r"), i, *tokenizer.encode("y")]


def test_tokens_that_only_the_config_lists_are_added_in_the_order_of_their_ids(load):
  size = load({}).vocab_size
  listed = {str(size + k): {"content": f"<t{k}>", "special": k % 2 == 0} for k in (10, 2, 1, 0, 3, 4, 5, 6, 7, 8, 9)}
  tokenizer = load(config(added_tokens_decoder=listed))
  assert tokenizer.vocab_size == size + 11
  assert tokenizer.encode("<t10><t2>") == [size + 10, size + 2]
  assert tokenizer.decode([size, size + 1]) == "<t1>"


def test_a_special_token_without_an_id_is_given_none(load):
  tokenizer = load(config(pad_token="<pad>"))
  assert tokenizer.vocab_size == load({}).vocab_size
  assert tokenizer.special["pad_token"] == "<pad>"


# Where templates are


FILE = {"chat_template.jinja": "file"}
OLDER = {"chat_template.json": {"chat_template": "older"}}
TWO = [{"name": "default", "template": "a"}, {"name": "rag", "template": "b"}]


@pytest.mark.parametrize(
  ("files", "wanted"),
  [
    ({}, {}),
    (FILE, {"default": "file"}),
    (config(chat_template="config"), {"default": "config"}),
    (config(chat_template=TWO), {"default": "a", "rag": "b"}),
    (OLDER, {"default": "older"}),
    (FILE | {"additional_chat_templates/tool_use.jinja": "tools"}, {"default": "file", "tool_use": "tools"}),
    (FILE | config(chat_template="config") | OLDER, {"default": "file"}),
    (config(chat_template="config") | OLDER, {"default": "config"}),
  ],
)
def test_templates_are_found_wherever_checkpoints_keep_them(load, files, wanted):
  tokenizer = load(files)
  assert {name: template.text for name, template in tokenizer.templates.items()} == wanted
  for name, text in wanted.items():
    assert tokenizer.render_chat(HELLO, template=name) == text


def test_the_template_for_tools_is_used_if_there_are_tools(load):
  tokenizer = load(FILE | {"additional_chat_templates/tool_use.jinja": "{{ tools | length }} tools"})
  assert tokenizer.render_chat(HELLO) == "file"
  assert tokenizer.render_chat(HELLO, tools=TOOLS) == "2 tools"
  assert tokenizer.render_chat(HELLO, tools=TOOLS, template="default") == "file"


# What templates can do


def test_a_chat_is_rendered_and_its_special_tokens_become_ids(tokenizer):
  text = "<|im_start|>user\nHello<|im_end|>\n"
  assert tokenizer.render_chat(HELLO, add_generation_prompt=False) == text
  assert tokenizer.render_chat(HELLO) == f"{text}<|im_start|>assistant\n"
  ids = tokenizer.encode_chat(HELLO)
  assert ids == tokenizer.encode(f"{text}<|im_start|>assistant\n")
  assert [i for i in ids if i <= 2] == [1, 2, 1]


@pytest.mark.parametrize(
  ("template", "wanted"),
  [
    ("  {% if true %}\n  yes\n  {% endif %}\n no\n", "  yes\n no"),  # a block's line leaves no trace
    ("{{ messages[0].content }}|{{ missing }}|{{ documents }}", "Hello||None"),
    ("{{ {'a': '<é>', 'b': [1, none]} | tojson }}", '{"a": "<é>", "b": [1, null]}'),
    ("{{ {'b': 1, 'a': 2} | tojson(indent=1, sort_keys=true) }}", '{\n "a": 2,\n "b": 1\n}'),
    ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
    ("{% for i in range(3) %}{% if i == 1 %}{% continue %}{% endif %}{{ i }}{% endfor %}", "02"),
    ("a{% generation %}\n  {{- messages[0].content }}{% endgeneration %}b", "aHellob"),
    ("{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}", "21"),
    ("{{ strftime_now('%d %b %Y') }}", "29 Feb 2024"),
    ("{{ eos_token }}{{ bos_token is defined }}{{ pad_token }}", "<|im_end|>False<|endoftext|>"),
    ("{% macro m(x) %}<{{ x }}{{ strftime_now('%Y') }}>{% endmacro %}{{ m(1) }}{{ m('&') }}", "<12024><&2024>"),
    ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "1"),
    ("{{ enable_thinking }}{{ add_generation_prompt }}{{ tools is none }}", "FalseTrueTrue"),
  ],
)  # fmt: skip
def test_templates_have_what_chat_templates_expect(tokenizer, template, wanted):
  now = datetime.datetime(2024, 2, 29)
  assert tokenizer.render_chat(HELLO, template=template, now=now, enable_thinking=False) == wanted


def test_a_variable_goes_before_the_special_token_of_its_name(tokenizer):
  assert tokenizer.render_chat(HELLO, template="{{ eos_token }}", eos_token="</s>") == "</s>"


def test_messages_lose_empty_keys_and_show_reasoning_under_each_name(tokenizer):
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
def test_a_template_cannot_change_its_arguments_or_reach_into_python(tokenizer, template):
  messages = [dict(HELLO[0])]
  with pytest.raises(ValueError, match="SecurityError"):
    tokenizer.render_chat(messages, template=template)
  assert messages == HELLO


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
      r"says that '<\|im_end\|>' has id 7, but with tokenizer.json it gets 2",
    ),
    (config(chat_template=[{"name": "default"}]), r"chat_template that is neither"),
    ({"chat_template.json": {"chat_template": 7}}, r"chat_template.json has a chat_template that is neither"),
  ],
)
def test_what_is_wrong_with_a_checkpoint_is_named(load, files, message):
  with pytest.raises(ValueError, match=message):
    load(files)


def test_a_folder_that_is_not_there_is_named(tmp_path):
  with pytest.raises(ValueError, match=r"nowhere is not a folder"):
    load_tokenizer(tmp_path / "nowhere")


@pytest.mark.parametrize(
  ("messages", "options", "message"),
  [
    (HELLO, {"template": "rag"}, r"no chat template 'rag'; it has \['default'\]"),
    (
      HELLO,
      {"template": "{{ raise_exception('No tools here.') }}"},
      r"template= refuses this conversation: No tools here.",
    ),
    (HELLO, {"template": "a\n{% if %}"}, r"template= is not valid Jinja, line 2"),
    (HELLO, {"template": "{{ messages[3].content.strip() }}"}, r"refuses this conversation: .*UndefinedError"),
    (HELLO, {"template": "{{ 1 + 'a' }}"}, r"refuses this conversation: .*TypeError"),
    ([{"role": "user"}], {}, r"chat_template.jinja refuses this conversation"),
    ([], {}, r"messages are \[\]; want a list"),
    (["Hello"], {}, r"messages are \['Hello'\]; want a list"),
    ([{"role": "user", "content": b"Hello"}], {}, r"messages of a chat must be what JSON can hold"),
    (HELLO, {"tools": [len]}, r"tools of a chat must be what JSON can hold"),
  ],
)
def test_a_chat_that_cannot_be_rendered_says_where_and_why(tokenizer, messages, options, message):
  with pytest.raises(ValueError, match=message):
    tokenizer.render_chat(messages, **options)


def test_a_checkpoint_without_a_template_says_where_to_put_one(load):
  with pytest.raises(ValueError, match=r"no chat template 'default'; it has none.*chat_template.jinja"):
    load({}).render_chat(HELLO)


# Against transformers

TOOLS = [
  {
    "type": "function",
    "function": {
      "name": "weather",
      "description": "The weather of a town, in °C & <b>mm</b>.",
      "parameters": {
        "type": "object",
        "properties": {"town": {"type": "string", "description": "its name"}, "days": {"type": "integer"}},
        "required": ["town"],
      },
    },
  },
  {
    "type": "function",
    "function": {
      "name": "now",
      "description": "The time.",
      "parameters": {"type": "object", "properties": {"zone": {"type": ["string", "null"]}}},
      "return": {"type": "string"},
    },
  },
]


def say(role, content, **more):
  return {"role": role, "content": content, **more}


def call(name, id, arguments):
  return {"type": "function", "id": id, "function": {"name": name, "arguments": arguments}}


WEATHER = call("weather", "call00001", {"town": "Köln", "days": 2})
TIME = call("now", "call00002", {})
CONVERSATIONS = {
  "one_question": HELLO,
  "system": [say("system", "You are terse."), say("user", "3 7 12=22:")],
  "system_alone": [say("system", "You are terse.")],
  "empty": [say("system", ""), say("user", "")],
  "answered": [say("user", "2+2?"), say("assistant", "4")],
  "turns": [
    say("system", " Mind  the spaces.\n"),
    say("user", "  a\n\nb \t"),
    say("assistant", "\n c\n"),
    say("user", "d"),
    say("assistant", "<think>\nWhich?\n</think>\n\ne"),
    say("user", "f\n"),
  ],
  "unicode": [
    say("user", "你好 🙂 é e\u0301 <b>&amp;\"'\\</b> \u2028 {{ x }} {% y %} \x07"),
    say("assistant", "😀"),
    say("user", "ß"),
  ],
  "special_tokens_in_text": [say("user", "<|im_end|><s></s>[INST]<|eot_id|><end_of_turn>")],
  "reasoning": [say("user", "x?"), say("assistant", "y", reasoning_content="Because."), say("user", "z?")],
  "thinking_at_the_end": [say("user", "x?"), say("assistant", "y", thinking="Because.")],
  "tool_call": [
    say("system", "Use tools."),
    say("user", "Weather?"),
    say("assistant", None, tool_calls=[WEATHER]),
    say("tool", '{"celsius": 7}', name="weather", tool_call_id="call00001"),
    say("assistant", "7 °C."),
    say("user", "Thanks"),
  ],
  "two_tool_calls": [
    say("user", "Weather and time?"),
    say("assistant", "Let me see.", tool_calls=[WEATHER, TIME]),
    say("tool", "7", name="weather", tool_call_id="call00001"),
    say("tool", "12:00", name="now", tool_call_id="call00002"),
  ],
  "tool_call_of_text": [
    say("user", "Weather?"),
    say("assistant", "", tool_calls=[call("weather", "call00001", '{"town": "Bonn"}')]),
    say("tool", "8", tool_call_id="call00001"),
  ],
  "parts": [say("user", [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}])],
  "two_users": [say("user", "a"), say("user", "b")],
  "strange_role": [say("user", "a"), say("judge", "b")],
  "developer": [say("developer", "Be kind."), say("user", "a")],
}  # fmt: skip
OPTIONS = {
  "answer_next": {},
  "no_prompt": {"add_generation_prompt": False},
  "tools": {"tools": TOOLS},
  "no_thinking": {"enable_thinking": False, "thinking": False, "reasoning_effort": "low"},
  "tools_and_variables": {
    "tools": TOOLS[:1],
    "add_generation_prompt": False,
    "enable_thinking": True,
    "date_string": "29 Feb 2024",
    "model_identity": "You are a test.",
    "custom_tools": None,
    "documents": [{"title": "t", "text": "x < y"}],
  },
}

STYLES = {
  "chatml": CHATML,
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

PACKAGES_WITH_TEMPLATES = {"trl": "chat_templates"}  # package -> its folder of real templates


def real_templates():
  """Templates of published models in an installed package, which is found and not imported."""
  for package, folder in PACKAGES_WITH_TEMPLATES.items():
    spec = importlib.util.find_spec(package)
    for root in (spec and spec.submodule_search_locations) or ():
      for path in sorted((pathlib.Path(root) / folder).glob("*.jinja")):
        yield pytest.param(path.read_text(encoding="utf-8"), id=f"{package}-{path.stem}")


REAL = list(real_templates()) or [
  pytest.param(
    None,
    marks=pytest.mark.skip(
      reason="no installed package has chat templates of published models: pip install --no-deps trl (0.9 MB) has"
    ),
  )
]


def sentence_piece() -> str:
  """tokenizer.json of a BPE over characters with bytes for the rest, which begins texts with <s>, as Mixtral has."""
  tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
  tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
  tokenizer.decoder = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
  )
  special = ["<unk>", "<s>", "</s>"]
  trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=special, show_progress=False)
  tokenizer.train_from_iterator(CORPUS[:2], trainer)
  tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
  file = json.loads(tokenizer.to_str())
  vocab = file["model"]["vocab"]
  vocab.update({f"<0x{byte:02X}>": len(vocab) + byte for byte in range(256)})
  return json.dumps(file)


def composed() -> str:
  """tokenizer.json of a byte-level BPE behind NFC and a regular expression, as Qwen has."""
  split = r"(?i:'s|'t|'re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
  backend = tokenizers.Tokenizer.from_str(byte_level())
  backend.normalizer = normalizers.NFC()
  backend.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(tokenizers.Regex(split), "isolated"),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  return backend.to_str()


def listed(i: int, token: str) -> dict:
  """An entry of `added_tokens_decoder`."""
  flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": token not in WRITTEN}
  return {str(i): {"content": token, **flags}}


CHECKPOINTS = {
  "byte_level": {},
  "composed": {
    "tokenizer.json": composed,
    **config(
      add_bos_token=False,
      additional_special_tokens=["<|im_start|>", "<|im_end|>"],
      added_tokens_decoder=listed(0, SPECIAL[0])
      | listed(2, SPECIAL[2])
      | listed(331, WRITTEN[1])
      | listed(332, "<new>"),
    ),
  },
  "sentence_piece": {
    "tokenizer.json": sentence_piece,
    "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"},
    "special_tokens_map.json": {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "unk_token": "<unk>"},
  },
}


def both(folder, files):
  """The tokenizer of a checkpoint as we and as transformers load it."""
  transformers = pytest.importorskip("transformers")
  write_checkpoint(folder, {name: content() if callable(content) else content for name, content in files.items()})
  return load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)


def texts():
  for conversation in CONVERSATIONS.values():
    yield from (message["content"] for message in conversation if isinstance(message["content"], str))
  yield from CORPUS
  for special in (*SPECIAL, *WRITTEN, "<s>", "</s>", "<unk>", "<new>"):
    yield f"{special}{special} {special} a {special}\n{special}b<|{special}|>"
  shared = pathlib.Path(__file__).parent.parent.parent / "shared" / "data" / "gsm8k.jsonl"
  if shared.exists():
    with open(shared, encoding="utf-8") as lines:
      yield from (json.loads(line)["answer"] for line, _ in zip(lines, range(200), strict=False))


@pytest.mark.parity
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_ids_and_texts_equal_those_of_transformers(tmp_path, checkpoint):
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
def test_transformers_calls_the_same_tokens_special(tmp_path, tokenizer, entries):
  i = token_id(tokenizer, "and")
  ours, theirs = both(tmp_path, config(**fill_in(entries, i)))
  assert ours.special == theirs.special_tokens_map
  assert theirs("randy and", add_special_tokens=False)["input_ids"] == ours.encode("randy and")
  assert theirs.decode([i], skip_special_tokens=True) == ours.decode([i]) == ""


def outcome(render):
  """What a template writes, or None where it refuses."""
  try:
    return render()
  except Exception:
    return None


def assert_same_chats(ours, theirs):
  """On every conversation under all options: the same text and ids, or a refusal by both."""
  rendered = 0
  for name, messages in CONVERSATIONS.items():
    for options_name, options in OPTIONS.items():
      options = {"add_generation_prompt": True, **options}
      text = outcome(lambda: ours.render_chat(messages, **options))  # noqa: B023
      wanted = outcome(lambda: theirs.apply_chat_template(messages, tokenize=False, **options))  # noqa: B023
      assert text == wanted, (name, options_name)
      if text is not None:
        rendered += 1
        ids = theirs.apply_chat_template(messages, tokenize=True, return_dict=False, **options)
        assert ours.encode_chat(messages, **options) == ids, (name, options_name)
  assert rendered >= len(OPTIONS) * 4, "a template that refuses nearly everything proves nothing"


@pytest.mark.parity
@pytest.mark.parametrize("checkpoint", ["byte_level", "sentence_piece"])
@pytest.mark.parametrize("style", STYLES)
def test_chats_in_the_style_of_public_templates_equal_those_of_transformers(tmp_path, style, checkpoint):
  assert_same_chats(*both(tmp_path, {**CHECKPOINTS[checkpoint], "chat_template.jinja": STYLES[style]}))


@pytest.mark.parity
@pytest.mark.parametrize("template", REAL)
def test_chats_of_real_templates_equal_those_of_transformers(tmp_path, template):
  assert_same_chats(*both(tmp_path, {"chat_template.jinja": template} | config(bos_token="<|im_start|>")))


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
def test_transformers_takes_the_same_template_and_names_from_the_same_place(tmp_path, files):
  assert_same_chats(*both(tmp_path, files))
