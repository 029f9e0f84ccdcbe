"""Parity of every public family with its model in transformers, for the same weights."""

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
from models.huggingface.parameters import params_from_hf, params_to_hf
from models.policy import build_policy
from rspo_jax import mesh
from rspo_jax.types import Policy
from tests.support import hf_cases

BATCH, LENGTH = 3, 17


def batch(config: TransformerConfig) -> tuple[np.ndarray, np.ndarray]:
  """tokens [B, T] int32 and valid [B, T] bool; rows are left-padded by 0, 4 and 11 slots."""
  tokens = np.random.default_rng(1).integers(0, config.vocab_size, (BATCH, LENGTH), dtype=np.int32)
  return tokens, np.arange(LENGTH) >= np.array([[0], [4], [11]])


def relative_error(actual: Any, expected: Any) -> float:
  actual, expected = np.asarray(actual), np.asarray(expected)
  assert actual.shape == expected.shape
  return float(np.max(np.abs(actual - expected)) / np.max(np.abs(expected)))


def decode_all(policy: Policy, params: Any, tokens: jax.Array, valid: jax.Array):
  """logits [B, T, V] and expert_index [L, B, T, K] of decoding one token at a time; prefill is the same function."""

  def probe(router, _):
    return router.expert_index

  weights = policy.for_decode(params, LENGTH)
  cache = policy.init_cache(len(tokens), LENGTH)

  def step(cache, inputs):
    hidden, expert_index, cache = policy.decode(weights, *inputs, cache, probe=probe)
    return cache, (hidden, expert_index)

  _, (hidden, expert_index) = jax.lax.scan(step, cache, (tokens.T, valid.T))
  return policy.unembed(params, hidden.swapaxes(0, 1)), jnp.moveaxis(expert_index, 0, 2)


def run_policy(config: TransformerConfig, params: Any, tokens: np.ndarray, valid: np.ndarray, weight: np.ndarray):
  """(logits, router logits, expert_index), the gradient of sum(weight * log softmax), and `decode_all`; one program."""
  policy = build_policy(config)

  @jax.jit
  def run(params, tokens, valid):
    def loss(params):
      hidden, probed = policy.forward(params, tokens, valid, probe=lambda router, _: router[:2])
      logits = policy.unembed(params, hidden)
      return jnp.sum(jax.nn.log_softmax(logits) * weight), (logits, *probed)

    (_, outputs), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    return outputs, gradient, decode_all(policy, params, tokens, valid)

  return run(params, jnp.asarray(tokens), jnp.asarray(valid))


class Reference:
  """The model of transformers, loaded from a checkpoint that we saved, and saved again by transformers."""

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
    self.routing: list[tuple[np.ndarray, np.ndarray]] = []
    for layer in self.model.model.layers:
      router = getattr(layer.mlp, "gate", None) or getattr(layer.mlp, "router", None)
      if router is not None:
        router.register_forward_hook(lambda _, __, out: self.routing.append((out[0].detach().numpy(), out[2].numpy())))

  def run(self, tokens: np.ndarray, valid: np.ndarray, weight: np.ndarray):
    """logits [B, T, V], router logits and expert_index [L, B, T, ...] (None without routers), gradients by name."""
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
      np.stack(parts).reshape(len(self.routing), *tokens.shape, -1) for parts in zip(*self.routing, strict=True)
    ]
    return out.logits.detach().numpy(), *(router or (None, None)), gradients


