"""The witness of the model: the same weights in transformers' Qwen3MoeForCausalLM and in ours."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import hf
from models.config import TransformerConfig
from models.policy import build_policy

BASE = {
  "model_type": "qwen3_moe",
  "vocab_size": 61,
  "hidden_size": 32,
  "intermediate_size": 40,
  "moe_intermediate_size": 24,
  "num_hidden_layers": 3,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "head_dim": 8,
  "num_experts": 8,
  "num_experts_per_tok": 3,
  "norm_topk_prob": True,
  "tie_word_embeddings": False,
}

SHAPES = {
  "plain": {},
  "wide_heads_shared_by_four": {"head_dim": 20, "num_key_value_heads": 1},
  "own_key_value_heads_not_renormalised": {"num_key_value_heads": 4, "norm_topk_prob": False},
  "tied": {"tie_word_embeddings": True, "hidden_size": 48, "head_dim": 6},
  "dense_first_and_fourth": {"mlp_only_layers": [0, 3], "num_hidden_layers": 5},
  "every_second_layer_dense": {"decoder_sparse_step": 2, "num_hidden_layers": 4, "rms_norm_eps": 1e-3},
  "short_rotary_period": {"rope_theta": 50.0, "num_experts": 5, "num_experts_per_tok": 2},
  "long_rotary_period_all_experts": {"rope_theta": 1e6, "num_experts": 4, "num_experts_per_tok": 4},
  "one_expert_of_sixteen": {"num_experts": 16, "num_experts_per_tok": 1, "norm_topk_prob": False},
}

BATCH, LENGTH = 3, 17


def small_config(**changes: Any) -> TransformerConfig:
  return hf.config_from_hf({**BASE, **changes})


def random_tensors(config: TransformerConfig, seed: int = 0) -> dict[str, np.ndarray]:
  """Random weights in the public layout: every norm differs from 1, and routers are far from ties."""
  rng = np.random.default_rng(seed)
  tensors = {}
  for name, slot in hf.tensor_map(config).items():
    noise = rng.standard_normal(slot.shape)
    if "norm" in name:
      value = 1 + 0.2 * noise
    elif name.endswith("mlp.gate.weight"):
      value = 2 * noise / np.sqrt(slot.shape[-1])
    else:
      value = noise / np.sqrt(slot.shape[-1])
    tensors[name] = value.astype(np.float32)
  return tensors


@pytest.mark.parametrize("shape", SHAPES)
def test_weights_survive_the_round_trip_to_the_bit(shape):
  config = small_config(**SHAPES[shape])
  tensors = random_tensors(config)
  params = hf.params_from_hf(config, tensors)
  wanted = jax.eval_shape(build_policy(config).init, jax.random.key(0))
  assert jax.tree.structure(params) == jax.tree.structure(wanted)
  assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, wanted)
  back = hf.params_to_hf(config, params)
  assert list(back) == list(tensors)
  for name, tensor in tensors.items():
    np.testing.assert_array_equal(back[name], tensor, err_msg=name)


def test_every_wrong_tensor_is_named():
  config = small_config()
  tensors = random_tensors(config)
  del tensors["model.layers.1.mlp.experts.3.up_proj.weight"]
  tensors["model.layers.2.self_attn.q_proj.bias"] = np.zeros(32, np.float32)
  tensors["model.norm.weight"] = np.zeros(31, np.float32)
  with pytest.raises(ValueError, match="does not fit") as caught:
    hf.params_from_hf(config, tensors)
  message = str(caught.value)
  assert "model.layers.1.mlp.experts.3.up_proj.weight: missing, wanted (24, 32)" in message
  assert "model.layers.2.self_attn.q_proj.bias: not expected" in message
  assert "model.norm.weight: found (31,), wanted (32,)" in message
  assert message.count("\n  ") == 4


def test_fused_in_memory_names_are_explained():
  tensors = {"model.layers.0.mlp.experts.gate_up_proj": np.zeros((8, 48, 32), np.float32)}
  with pytest.raises(ValueError, match="save_pretrained writes the per-expert ones"):
    hf.params_from_hf(small_config(), tensors)


def test_every_wrong_parameter_is_named():
  config = small_config()
  params = hf.params_from_hf(config, random_tensors(config))
  params["head"] = params.pop("lm_head")
  params["final_norm"]["scale"] = params["final_norm"]["scale"][:-1]
  with pytest.raises(ValueError, match="do not fit") as caught:
    hf.params_to_hf(config, params)
  message = str(caught.value)
  assert "lm_head: missing, wanted (32, 61)" in message
  assert "head: not expected" in message
  assert "final_norm/scale: found (31,), wanted (32,)" in message


def test_a_tied_head_must_equal_the_embedding():
  config = small_config(tie_word_embeddings=True)
  tensors = random_tensors(config)
  tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
  assert "lm_head" not in hf.params_from_hf(config, tensors)
  tensors["lm_head.weight"][5, 7] += 1
  with pytest.raises(ValueError, match="tie_word_embeddings"):
    hf.params_from_hf(config, tensors)


def test_reduced_precision_tensors_are_widened_exactly():
  config = small_config()
  tensors = {name: tensor.astype(jnp.bfloat16) for name, tensor in random_tensors(config).items()}
  back = hf.params_to_hf(config, hf.params_from_hf(config, tensors))
  for name, tensor in tensors.items():
    assert back[name].dtype == np.float32
    np.testing.assert_array_equal(back[name], tensor.astype(np.float32))


def test_both_spellings_of_a_configuration_are_the_same():
  public = {**BASE, "rope_theta": 1e6, "rope_scaling": None, "torch_dtype": "bfloat16", "attention_bias": False}
  newer = {**BASE, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}, "dtype": "bfloat16"}
  newer["num_local_experts"] = newer.pop("num_experts")
  assert hf.config_from_hf(public) == hf.config_from_hf(newer)
  assert hf.config_from_hf(public).rope_theta == 1e6
  assert hf.config_from_hf(public).dtype == "bfloat16"
  assert hf.config_from_hf(public, dtype="float32", remat=True) == dataclasses.replace(
    hf.config_from_hf(newer), dtype="float32", remat=True
  )


@pytest.mark.parametrize(
  ("changes", "named"),
  [
    ({"model_type": "mixtral"}, "mixtral"),
    ({"attention_bias": True}, "attention_bias"),
    ({"use_sliding_window": True}, "use_sliding_window"),
    ({"hidden_act": "gelu"}, "hidden_act"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ({"num_local_experts": 9}, "num_local_experts"),
  ],
)
def test_settings_the_model_does_not_have_are_refused(changes, named):
  with pytest.raises(ValueError, match=named):
    hf.config_from_hf({**BASE, **changes})


class Witness:
  """transformers' model with random weights, and ours with the same ones read from what it saved."""

  def __init__(self, changes: dict[str, Any], folder: Any):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    safetensors_numpy = pytest.importorskip("safetensors.numpy")
    public = {**BASE, **changes}
    theirs = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**public, attn_implementation="eager"))
    first = hf.config_from_hf(public)
    source = folder / "source"
    source.mkdir()
    theirs.config.save_pretrained(source)
    safetensors_numpy.save_file(random_tensors(first), source / "model.safetensors", metadata={"format": "pt"})
    self.model, report = transformers.Qwen3MoeForCausalLM.from_pretrained(
      source, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    self.model.eval().save_pretrained(folder)
    self.config = hf.config_from_hf(json.loads((folder / "config.json").read_text()), dtype="float32")
    assert self.config == first
    self.params = hf.params_from_hf(self.config, safetensors_numpy.load_file(folder / "model.safetensors"))
    self.policy = build_policy(self.config)
    self.choices: list[np.ndarray] = []
    for layer in self.model.model.layers:
      if hasattr(layer.mlp, "gate"):
        layer.mlp.gate.register_forward_hook(lambda _, __, out: self.choices.append(out[2].numpy()))

  def run_theirs(self, tokens: np.ndarray, valid: np.ndarray):
    """logits [B, T, V] (a torch tensor), router logits and expert choice [L, B, T, ...]."""
    import torch

    self.choices.clear()
    out = self.model(
      torch.from_numpy(tokens).long(),
      attention_mask=torch.from_numpy(valid).long(),
      position_ids=torch.from_numpy(np.maximum(valid.cumsum(1) - 1, 0)),
      output_router_logits=True,
      use_cache=False,
    )
    router = torch.stack(out.router_logits).detach().numpy().reshape(-1, *tokens.shape, self.config.num_experts)
    chosen = np.stack(self.choices).reshape(-1, *tokens.shape, self.config.num_experts_per_tok)
    return out.logits, router, chosen

  def run_ours(self, params: Any, tokens: np.ndarray, valid: np.ndarray):
    """logits [B, T, V], (router logits, expert choice) [L, B, T, ...]."""
    hidden, probed = self.policy.forward(
      params, tokens, valid, probe=lambda router, _: (router.logits, router.expert_index)
    )
    return self.policy.unembed(params, hidden), probed


@pytest.fixture(scope="module", params=SHAPES)
def witness(request, tmp_path_factory):
  return Witness(SHAPES[request.param], tmp_path_factory.mktemp(request.param))


def batch(config: TransformerConfig, *, padded: bool) -> tuple[np.ndarray, np.ndarray]:
  """tokens [B, T] int32 and valid [B, T] bool, the rows padded on the left by 0, 4 and 11 slots if asked for."""
  tokens = np.random.default_rng(1).integers(0, config.vocab_size, (BATCH, LENGTH), dtype=np.int32)
  padding = np.array([[0], [4], [11]]) if padded else np.zeros((BATCH, 1), int)
  return tokens, np.arange(LENGTH) >= padding


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
  return float(np.max(np.abs(ours - theirs)) / np.max(np.abs(theirs)))


@pytest.mark.parity
@pytest.mark.parametrize("padded", [False, True], ids=["full", "left_padded"])
def test_logits_and_routing_equal_transformers(witness, padded):
  tokens, valid = batch(witness.config, padded=padded)
  logits, router, chosen = witness.run_theirs(tokens, valid)
  ours, (our_router, our_chosen) = jax.jit(witness.run_ours)(witness.params, tokens, valid)
  assert relative_error(np.asarray(ours)[valid], logits.detach().numpy()[valid]) < 1e-5
  assert our_router.shape == router.shape
  assert relative_error(np.asarray(our_router)[:, valid], router[:, valid]) < 1e-5
  np.testing.assert_array_equal(np.asarray(our_chosen)[:, valid], chosen[:, valid])


@pytest.mark.parity
def test_gradients_equal_transformers(witness):
  import torch

  tokens, valid = batch(witness.config, padded=True)
  weight = np.random.default_rng(2).standard_normal((BATCH, LENGTH, witness.config.vocab_size)).astype(np.float32)
  weight *= valid[..., None]
  witness.model.zero_grad()
  theirs, _, _ = witness.run_theirs(tokens, valid)
  (torch.log_softmax(theirs, -1) * torch.from_numpy(weight)).sum().backward()

  def loss(params):
    logits, _ = witness.run_ours(params, tokens, valid)
    return jnp.sum(jax.nn.log_softmax(logits) * weight)

  ours = hf.params_to_hf(witness.config, jax.jit(jax.grad(loss))(witness.params))
  # Parameters that transformers keeps under their public names; it fuses the experts' in memory.
  compared = {name: p.grad.numpy() for name, p in witness.model.named_parameters() if name in ours}
  routers = [name for name in compared if name.endswith("mlp.gate.weight")]
  assert len(routers) == witness.config.num_moe_layers
  assert "model.embed_tokens.weight" in compared
  for name, gradient in compared.items():
    assert np.max(np.abs(gradient)) > 0, name
    assert relative_error(ours[name], gradient) < 1e-4, name
