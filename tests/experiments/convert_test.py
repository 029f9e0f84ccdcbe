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
from models import LoraConfig, add_lora, merge_lora
from models.huggingface import known_config, load_pretrained, save_adapter
from models.huggingface.checkpoint import DTYPES
from models.huggingface.parameters import params_to_hf
from tests.support import hf_cases


def write_source(folder, family="qwen2", dtype="bfloat16"):
  """Writes a checkpoint folder of random weights with a tokenizer file."""
  config = hf_cases.small_config(family)
  tensors = {name: tensor.astype(DTYPES[dtype]) for name, tensor in hf_cases.random_tensors(config).items()}
  hf_cases.write_checkpoint(folder, hf_cases.public_config(family, torch_dtype=dtype), tensors)
  (folder / "tokenizer.json").write_text("{}")
  return folder


def run(*args):
  convert.run(convert.parse([str(arg) for arg in args]))


def test_round_trip_through_orbax_is_bitwise_equal_and_copies_small_files(tmp_path, capsys):
  source = write_source(tmp_path / "hf", "deepseek_v3")
  run("to-orbax", source, tmp_path / "orbax")
  run("to-hf", tmp_path / "orbax", tmp_path / "back", "--files", source)
  expected, actual = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "back"))
  assert expected.keys() == actual.keys()
  assert all(expected[name].tobytes() == actual[name].tobytes() for name in expected)
  assert (tmp_path / "back" / "tokenizer.json").exists()
  assert json.loads((tmp_path / "back" / "config.json").read_text())["torch_dtype"] == "bfloat16"
  assert "bfloat16, orbax" in capsys.readouterr().out


def test_weights_are_written_in_the_given_dtype(tmp_path):
  source = write_source(tmp_path / "hf", dtype="float32")
  run("to-hf", source, tmp_path / "bfloat16", "--dtype=bfloat16")
  run("to-orbax", source, tmp_path / "orbax", "--dtype=bfloat16")
  float32, bfloat16 = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "bfloat16"))
  for name, tensor in float32.items():
    np.testing.assert_array_equal(bfloat16[name], tensor.astype(ml_dtypes.bfloat16), err_msg=name)
  model = model_files.load_model(tmp_path / "orbax")
  np.testing.assert_array_equal(model.params["embedding"], bfloat16["model.embed_tokens.weight"])


def test_upcycled_mixture_loads(tmp_path):
  run(
    "upcycle", write_source(tmp_path / "hf"), tmp_path / "moe", "--experts=4", "--experts-per-token=2", "--noise=0.01"
  )
  config, params = load_pretrained(tmp_path / "moe")
  assert (config.model_type, config.num_experts, config.num_experts_per_tok) == ("qwen2_moe", 4, 2)
  assert params["layers_0"]["moe"]["gate"].shape == (2, 4, 32, 40)
  assert (tmp_path / "moe" / "tokenizer.json").exists()


def test_merged_adapter_equals_merge_lora(tmp_path):
  source = write_source(tmp_path / "hf", "qwen3_moe", "float32")
  base, params = load_pretrained(source)
  config = dataclasses.replace(base, lora=LoraConfig(2, 4.0, ("attention/(query|out)$", "moe/down$")))
  adapted = add_lora(config, params, jax.random.key(0))
  adapted = jax.tree_util.tree_map_with_path(
    lambda path, leaf: leaf + 0.1 if "lora_b" in jax.tree_util.keystr(path) else leaf, adapted
  )
  save_adapter(tmp_path / "adapter", config, adapted)
  run("merge", source, tmp_path / "merged", f"--adapter={tmp_path / 'adapter'}")
  expected = params_to_hf(base, merge_lora(config, adapted)[1])
  merged = load_file(tmp_path / "merged" / "model.safetensors")
  before = load_file(source / "model.safetensors")
  for name, tensor in expected.items():
    np.testing.assert_array_equal(merged[name], tensor, err_msg=name)
    changed = name.endswith(("q_proj.weight", "o_proj.weight", "down_proj.weight"))
    assert np.array_equal(merged[name], before[name]) != changed, name