@pytest.mark.parity
@pytest.mark.parametrize(("family", "case"), hf_cases.ALL_CASES)
def test_logits_routing_gradients_and_decoding_equal_transformers(family, case, tmp_path):
  public = hf_cases.public_config(family, case)
  config = config_json.config_from_hf(public)
  tokens, valid = batch(config)
  weight = np.random.default_rng(2).standard_normal((BATCH, LENGTH, config.vocab_size)).astype(np.float32)
  weight *= valid[..., None]
  reference = Reference(public, tmp_path)
  want_logits, want_router, want_index, want_gradients = reference.run(tokens, valid, weight)

  # Checkpoints written by transformers 5 load as the published ones.
  read, params = load_pretrained(tmp_path / "saved", dtype="float32")
  assert dataclasses.replace(read, dtype=config.dtype) == config
  for name, tensor in params_to_hf(config, params).items():
    np.testing.assert_array_equal(tensor, reference.tensors[name], err_msg=name)

  (logits, router, index), gradient, (step_logits, step_index) = run_policy(config, params, tokens, valid, weight)
  assert relative_error(np.asarray(logits)[valid], want_logits[valid]) < 1e-5
  assert relative_error(np.asarray(step_logits)[valid], np.asarray(logits)[valid]) < 1e-5
  if not config.is_dense:
    assert relative_error(np.asarray(router)[:, valid], want_router[:, valid]) < 1e-5
    np.testing.assert_array_equal(np.sort(index, -1)[:, valid], np.sort(want_index, -1)[:, valid])
    np.testing.assert_array_equal(np.asarray(step_index)[:, valid], np.asarray(index)[:, valid])

  gradients = params_to_hf(config, gradient)
  # transformers fuses the experts of one layer in memory: [E, 2 F, D], gate before up, and [E, D, F].
  names, compared = families.FAMILIES[family].names, 0
  for name, want_gradient in want_gradients.items():
    public_name = name.replace(".mlp.", f".{names.block}.") if ".mlp.gate." in name else name
    if public_name in gradients:
      actual = gradients[public_name]
    else:
      layer, kind = name.split(".mlp.experts.")
      parts = [
        np.stack([gradients[f"{layer}.{names.block}.experts.{e}.{p}.weight"] for e in range(config.num_experts)])
        for p in (names.projections[:2] if kind == "gate_up_proj" else names.projections[2:])
      ]
      actual = np.concatenate(parts, axis=1)
    assert np.max(np.abs(want_gradient)) > 0, name
    assert relative_error(actual, want_gradient) < 1e-4, name
    compared += actual.size
  trained = sum(np.size(leaf) for leaf in jax.tree.leaves(params))
  assert compared == trained - config.num_moe_layers * config.num_experts * config.router_bias


@pytest.mark.parametrize(("family", "case"), hf_cases.ALL_CASES)
def test_configuration_round_trip_through_config_json_is_exact(family, case):
  config = hf_cases.small_config(family, case)
  entries = config_json.config_to_hf(config)
  assert config_json.config_from_hf(json.loads(json.dumps(entries))) == config


@pytest.mark.parametrize(("family", "case"), hf_cases.ALL_CASES)
def test_weights_round_trip_is_bitwise_equal(family, case):
  config = hf_cases.small_config(family, case)
  tensors = hf_cases.random_tensors(config)
  params = params_from_hf(config, tensors)
  shapes = jax.eval_shape(build_policy(config).init, jax.random.key(0))
  assert jax.tree.structure(params) == jax.tree.structure(shapes)
  assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, shapes)
  converted = params_to_hf(config, params)
  assert list(converted) == list(tensors)
  for name, tensor in tensors.items():
    np.testing.assert_array_equal(converted[name], tensor, err_msg=name)


@pytest.mark.parametrize("family", hf_cases.CASES)
def test_logical_axes_of_every_parameter_are_in_the_mesh_table(family):
  policy = build_policy(hf_cases.small_config(family))
  shapes, axes = jax.eval_shape(policy.init, jax.random.key(0)), policy.logical_axes()
  assert jax.tree.structure(shapes) == jax.tree.structure(axes, is_leaf=lambda x: isinstance(x, tuple))
  for shape, names in zip(
    jax.tree.leaves(shapes), jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, tuple)), strict=True
  ):
    assert len(shape.shape) == len(names)
    assert set(names) <= {None, *mesh.RULES}


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss"])
def test_sharded_model_gives_the_same_hidden_states_and_gradients(family):
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
  mask = np.asarray(valid)
  assert relative_error(np.asarray(hidden)[mask], np.asarray(want_hidden)[mask]) < 1e-5
  assert relative_error(np.asarray(router)[:, mask], np.asarray(want_router)[:, mask]) < 1e-5
  want_leaves, structure = jax.tree_util.tree_flatten_with_path(want_gradient)
  assert jax.tree.structure(gradient) == structure
  for (path, want), actual in zip(want_leaves, jax.tree.leaves(gradient), strict=True):
    if np.any(want):
      assert relative_error(actual, want) < 1e-4, jax.tree_util.keystr(path)
