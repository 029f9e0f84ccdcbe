import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from experiments import convert
from experiments.setup import model_files
from models import lora
from models.config import LoraConfig
from models.huggingface.adapter import save_adapter
from models.huggingface.checkpoint import DTYPES, load_pretrained
from models.huggingface.known_configs import known_config
from models.huggingface.tensor_map import params_to_hf
from tests.support import hf_cases


def source(folder, family="qwen2", dtype="bfloat16"):
  """A checkpoint folder with a small file beside it."""
  config = hf_cases.small_config(family)
  tensors = {name: tensor.astype(DTYPES[dtype]) for name, tensor in hf_cases.random_tensors(config).items()}
  made = hf_cases.write_checkpoint(folder, hf_cases.public_config(family, torch_dtype=dtype), tensors)
  (made / "tokenizer.json").write_text("{}")
  return made


def run(*args):
  convert.run(convert.parse([str(arg) for arg in args]))


def test_to_orbax_and_back_is_bitwise_equal_and_carries_the_small_files(tmp_path, capsys):
  made = source(tmp_path / "hf", "deepseek_v3")
  run("to-orbax", made, tmp_path / "orbax")
  run("to-hf", tmp_path / "orbax", tmp_path / "back", "--files", made)
  wanted, found = (load_file(folder / "model.safetensors") for folder in (made, tmp_path / "back"))
  assert wanted.keys() == found.keys()
  assert all(wanted[name].tobytes() == found[name].tobytes() for name in wanted)
  assert (tmp_path / "back" / "tokenizer.json").exists()
  assert json.loads((tmp_path / "back" / "config.json").read_text())["torch_dtype"] == "bfloat16"
  assert "bfloat16, orbax" in capsys.readouterr().out


def test_the_type_of_the_weights_is_changed_on_the_way(tmp_path):
  made = source(tmp_path / "hf", dtype="float32")
  run("to-hf", made, tmp_path / "half", "--dtype=bfloat16")
  run("to-orbax", made, tmp_path / "orbax", "--dtype=bfloat16")
  whole, half = (load_file(folder / "model.safetensors") for folder in (made, tmp_path / "half"))
  for name, tensor in whole.items():
    np.testing.assert_array_equal(half[name], tensor.astype(ml_dtypes.bfloat16), err_msg=name)
  model = model_files.load_model(tmp_path / "orbax")
  np.testing.assert_array_equal(model.params["embedding"], half["model.embed_tokens.weight"])


def test_upcycling_writes_a_mixture_that_loads(tmp_path):
  run("upcycle", source(tmp_path / "hf"), tmp_path / "moe", "--experts=4", "--experts-per-token=2", "--noise=0.01")
  config, params = load_pretrained(tmp_path / "moe")
  assert (config.model_type, config.num_experts, config.num_experts_per_tok) == ("qwen2_moe", 4, 2)
  assert params["layers_0"]["moe"]["gate"].shape == (2, 4, 32, 40)
  assert (tmp_path / "moe" / "tokenizer.json").exists()


def test_merging_an_adapter_gives_the_weights_that_the_library_gives(tmp_path):
  made = source(tmp_path / "hf", "qwen3_moe", "float32")
  base, params = load_pretrained(made)
  config = dataclasses.replace(base, lora=LoraConfig(2, 4.0, ("attention/(query|out)$", "moe/down$")))
  adapted = lora.add_lora(config, params, jax.random.key(0))
  adapted = jax.tree_util.tree_map_with_path(
    lambda path, leaf: leaf + 0.1 if "lora_b" in jax.tree_util.keystr(path) else leaf, adapted
  )
  save_adapter(tmp_path / "adapter", config, adapted)
  run("merge", made, tmp_path / "merged", f"--adapter={tmp_path / 'adapter'}")
  wanted = params_to_hf(base, lora.merge_lora(config, adapted)[1])
  found = load_file(tmp_path / "merged" / "model.safetensors")
  before = load_file(made / "model.safetensors")
  for name, tensor in wanted.items():
    np.testing.assert_array_equal(found[name], tensor, err_msg=name)
    changed = name.endswith(("q_proj.weight", "o_proj.weight", "down_proj.weight"))
    assert np.array_equal(found[name], before[name]) != changed, name