@pytest.mark.parametrize("name", ["Qwen3-30B-A3B", "gpt-oss-20b", "DeepSeek-V2-Lite"])
def test_parts_sum_to_the_total_and_active_parameters_are_the_published_number(name):
  counts = convert.parameter_counts(known_config(name))
  assert sum(counts[part] for part in convert.PARTS) == counts["total"]
  # Published in billions: with the embedding for Qwen3, without it for the others.
  embedding = 0 if name.startswith("Qwen3") else known_config(name).vocab_size * known_config(name).hidden_size
  published = {"Qwen3-30B-A3B": 3.3, "gpt-oss-20b": 3.6, "DeepSeek-V2-Lite": 2.4}
  assert abs((counts["active"] - embedding) / 1e9 - published[name]) < 0.06


def test_inspect_prints_parameter_counts_and_shape(tmp_path, capsys):
  run("inspect", "Moonlight-16B-A3B")
  run("inspect", write_source(tmp_path / "hf", "gpt_oss"))
  printed = capsys.readouterr().out
  assert "routed experts" in printed and "64, 6 per token" in printed and "latent 512" in printed
  assert "gpt_oss" in printed and "6, 2 per token" in printed


def test_errors_name_the_file_and_the_cure(tmp_path):
  source = write_source(tmp_path / "hf")
  with pytest.raises(ValueError, match="not empty; name a new folder"):
    run("to-orbax", source, source)
  with pytest.raises(ValueError, match=r"config\.json is absent"):
    run("inspect", tmp_path / "nowhere")
  with pytest.raises(ValueError, match="only dense"):
    run("upcycle", write_source(tmp_path / "moe", "mixtral"), tmp_path / "new", "--experts=4", "--experts-per-token=2")
  assert not (tmp_path / "new").exists()
  tensors = load_file(source / "model.safetensors")
  tensors.pop("model.norm.weight")
  hf_cases.write_checkpoint(source, hf_cases.public_config("qwen2"), tensors)
  with pytest.raises(ValueError, match=r"model\.norm\.weight: missing"):
    run("inspect", source)


def test_run_starts_with_pretrained_weights_and_new_adapters(tmp_path):
  from experiments.config import ExperimentConfig
  from experiments.setup.build import build
  from experiments.setup.optimizer import OptimizerConfig, make_optimizer
  from experiments.setup.runtime import RuntimeConfig

  source = write_source(tmp_path / "hf", "qwen3_moe", "float32")
  model = dataclasses.replace(model_files.read_model(source), lora=LoraConfig(2, targets=("attention/query$",)))
  data = {"numbers": 3, "high": 9, "target_high": 20, "operators": "+-", "train": 64, "test": 32, "seed": 0}
  config = ExperimentConfig(
    0, model, pretrained=str(source), runtime=RuntimeConfig(mesh={"data": -1}, compilation_cache="")
  )
  config = dataclasses.replace(config, data=dataclasses.replace(config.data, data_dir=str(tmp_path), options=data))
  parts = build(config)
  optimizer, _ = make_optimizer(OptimizerConfig(), 10, model)
  state = model_files.initial_state(parts, optimizer)
  _, params = load_pretrained(source)
  attention = state.params["layers_0"]["attention"]
  np.testing.assert_array_equal(attention["query"], params["layers_0"]["attention"]["query"])
  assert attention["query_lora_a"].shape == (3, 32, 2) and not jnp.any(attention["query_lora_b"])
  assert jax.tree.leaves(state.opt_state)[0].size < 32 * 4 * 8

  other = dataclasses.replace(config, model=dataclasses.replace(model, rope_theta=5.0))
  with pytest.raises(ValueError, match=r"config\.model\.rope_theta is 5\.0, there 10000\.0"):
    model_files.initial_state(parts._replace(config=other), optimizer)
