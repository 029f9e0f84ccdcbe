import json
import threading
import time

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from models.huggingface import checkpoint
from models.huggingface.checkpoint import load_pretrained, read_config, save_pretrained
from models.huggingface.quantized import FP4_VALUES, unpack_fp8, unpack_mxfp4
from models.huggingface.tensor_files import INDEX
from models.huggingface.tensor_map import param_shape, param_slices, tensor_map
from rspo_jax import mesh
from tests.support import hf_cases


def write_random(folder, family="qwen3_moe", case="plain", dtype=np.float32, shards=1, **changes):
  """Writes a checkpoint of random weights: (folder, config, tensors)."""
  public = hf_cases.public_config(family, case, torch_dtype=np.dtype(dtype).name, **changes)
  config = hf_cases.small_config(family, case, torch_dtype=np.dtype(dtype).name, **changes)
  tensors = {name: tensor.astype(dtype) for name, tensor in hf_cases.random_tensors(config).items()}
  return hf_cases.write_checkpoint(folder, public, tensors, shards), config, tensors


def all_tensors(folder):
  return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def assert_same_tensors(actual, expected):
  assert actual.keys() == expected.keys()
  for name, tensor in expected.items():
    assert actual[name].dtype == tensor.dtype, name
    assert actual[name].tobytes() == tensor.tobytes(), name


@pytest.mark.parametrize(("family", "case"), hf_cases.ONE_PER_FAMILY)
@pytest.mark.parametrize("shards", [1, 3])
def test_loading_and_saving_bfloat16_is_bitwise_equal(family, case, shards, tmp_path):
  source, config, tensors = write_random(tmp_path / "source", family, case, ml_dtypes.bfloat16, shards)
  read, params = load_pretrained(source)
  assert read == config
  assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(params))
  largest = 20_000 if shards == 1 else 10**9
  save_pretrained(tmp_path / "saved", read, params, source=source, shard_bytes=largest)
  assert_same_tensors(all_tensors(tmp_path / "saved"), tensors)
  assert ((tmp_path / "saved" / INDEX).exists()) == (shards == 1)
  assert read_config(tmp_path / "saved") == config


def test_shards_are_at_most_the_given_size_and_the_index_lists_every_tensor(tmp_path):
  source, config, tensors = write_random(tmp_path / "source")
  _, params = load_pretrained(source)
  save_pretrained(tmp_path / "saved", config, params, shard_bytes=30_000)
  index = json.loads((tmp_path / "saved" / INDEX).read_text())
  files = sorted({*index["weight_map"].values()})
  assert len(files) > 2
  assert files == sorted(path.name for path in (tmp_path / "saved").glob("*.safetensors"))
  assert index["weight_map"].keys() == tensors.keys()
  assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
  for file in files:
    shard = load_file(tmp_path / "saved" / file)
    assert shard.keys() == {name for name, of_name in index["weight_map"].items() if of_name == file}
    assert sum(tensor.nbytes for tensor in shard.values()) <= 30_000 or len(shard) == 1


def test_sharded_loading_gives_the_same_parameters(tmp_path):
  source, config, _ = write_random(tmp_path / "source", vocab_size=64, head_dim=8)
  layout = mesh.make_layout({"fsdp": 2, "expert": 2, "tensor": 2})
  _, whole = load_pretrained(source)
  _, split = load_pretrained(source, layout)
  gate = split["layers_0"]["moe"]["gate"]
  assert gate.addressable_shards[0].data.shape == tuple(
    size // part for size, part in zip(gate.shape, (1, 2, 2, 2), strict=True)
  )
  jax.tree.map(np.testing.assert_array_equal, whole, split)
  save_pretrained(tmp_path / "saved", config, split)
  assert_same_tensors(all_tensors(tmp_path / "saved"), all_tensors(source))


