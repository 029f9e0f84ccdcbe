"""Load balance: hand formulas, an even load as the minimum, microbatches, and the bias that needs no gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rspo_jax.router.balance import balance_probe, load_balance_loss, router_bias_step, router_z_loss
from rspo_jax.types import RouterOutput

L, B, T, E, K = 2, 3, 4, 5, 2
MASK = np.random.default_rng(1).random((B, T)) < 0.7


def router(logits):
  """The output of a router with logits [..., E]: top-k of the logits."""
  gate, index = jax.lax.top_k(logits, K)
  return RouterOutput(logits, index.astype(jnp.int32), jax.nn.softmax(gate))


def sums(logits, mask):
  """`balance_probe` of every layer: [L, B, T, E] -> BalanceSums."""
  return jax.vmap(lambda x: balance_probe(mask)(router(x), None))(logits)


def logits(seed=0):
  return np.random.default_rng(seed).normal(size=(L, B, T, E)).astype(np.float32) * 2


def loss(x, mask, choices=None, tokens=None):
  totals = sums(x, mask)
  tokens = mask.sum() if tokens is None else tokens
  balance = load_balance_loss(totals.probability, totals.choices if choices is None else choices, tokens)
  return balance + 0.1 * router_z_loss(totals.z, tokens)


value_and_gradient = jax.jit(jax.value_and_grad(loss))


@pytest.mark.parametrize("way", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_the_probe_sums_over_masked_positions(way):
  x = logits()
  got = way(lambda x: sums(x, MASK))(x)
  probability = np.exp(x) / np.exp(x).sum(-1, keepdims=True)
  for layer in range(L):
    chosen = np.argsort(-x[layer], axis=-1)[..., :K][MASK]
    np.testing.assert_array_equal(got.choices[layer], np.bincount(chosen.ravel(), minlength=E))
    np.testing.assert_allclose(got.probability[layer], probability[layer][MASK].sum(0), rtol=1e-5)
    z = np.log(np.exp(x[layer].astype(np.float64)).sum(-1)) ** 2
    np.testing.assert_allclose(got.z[layer], z[MASK].sum(), rtol=1e-5)
  assert got.choices.dtype == jnp.int32


def test_losses_equal_their_formulas():
  x = logits()
  got, tokens = sums(x, MASK), MASK.sum()
  share, mean = np.asarray(got.choices) / tokens, np.asarray(got.probability) / tokens
  want = np.mean([E * sum(share[layer, e] * mean[layer, e] for e in range(E)) for layer in range(L)])
  np.testing.assert_allclose(load_balance_loss(got.probability, got.choices, tokens), want, rtol=1e-6)
  np.testing.assert_allclose(router_z_loss(got.z, tokens), np.asarray(got.z).mean() / tokens, rtol=1e-6)


def test_an_even_load_costs_k_and_a_collapsed_one_up_to_all_experts():
  tokens = 20
  even = jnp.full((L, E), tokens / E)
  np.testing.assert_allclose(load_balance_loss(even, even * K, tokens), K, rtol=1e-6)
  collapsed = jnp.zeros((L, E)).at[:, 0].set(tokens)
  np.testing.assert_allclose(load_balance_loss(collapsed, collapsed * K, tokens), E * K, rtol=1e-6)


def test_uneven_layers_do_not_cancel():
  tokens = 10
  first = jnp.asarray([[1.0, 0.0], [0.0, 1.0]]) * tokens  # the load pooled over layers is even
  np.testing.assert_allclose(load_balance_loss(first, first, tokens), 2.0, rtol=1e-6)


def test_microbatches_add_up_to_the_whole():
  """With the choices and tokens of the whole minibatch, losses and gradients of its rows are those of the whole."""
  x, whole = logits(seed=3), sums(logits(seed=3), MASK)
  value, gradient = value_and_gradient(x, MASK)
  assert gradient.any()
  parts = [value_and_gradient(x[:, i : i + 1], MASK[i : i + 1], whole.choices, MASK.sum()) for i in range(B)]
  np.testing.assert_allclose(sum(part[0] for part in parts), value, rtol=1e-6)
  np.testing.assert_allclose(np.concatenate([part[1] for part in parts], axis=1), gradient, rtol=1e-4, atol=1e-7)


def test_positions_outside_the_mask_have_zero_gradient_and_an_empty_batch_has_zero_loss():
  gradient = value_and_gradient(logits(), MASK)[1]
  assert not np.asarray(gradient)[:, ~MASK].any()
  value, gradient = value_and_gradient(logits(), MASK & False)
  assert value == 0
  assert not gradient.any()


def test_the_gradient_flows_through_the_probabilities_alone_and_evens_the_load():
  x = logits(seed=5)
  balance = lambda x: load_balance_loss(sums(x, MASK).probability, sums(x, MASK).choices, MASK.sum())
  choices = sums(x, MASK).choices
  fixed = lambda x: load_balance_loss(sums(x, MASK).probability, choices, MASK.sum())
  np.testing.assert_array_equal(jax.grad(balance)(x), jax.grad(fixed)(x))
  of_choices = jax.grad(lambda c: load_balance_loss(jnp.ones((L, E)), c, 10))(jnp.ones((L, E)))
  assert not of_choices.any()
  assert balance(x - 0.5 * jax.grad(balance)(x)) < balance(x)


def test_the_bias_steps_against_the_load_by_its_rate():
  load = jnp.asarray([[4, 0, 2], [1, 1, 1], [9, 0, 0]], jnp.int32)
  got = router_bias_step(load, 0.01)
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, [[-0.01, 0.01, 0], [0, 0, 0], [-0.01, 0.01, 0.01]], rtol=1e-6)
