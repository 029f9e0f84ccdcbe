"""Every public family against transformers: the same weights in its model and in ours."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.config import TransformerConfig
from models.huggingface import config_json, families
from models.huggingface.checkpoint import load_pretrained, save_pretrained
from models.huggingface.tensor_map import params_from_hf, params_to_hf
from models.policy import build_policy
from rspo_jax import mesh
from rspo_jax.types import Policy
from tests.support import hf_cases

BATCH, LENGTH = 3, 17


def batch(config: TransformerConfig) -> tuple[np.ndarray, np.ndarray]:
  """tokens [B, T] int32 and valid [B, T] bool, the rows padded on the left by 0, 4 and 11 slots."""
  tokens = np.random.default_rng(1).integers(0, config.vocab_size, (BATCH, LENGTH), dtype=np.int32)
  return tokens, np.arange(LENGTH) >= np.array([[0], [4], [11]])


def relative_error(ours: Any, theirs: Any) -> float:
  ours, theirs = np.asarray(ours), np.asarray(theirs)
  assert ours.shape == theirs.shape
  return float(np.max(np.abs(ours - theirs)) / np.max(np.abs(theirs)))


def decoded(policy: Policy, params: Any, tokens: jax.Array, valid: jax.Array):
  """logits [B, T, V] and expert choice [L, B, T, K], one token at a time; a prefill is the same function."""

  def probe(router, _):
    return router.expert_index

  weights = policy.for_decode(params, LENGTH)
  cache = policy.init_cache(len(tokens), LENGTH)

  def step(cache, inputs):
    hidden, chosen, cache = policy.decode(weights, *inputs, cache, probe=probe)
    return cache, (hidden, chosen)

  _, (hidden, chosen) = jax.lax.scan(step, cache, (tokens.T, valid.T))
  return policy.unembed(params, hidden.swapaxes(0, 1)), jnp.moveaxis(chosen, 0, 2)


def everything(config: TransformerConfig, params: Any, tokens: np.ndarray, valid: np.ndarray, weight: np.ndarray):
  """One program: (logits, router logits, choice), the gradient of sum(weight * log softmax), and `decoded`."""
  policy = build_policy(config)

  @jax.jit
  def run(params, tokens, valid):
    def loss(params):
      hidden, probed = policy.forward(params, tokens, valid, probe=lambda router, _: router[:2])
      logits = policy.unembed(params, hidden)
      return jnp.sum(jax.nn.log_softmax(logits) * weight), (logits, *probed)

    (_, seen), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    return seen, gradient, decoded(policy, params, tokens, valid)

  return run(params, jnp.asarray(tokens), jnp.asarray(valid))


class Witness:
  """transformers' model as it loads what we save, its weights saved by itself, and what it makes of a batch."""

  def __init__(self, public: dict[str, Any], folder: Any):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = config_json.config_from_hf(public)
    self.tensors = hf_cases.random_tensors(config)
    save_pretrained(folder / "ours", config, params_from_hf(config, self.tensors), shard_bytes=40_000)
    self.model, report = transformers.AutoModelForCausalLM.from_pretrained(
      folder / "ours", dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    self.model.eval().save_pretrained(folder / "saved")
    self.choices: list[np.ndarray] = []
    for layer in self.model.model.layers:
      router = getattr(layer.mlp, "gate", None) or getattr(layer.mlp, "router", None)
      if router is not None:
        router.register_forward_hook(lambda _, __, out: self.choices.append((out[0].detach().numpy(), out[2].numpy())))

  def run(self, tokens: np.ndarray, valid: np.ndarray, weight: np.ndarray):
    """logits [B, T, V], router logits and choice [L, B, T, ...] (None without routers), gradients by public name."""
    import torch

    out = self.model(
      torch.from_numpy(tokens).long(),
      attention_mask=torch.from_numpy(valid).long(),
      position_ids=torch.from_numpy(np.maximum(valid.cumsum(1) - 1, 0)),
      use_cache=False,
    )
    (torch.log_softmax(out.logits, -1) * torch.from_numpy(weight)).sum().backward()
    gradients = {name: p.grad.numpy() for name, p in self.model.named_parameters() if p.grad is not None}
    router = [
      np.stack(parts).reshape(len(self.choices), *tokens.shape, -1) for parts in zip(*self.choices, strict=True)
    ]
    return out.logits.detach().numpy(), *(router or (None, None)), gradients


@pytest.mark.parity
@pytest.mark.parametrize(("family", "case"), hf_cases.EVERY)
def test_logits_routing_gradients_and_decoding_equal_transformers(family, case, tmp_path):
  public = hf_cases.public_config(family, case)
  config = config_json.config_from_hf(public)
  tokens, valid = batch(config)
  weight = np.random.default_rng(2).standard_normal((BATCH, LENGTH, config.vocab_size)).astype(np.float32)
  weight *= valid[..., None]
  witness = Witness(public, tmp_path)
  their_logits, their_router, their_choice, their_gradients = witness.run(tokens, valid, weight)

  # What transformers 5 writes is read as what was published.
  read, params = load_pretrained(tmp_path / "saved", dtype="float32")
  assert dataclasses.replace(read, dtype=config.dtype) == config
  for name, tensor in params_to_hf(config, params).items():
    np.testing.assert_array_equal(tensor, witness.tensors[name], err_msg=name)

  (logits, router, choice), gradient, (step_logits, step_choice) = everything(config, params, tokens, valid, weight)
  assert relative_error(np.asarray(logits)[valid], their_logits[valid]) < 1e-5
  assert relative_error(np.asarray(step_logits)[valid], np.asarray(logits)[valid]) < 1e-5
  if not config.is_dense:
    assert relative_error(np.asarray(router)[:, valid], their_router[:, valid]) < 1e-5
    np.testing.assert_array_equal(np.sort(choice, -1)[:, valid], np.sort(their_choice, -1)[:, valid])
    np.testing.assert_array_equal(np.asarray(step_choice)[:, valid], np.asarray(choice)[:, valid])

  ours = params_to_hf(config, gradient)
  # transformers fuses the experts of one layer in memory: [E, 2 F, D], gate before up, and [E, D, F].
  names, compared = families.FAMILIES[family].names, 0
  for name, theirs in their_gradients.items():
    public_name = name.replace(".mlp.", f".{names.block}.") if ".mlp.gate." in name else name
    if public_name in ours:
      mine = ours[public_name]
    else:
      layer, kind = name.split(".mlp.experts.")
      parts = [
        np.stack([ours[f"{layer}.{names.block}.experts.{e}.{p}.weight"] for e in range(config.num_experts)])
        for p in (names.projections[:2] if kind == "gate_up_proj" else names.projections[2:])
      ]
      mine = np.concatenate(parts, axis=1)
    assert np.max(np.abs(theirs)) > 0, name
    assert relative_error(mine, theirs) < 1e-4, name
    compared += mine.size
  trained = sum(np.size(leaf) for leaf in jax.tree.leaves(params))
  assert compared == trained - config.num_moe_layers * config.num_experts * config.router_bias


@pytest.mark.parametrize(("family", "case"), hf_cases.EVERY)
def test_a_configuration_survives_the_way_to_hugging_face_and_back(family, case):
  config = hf_cases.small_config(family, case)
  written = config_json.config_to_hf(config)
  assert config_json.config_from_hf(json.loads(json.dumps(written))) == config


@pytest.mark.parametrize(("family", "case"), hf_cases.EVERY)
def test_weights_survive_the_round_trip_to_the_bit(family, case):
  config = hf_cases.small_config(family, case)
  tensors = hf_cases.random_tensors(config)
  params = params_from_hf(config, tensors)
  wanted = jax.eval_shape(build_policy(config).init, jax.random.key(0))
  assert jax.tree.structure(params) == jax.tree.structure(wanted)
  assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, wanted)
  back = params_to_hf(config, params)
  assert list(back) == list(tensors)
  for name, tensor in tensors.items():
    np.testing.assert_array_equal(back[name], tensor, err_msg=name)