@pytest.mark.parametrize("name", ["Qwen3-30B-A3B", "gpt-oss-20b", "DeepSeek-V2-Lite"])
def test_the_parts_add_up_to_the_model_and_active_ones_are_as_the_name_says(name):
  found = convert.sizes(known_config(name))
  parts = [count for part, count in found.items() if part not in ("total", "active")]
  assert sum(parts) == found["total"]
  # As published: 3.3 billion; without the embedding 3.6 and 2.4 billion.
  without = 0 if name.startswith("Qwen3") else known_config(name).vocab_size * known_config(name).hidden_size
  wanted = {"Qwen3-30B-A3B": 3.3, "gpt-oss-20b": 3.6, "DeepSeek-V2-Lite": 2.4}
  assert abs((found["active"] - without) / 1e9 - wanted[name]) < 0.06


def test_inspect_prints_parts_shape_and_memory(tmp_path, capsys):
  run("inspect", "Moonlight-16B-A3B")
  run("inspect", source(tmp_path / "hf", "gpt_oss"))
  printed = capsys.readouterr().out
  assert "routed experts" in printed and "64, 6 a token" in printed and "latent 512" in printed
  assert "gpt_oss" in printed and "6, 2 a token" in printed


def test_mistakes_end_with_the_place_and_the_cure(tmp_path):
  made = source(tmp_path / "hf")
  with pytest.raises(ValueError, match="not empty; name a new folder"):
    run("to-orbax", made, made)
  with pytest.raises(ValueError, match=r"config\.json is absent"):
    run("inspect", tmp_path / "nowhere")
  with pytest.raises(ValueError, match="only dense"):
    run("upcycle", source(tmp_path / "moe", "mixtral"), tmp_path / "new", "--experts=4", "--experts-per-token=2")
  assert not (tmp_path / "new").exists()
  tensors = load_file(made / "model.safetensors")
  tensors.pop("model.norm.weight")
  hf_cases.write_checkpoint(made, hf_cases.public_config("qwen2"), tensors)
  with pytest.raises(ValueError, match=r"model\.norm\.weight: missing"):
    run("inspect", made)


def test_a_run_begins_with_pretrained_weights_and_fresh_adapters(tmp_path):
  from experiments.config import ExperimentConfig, OptimizerConfig, RuntimeConfig
  from experiments.setup.build import build
  from experiments.setup.optimizer import make_optimizer

  made = source(tmp_path / "hf", "qwen3_moe", "float32")
  model = dataclasses.replace(model_files.read_model(made), lora=LoraConfig(2, targets=("attention/query$",)))
  data = {"numbers": 3, "high": 9, "target_high": 20, "operators": "+-", "train": 64, "test": 32, "seed": 0}
  config = ExperimentConfig(
    0, model, pretrained=str(made), runtime=RuntimeConfig(mesh={"data": -1}, compilation_cache="")
  )
  config = dataclasses.replace(config, data=dataclasses.replace(config.data, data_dir=str(tmp_path), options=data))
  parts = build(config)
  optimizer, _ = make_optimizer(OptimizerConfig(), 10, model)
  state = model_files.initial_state(parts, optimizer)
  _, params = load_pretrained(made)
  attention = state.params["layers_0"]["attention"]
  np.testing.assert_array_equal(attention["query"], params["layers_0"]["attention"]["query"])
  assert attention["query_lora_a"].shape == (3, 32, 2) and not jnp.any(attention["query_lora_b"])
  assert jax.tree.leaves(state.opt_state)[0].size < 32 * 4 * 8

  other = dataclasses.replace(config, model=dataclasses.replace(model, rope_theta=5.0))
  with pytest.raises(ValueError, match=r"config\.model\.rope_theta is 5\.0, there 10000\.0"):
    model_files.initial_state(parts._replace(config=other), optimizer)
