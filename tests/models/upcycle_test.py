import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.huggingface.checkpoint import read_config, save_pretrained
from models.huggingface.parameters import params_from_hf
from models.policy import build_policy
from models.upcycle import upcycle
from tests.support import hf_cases


def dense(family):
  config = hf_cases.small_config(family)
  return config, jax.tree.map(jnp.asarray, params_from_hf(config, hf_cases.random_tensors(config)))


def logits(config, params):
  tokens = jnp.asarray(np.random.default_rng(0).integers(0, config.vocab_size, (2, 9)), jnp.int32)
  policy = build_policy(config)
  hidden, router = jax.jit(policy.forward)(params, tokens, tokens >= 0)
  return policy.unembed(params, hidden), router


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_without_noise_the_mixture_equals_the_dense_model(family, tmp_path):
  config, params = dense(family)
  mixture, new = upcycle(config, params, jax.random.key(0), num_experts=4, num_experts_per_tok=2)
  expected, _ = logits(config, params)
  actual, router = logits(mixture, new)
  np.testing.assert_allclose(actual, expected, atol=1e-5 * np.abs(expected).max())
  assert router.shape[-1] == 4 and np.std(router) > 0
  shapes = jax.eval_shape(build_policy(mixture).init, jax.random.key(0))
  assert jax.tree.map(np.shape, new) == jax.tree.map(np.shape, shapes)
  save_pretrained(tmp_path / "saved", mixture, new)
  assert read_config(tmp_path / "saved") == mixture


def test_noise_has_the_given_standard_deviation_relative_to_each_matrix():
  config, params = dense("qwen3")
  _, new = upcycle(config, params, jax.random.key(0), num_experts=4, num_experts_per_tok=2, noise=0.1)
  for name in ("gate", "up", "down"):
    before, after = params["layers_0"]["moe"][name], new["layers_0"]["moe"][name]
    ratio = np.std(after - before, axis=(-2, -1)) / np.std(before, axis=(-2, -1))
    np.testing.assert_allclose(ratio, 0.1, rtol=0.15)
    assert np.abs(after[:, 0] - after[:, 1]).min(axis=(-2, -1)).max() >= 0
    assert not np.array_equal(after[:, 0], after[:, 1])


def test_mixture_is_determined_by_the_key():
  config, params = dense("qwen2")
  first, same, other = [
    upcycle(config, params, jax.random.key(seed), num_experts=2, num_experts_per_tok=1, noise=0.1)[1]
    for seed in (0, 0, 1)
  ]
  jax.tree.map(np.testing.assert_array_equal, first, same)
  assert not np.array_equal(first["layers_0"]["moe"]["router"], other["layers_0"]["moe"]["router"])


def test_mixtures_and_single_experts_are_refused():
  config = hf_cases.small_config("mixtral")
  with pytest.raises(ValueError, match="'mixtral'"):
    upcycle(config, {}, jax.random.key(0), num_experts=4, num_experts_per_tok=2)
  config, params = dense("qwen3")
  with pytest.raises(ValueError, match="2 or more"):
    upcycle(config, params, jax.random.key(0), num_experts=1, num_experts_per_tok=1)