def test_saving_copies_small_files_and_keeps_other_entries_of_the_source(tmp_path):
  source, config, _ = write_random(tmp_path / "source", eos_token_id=[3, 4], transformers_version="4.51.0", quirk=7)
  (source / "tokenizer.json").write_text("{}")
  (source / "generation_config.json").write_text('{"eos_token_id": 3}')
  (source / "optimizer.pt").write_text("large")
  _, params = load_pretrained(source)
  save_pretrained(tmp_path / "saved", config, params, source=source, dtype="bfloat16")
  saved = {path.name for path in (tmp_path / "saved").iterdir()}
  assert saved == {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"}
  entries = json.loads((tmp_path / "saved" / "config.json").read_text())
  assert entries == json.loads((source / "config.json").read_text()) | {"torch_dtype": "bfloat16"}


def test_tied_head_is_not_saved_and_an_equal_copy_is_accepted(tmp_path):
  source, config, tensors = write_random(tmp_path / "source", case="tied")
  tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
  save_file(tensors, source / "model.safetensors")
  _, params = load_pretrained(source)
  assert "lm_head" not in params
  save_pretrained(tmp_path / "saved", config, params)
  assert "lm_head.weight" not in all_tensors(tmp_path / "saved")
  tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
  save_file(tensors, source / "model.safetensors")
  with pytest.raises(ValueError, match="tie_word_embeddings"):
    load_pretrained(source)


def test_error_of_a_missing_head_suggests_tied_embeddings(tmp_path):
  source, _, tensors = write_random(tmp_path / "source")
  del tensors["lm_head.weight"]
  save_file(tensors, source / "model.safetensors")
  with pytest.raises(ValueError, match="set tie_word_embeddings to true"):
    load_pretrained(source)


def test_multi_token_prediction_layers_are_ignored_and_not_saved(tmp_path):
  source, config, tensors = write_random(tmp_path / "source", "deepseek_v3", num_nextn_predict_layers=1)
  extra = {name.replace("layers.2", "layers.3"): tensor for name, tensor in tensors.items() if "layers.2" in name}
  save_file(tensors | extra, source / "model.safetensors")
  _, params = load_pretrained(source)
  save_pretrained(tmp_path / "saved", config, params, source=source)
  assert_same_tensors(all_tensors(tmp_path / "saved"), tensors)
  assert json.loads((tmp_path / "saved" / "config.json").read_text())["num_nextn_predict_layers"] == 0


def load_error(tmp_path, damage, **options):
  """The message of the error that loading a damaged checkpoint raises."""
  source, _, _ = write_random(tmp_path / "source", shards=3, **options)
  damage(source)
  with pytest.raises(ValueError) as caught:  # noqa: PT011, every caller checks the message
    load_pretrained(source)
  return str(caught.value)


def test_error_names_a_truncated_file(tmp_path):
  def truncate(source):
    path = source / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-100])

  message = load_error(tmp_path, truncate)
  assert "model-00002-of-00003.safetensors" in message and "truncated" in message and "download" in message


def test_error_names_an_absent_shard(tmp_path):
  message = load_error(tmp_path, lambda source: (source / "model-00003-of-00003.safetensors").unlink())
  assert "model-00003-of-00003.safetensors is absent" in message and "download" in message


def test_error_names_an_absent_index(tmp_path):
  message = load_error(tmp_path, lambda source: (source / INDEX).unlink())
  assert INDEX in message


def test_error_names_a_tensor_that_is_not_in_its_file(tmp_path):
  def swap(source):
    index = json.loads((source / INDEX).read_text())
    files = sorted({*index["weight_map"].values()})
    files.remove(index["weight_map"]["model.norm.weight"])
    index["weight_map"]["model.norm.weight"] = files[0]
    (source / INDEX).write_text(json.dumps(index))

  message = load_error(tmp_path, swap)
  assert "does not hold model.norm.weight" in message


def test_error_names_an_invalid_config_and_an_unknown_family(tmp_path):
  assert "config.json cannot be read: it is not JSON" in load_error(
    tmp_path / "a", lambda source: (source / "config.json").write_text("{")
  )
  message = load_error(tmp_path / "b", lambda source: (source / "config.json").write_text('{"model_type": "llama"}'))
  assert "config.json" in message and "'llama'" in message and "mixtral" in message


def test_error_of_a_folder_with_pickles_names_the_pickle(tmp_path):
  (tmp_path / "config.json").write_text(json.dumps(hf_cases.public_config("qwen2")))
  (tmp_path / "pytorch_model.bin").write_bytes(b"x")
  with pytest.raises(ValueError, match=r"pytorch_model\.bin is a pickle"):
    load_pretrained(tmp_path)


def test_load_error_lists_every_tensor_that_does_not_fit(tmp_path):
  source, _, tensors = write_random(tmp_path / "source")
  del tensors["model.layers.1.mlp.experts.3.up_proj.weight"]
  tensors["model.layers.2.self_attn.q_proj.bias"] = np.zeros(32, np.float32)
  tensors["model.norm.weight"] = np.zeros(31, np.float32)
  save_file(tensors, source / "model.safetensors")
  with pytest.raises(ValueError, match="does not fit") as caught:
    load_pretrained(source)
  message = str(caught.value)
  assert "model.layers.1.mlp.experts.3.up_proj.weight: missing, want (24, 32)" in message
  assert "model.layers.2.self_attn.q_proj.bias: not expected" in message and "(32,)" in message
  assert "model.norm.weight: is (31,), want (32,)" in message


