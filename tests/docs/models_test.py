"""The code and the commands of docs/models.md run, on small checkpoints in the place of its paths."""

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
from models.config import LoraConfig
from models.huggingface.families import FAMILIES
from models.huggingface.known_configs import PUBLISHED
from models.lora import add_lora
from tests.support import hf_cases
from tests.support.paths import ROOT

TEXT = (ROOT / "docs" / "models.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
COMMANDS = re.findall(r"^python -m experiments\.convert (.*)$", TEXT, re.MULTILINE)


@pytest.fixture
def places(tmp_path):
  """What stands for each path of the text."""
  wide = {"vocab_size": 272, "num_experts": 8}
  tensors = {
    name: tensor.astype(ml_dtypes.bfloat16)
    for name, tensor in hf_cases.random_tensors(hf_cases.small_config(**wide)).items()
  }
  public = hf_cases.public_config("qwen3_moe", torch_dtype="bfloat16", **wide)
  checkpoint = hf_cases.write_checkpoint(tmp_path / "checkpoint", public, tensors)
  letters = Tokenizer(BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
  letters.pre_tokenizer, letters.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
  letters.add_special_tokens(["<|endoftext|>"])
  letters.save(str(checkpoint / "tokenizer.json"))
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


def placed(text, places):
  return re.sub("|".join(places), lambda found: str(places[found[0]]), text)


def test_the_code_runs_as_it_stands(places, capsys):
  names = {}
  for block in BLOCKS:
    exec(compile(placed(block, places), "docs/models.md", "exec"), names)
  assert jax.tree.structure(names["merged"]) == jax.tree.structure(
    jax.eval_shape(names["policy"].init, jax.random.key(0))
  )
  assert names["text"] == "user: What is 3 + 7?\n"
  assert capsys.readouterr().out == "256 (256,)\n"


def test_the_commands_do_what_the_text_says(places, capsys):
  # The runs of the text are stood in for by converted folders, of which the second has adapters.
  model = model_files.load_model(places["path/to/checkpoint"], dtype="bfloat16")
  model_files.save_orbax(places["runs"] / "countdown_tiny", model)
  config = dataclasses.replace(model.config, lora=LoraConfig(2, targets=("attention/",)))
  params = add_lora(config, model.params, jax.random.key(0))
  model_files.save_orbax(places["runs"] / "with_lora", model_files.Model(config, params))
  done = set()
  for command in COMMANDS:
    convert.run(convert.parse(placed(command, places).split()))
    done.add(command.split()[0])
  assert done == {"inspect", "to-orbax", "to-hf", "upcycle", "adapter", "merge"}
  assert capsys.readouterr().out.count("parameters") >= 6


def test_every_family_and_every_known_shape_is_named():
  assert all(f"`{family}`" in TEXT for family in FAMILIES)
  assert all(name in TEXT for name in PUBLISHED)
