"""Checkpoint folders with tiny tokenizers trained here, and conversations to render with them."""

import functools
import json
import pathlib

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from rspo_jax.tokenization.hf import load_tokenizer

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
WRITTEN = ("<think>", "</think>")  # added tokens that are not special
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
  """tokenizer.json of a byte-level BPE, as of Qwen, Llama 3 and gpt-oss."""
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
  """tokenizer_config.json with CONFIG and further or overriding entries."""
  return {"tokenizer_config.json": CONFIG | entries}


def write_checkpoint(folder: pathlib.Path, files: dict) -> pathlib.Path:
  """Writes files by name, over a default tokenizer.json and tokenizer_config.json.

  Args:
    files: {name: content}; text, a function that returns text, a JSON value, or None to leave the file out.
  """
  for name, content in {"tokenizer.json": byte_level, "tokenizer_config.json": CONFIG, **files}.items():
    if content is not None:
      path = folder / name
      path.parent.mkdir(parents=True, exist_ok=True)
      content = content() if callable(content) else content
      path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
  return folder


def sentence_piece() -> str:
  """tokenizer.json of a BPE over characters with byte fallback and begin token <s>, as of Mixtral."""
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
  """tokenizer.json of a byte-level BPE after NFC and a regular expression, as of Qwen."""
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
  """The tokenizer of a checkpoint, loaded by rspo_jax and by transformers."""
  transformers = pytest.importorskip("transformers")
  write_checkpoint(folder, files)
  return load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)


def token_id(tokenizer, text):
  return tokenizer.backend.token_to_id(text)


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
