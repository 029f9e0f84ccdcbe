"""The code and the commands of docs/models.md run, with small checkpoints at its paths."""

import dataclasses
import json
import re

import jax
import ml_dtypes
import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from experiments import convert
from experiments.setup import model_files
from models import LoraConfig, add_lora
from models.huggingface import PUBLISHED
from models.huggingface.families import FAMILIES
from tests.support import hf_cases
from tests.support.paths import ROOT

TEXT = (ROOT / "docs" / "models.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
COMMANDS = re.findall(r"^python -m experiments\.convert (.*)$", TEXT, re.MULTILINE)


@pytest.fixture
def paths(tmp_path):
  """Path in the text -> existing path that replaces it."""
  sizes = {"vocab_size": 272, "num_experts": 8}
  tensors = {
    name: tensor.astype(ml_dtypes.bfloat16)
    for name, tensor in hf_cases.random_tensors(hf_cases.small_config(**sizes)).items()
  }
  public = hf_cases.public_config("qwen3_moe", torch_dtype="bfloat16", **sizes)
  checkpoint = hf_cases.write_checkpoint(tmp_path / "checkpoint", public, tensors)
  tokenizer = Tokenizer(BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
  tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
  tokenizer.add_special_tokens(["<|endoftext|>"])
  tokenizer.save(str(checkpoint / "tokenizer.json"))
  template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
  settings = {"eos_token": "<|endoftext|>", "chat_template": template}
  (checkpoint / "tokenizer_config.json").write_text(json.dumps(settings))
  dense = hf_cases.small_config("qwen2")
  hf_cases.write_checkpoint(tmp_path / "dense", hf_cases.public_config("qwen2"), hf_cases.random_tensors(dense))
  return {
    "path/to/Qwen3-30B-A3B": checkpoint,
    "path/to/checkpoint": checkpoint,
    "path/to/dense": tmp_path / "dense",
    "path/to": tmp_path,
    "runs": tmp_path,
  }


def replace_paths(text, paths):
  return re.sub("|".join(paths), lambda match: str(paths[match[0]]), text)


def test_code_runs(paths, capsys):
  names = {}
  for block in BLOCKS:
    exec(compile(replace_paths(block, paths), "docs/models.md", "exec"), names)
  assert jax.tree.structure(names["merged"]) == jax.tree.structure(
    jax.eval_shape(names["policy"].init, jax.random.key(0))
  )
  assert names["text"] == "user: What is 3 + 7?\n"
  assert capsys.readouterr().out == "256 (256,)\n"


def test_commands_run(paths, capsys):
  # Orbax folders replace the workdirs of runs; the second has adapters.
  model = model_files.load_model(paths["path/to/checkpoint"], dtype="bfloat16")
  model_files.save_orbax(paths["runs"] / "countdown_tiny", model)
  config = dataclasses.replace(model.config, lora=LoraConfig(2, targets=("attention/",)))
  params = add_lora(config, model.params, jax.random.key(0))
  model_files.save_orbax(paths["runs"] / "with_lora", model_files.Model(config, params))
  commands = set()
  for command in COMMANDS:
    convert.run(convert.parse(replace_paths(command, paths).split()))
    commands.add(command.split()[0])
  assert commands == {"inspect", "to-orbax", "to-hf", "upcycle", "adapter", "merge"}
  assert capsys.readouterr().out.count("parameters") >= 6


def test_every_family_and_every_known_model_is_listed():
  assert all(f"`{family}`" in TEXT for family in FAMILIES)
  assert all(name in TEXT for name in PUBLISHED)