@pytest.mark.parametrize("family", hf_cases.CASES)
def test_every_parameter_has_logical_axes_of_the_mesh_table(family):
  policy = build_policy(hf_cases.small_config(family))
  shapes, axes = jax.eval_shape(policy.init, jax.random.key(0)), policy.logical_axes()
  assert jax.tree.structure(shapes) == jax.tree.structure(axes, is_leaf=lambda x: isinstance(x, tuple))
  for shape, names in zip(
    jax.tree.leaves(shapes), jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, tuple)), strict=True
  ):
    assert len(shape.shape) == len(names)
    assert set(names) <= {None, *mesh.RULES}


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss"])
def test_a_model_split_over_a_mesh_gives_the_same_hidden_states_and_gradients(family):
  config = hf_cases.small_config(family, vocab_size=64, num_hidden_layers=2)
  params = params_from_hf(config, hf_cases.random_tensors(config))
  tokens = jnp.asarray(np.random.default_rng(1).integers(0, 64, (8, 9)), jnp.int32)
  valid = jnp.arange(9) >= jnp.arange(8)[:, None] // 2

  def run(layout):
    policy = build_policy(config, layout)

    def loss(params):
      hidden, router = policy.forward(params, tokens, valid)
      return jnp.sum(jnp.where(valid[..., None], hidden, 0) ** 3), (hidden, router)

    placed = params if layout is None else jax.device_put(params, mesh.param_shardings(policy, layout))
    return jax.jit(jax.value_and_grad(loss, has_aux=True))(placed)

  (_, (hidden, router)), gradient = run(mesh.make_layout({"fsdp": 2, "expert": 2, "tensor": 2}))
  (_, (want_hidden, want_router)), want_gradient = run(None)
  seen = np.asarray(valid)
  assert relative_error(np.asarray(hidden)[seen], np.asarray(want_hidden)[seen]) < 1e-5
  assert relative_error(np.asarray(router)[:, seen], np.asarray(want_router)[:, seen]) < 1e-5
  for path, leaf in jax.tree_util.tree_flatten_with_path(want_gradient)[0]:
    found = gradient
    for key in path:
      found = found[key.key]
    if np.any(leaf):
      assert relative_error(found, leaf) < 1e-4, jax.tree_util.keystr(path)