def test_saving_never_overwrites_and_leaves_no_files_when_it_fails(tmp_path, monkeypatch):
  source, config, _ = write_random(tmp_path / "source")
  _, params = load_pretrained(source)
  with pytest.raises(ValueError, match="not empty"):
    save_pretrained(source, config, params)

  def full_disk(*args, **keywords):
    raise OSError("no space left on device")

  monkeypatch.setattr(checkpoint, "save_file", full_disk)
  with pytest.raises(OSError, match="no space"):
    save_pretrained(tmp_path / "saved", config, params)
  assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_mxfp4_values_follow_the_format(tmp_path):
  rng = np.random.default_rng(0)
  blocks = rng.integers(0, 256, (2, 3, 2, 16), dtype=np.uint8)
  scales = rng.integers(120, 135, (2, 3, 2), dtype=np.uint8)
  unpacked = unpack_mxfp4(blocks, scales)
  assert unpacked.shape == (2, 64, 3) and unpacked.dtype == ml_dtypes.bfloat16
  for e, row, column in np.ndindex(2, 64, 3):
    group, offset = divmod(row, 32)
    byte = int(blocks[e, column, group, offset // 2])
    code = byte >> 4 if offset % 2 else byte & 15
    assert float(unpacked[e, row, column]) == float(FP4_VALUES[code]) * 2.0 ** (int(scales[e, column, group]) - 127)


def test_mxfp4_checkpoint_loads_and_is_saved_unpacked(tmp_path):
  public = hf_cases.public_config("gpt_oss", hidden_size=32, intermediate_size=32, quantization_config={"q": "mxfp4"})
  config = hf_cases.small_config("gpt_oss", hidden_size=32, intermediate_size=32)
  rng, tensors = np.random.default_rng(0), hf_cases.random_tensors(config)
  packed, unpacked = {}, {}
  for name, tensor in tensors.items():
    if name.endswith(("gate_up_proj", "down_proj")):
      experts, inputs, outputs = tensor.shape
      blocks = rng.integers(0, 256, (experts, outputs, inputs // 32, 16), dtype=np.uint8)
      scales = rng.integers(118, 126, (experts, outputs, inputs // 32), dtype=np.uint8)
      packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
      unpacked[name] = unpack_mxfp4(blocks, scales)
    else:
      packed[name] = unpacked[name] = tensor.astype(ml_dtypes.bfloat16)
  source = hf_cases.write_checkpoint(tmp_path / "source", public, packed)
  _, params = load_pretrained(source)
  save_pretrained(tmp_path / "saved", config, params, source=source, dtype="bfloat16")
  assert_same_tensors(all_tensors(tmp_path / "saved"), unpacked)
  assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())


def test_each_fp8_block_has_its_own_scale(tmp_path):
  rng = np.random.default_rng(0)
  weight = rng.standard_normal((130, 257)).astype(ml_dtypes.float8_e4m3fn)
  scale = rng.uniform(0.5, 2, (2, 3)).astype(np.float32)
  unpacked = unpack_fp8(weight, scale)
  for row, column in ((0, 0), (127, 128), (128, 127), (129, 256)):
    assert unpacked[row, column] == np.float32(weight[row, column]) * scale[row // 128, column // 128]


@pytest.mark.slow
def test_loading_needs_memory_for_one_more_parameter(tmp_path):
  """A synthetic checkpoint of 3.7 GB: peak anonymous memory while loading, beyond that of the parameters."""
  sizes = {
    "hidden_size": 1024,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 12,
    "num_experts": 32,
    "head_dim": 64,
  }
  config = hf_cases.small_config(**sizes)
  largest = max(int(np.prod(param_shape(slices))) * 4 for slices in param_slices(config).values())
  tensors = {name: np.zeros(slices[0].tensor_shape, np.float32) for name, slices in tensor_map(config).items()}
  public = hf_cases.public_config("qwen3_moe", **sizes)
  source = hf_cases.write_checkpoint(tmp_path / "source", public, tensors, shards=4)
  del tensors
  before, peak, done = anonymous_memory(), 0, threading.Event()

  def watch():
    nonlocal peak
    while not done.is_set():
      peak = max(peak, anonymous_memory())
      time.sleep(0.005)

  watcher = threading.Thread(target=watch)
  watcher.start()
  _, params = load_pretrained(source)
  done.set()
  watcher.join()
  parameter_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
  assert parameter_bytes > 3.5e9
  assert peak - before - parameter_bytes < largest + 100e6, (peak - before - parameter_bytes, largest)


def anonymous_memory() -> int:
  """Resident bytes of this process that are not backed by a file."""
  with open("/proc/self/status") as status:
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))
