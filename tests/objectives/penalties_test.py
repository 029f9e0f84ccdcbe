"""KL estimators against exact divergences over a whole vocabulary, and the penalty of long completions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rspo_jax.objectives.penalties import KL_ESTIMATORS, kl, overlong_penalty

LOGITS = np.asarray([0.5, -1.0, 0.2, 1.5])
REFERENCE = np.asarray([-0.3, 0.4, 0.9, 0.1])


@pytest.mark.parametrize("way", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_estimators_by_hand(way):
  log_prob, reference = np.asarray([[-1.0, -2.0, -3.0]]), np.asarray([[-1.5, -2.0, -1.0]])
  r = log_prob - reference
  for estimator, want in (("k1", r), ("k2", r**2 / 2), ("k3", np.exp(-r) - 1 + r)):
    arguments = (jnp.asarray(x, jnp.float32) for x in (log_prob, reference))
    got = way(functools.partial(kl, estimator=estimator))(*arguments)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=1e-6)


def expected(f):
  """The exact expectation of a per-token estimate over the policy's tokens, and its gradient for fixed samples."""

  def sampled(logits):
    log_prob = jax.nn.log_softmax(logits)
    return jnp.sum(jax.lax.stop_gradient(jnp.exp(log_prob)) * f(log_prob))

  return jax.value_and_grad(sampled)(jnp.asarray(LOGITS))


def test_k1_and_k3_are_unbiased_and_the_three_gradients_differ():
  """k1's is zero, k2's is that of KL(policy || reference), k3's that of KL(reference || policy)."""
  with jax.enable_x64(True):
    reference = jax.nn.log_softmax(jnp.asarray(REFERENCE))

    def exact(logits, reverse):
      one, other = (jax.nn.log_softmax(logits), reference)[:: -1 if reverse else 1]
      return jnp.sum(jnp.exp(one) * (one - other))

    divergence, reverse_kl = jax.value_and_grad(exact)(jnp.asarray(LOGITS), False)
    forward_kl = jax.grad(exact)(jnp.asarray(LOGITS), True)
    of = {name: expected(lambda x, name=name: kl(x, reference, name)) for name in KL_ESTIMATORS}
  np.testing.assert_allclose(of["k1"][0], divergence, rtol=1e-9)
  np.testing.assert_allclose(of["k3"][0], divergence, rtol=1e-9)
  assert abs(float(of["k2"][0]) - float(divergence)) > 0.01
  np.testing.assert_allclose(of["k1"][1], 0, atol=1e-12)
  np.testing.assert_allclose(of["k2"][1], reverse_kl, rtol=1e-9)
  np.testing.assert_allclose(of["k3"][1], forward_kl, rtol=1e-9)
  assert np.abs(np.asarray(forward_kl) - np.asarray(reverse_kl)).max() > 0.01


@given(st.lists(st.floats(-20, 20, width=32), min_size=6, max_size=6))
@settings(max_examples=50, deadline=None)
def test_k3_equals_its_formula_and_is_never_negative(log_ratio):
  log_ratio = np.asarray(log_ratio, np.float32)
  got = kl(-log_ratio, np.zeros_like(log_ratio), "k3")
  assert (got >= 0).all()
  exact = np.expm1(log_ratio.astype(np.float64)) - log_ratio
  np.testing.assert_allclose(got, exact, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
def test_equal_policies_have_a_divergence_of_exactly_zero(estimator):
  x = jnp.asarray([[-0.3, -17.0]], jnp.bfloat16)
  value = kl(x, x, estimator)
  assert value.dtype == jnp.float32
  assert not value.any()


def test_unknown_estimators_are_refused():
  with pytest.raises(ValueError, match=r"estimator is 'k4'; want one of .*'k3'"):
    kl(jnp.zeros((1, 1)), jnp.zeros((1, 1)), "k4")


@pytest.mark.parametrize("way", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_overlong_penalty_falls_within_the_buffer_and_is_constant_beyond(way):
  length = np.asarray([1, 12, 13, 14, 16, 17, 99], np.int32)
  got = way(functools.partial(overlong_penalty, max_length=16, buffer=4, penalty=2.0))(length)
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, [0, 0, -0.5, -1.0, -2.0, -2.0, -2.0])


@pytest.mark.parametrize("bad", [dict(buffer=0), dict(buffer=17), dict(buffer=4, penalty=-1.0)], ids=str)
def test_a_buffer_outside_the_limit_is_refused(bad):
  with pytest.raises(ValueError, match=rf"buffer is {bad['buffer']}, max_length 16 .*want 0 < buffer <= max_length"):
    overlong_penalty(jnp.ones(2), max_length=16, **bad)
