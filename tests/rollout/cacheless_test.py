"""A policy without a cache samples what the same policy samples with one; a forward function alone is a policy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rspo_jax import mesh
from rspo_jax.rollout.cacheless import policy_from_forward, with_cache
from rspo_jax.rollout.continuous import ContinuousSampler
from rspo_jax.rollout.samplers import BatchSampler, draw_rollout
from rspo_jax.rollout.sampling import sample
from rspo_jax.rollout.token_sampling import SamplingOptions
from rspo_jax.training.scoring import score
from tests.support import tiny

CACHE = ("for_decode", "init_cache", "prefill", "decode", "grow", "insert")
OPTIONS = SamplingOptions(5, 2, stop_ids=(0, 1), record_experts=True)


def without_cache(policy):
  return policy._replace(**dict.fromkeys(CACHE))


def assert_same(one, other):
  for name in ("tokens", "valid", "action_mask", "finished"):
    np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)
  np.testing.assert_allclose(one.log_prob, other.log_prob, atol=1e-5)
  # No position routes the first token of a prompt.
  mask = np.asarray(one.valid) & np.pad(np.asarray(one.valid), ((0, 0), (1, 0)))[:, :-1]
  np.testing.assert_array_equal(np.asarray(one.expert_index)[mask], np.asarray(other.expert_index)[mask])


@functools.cache
def with_a_cache():
  policy, params = tiny.policy_and_params()
  return jax.device_get(
    jax.jit(functools.partial(sample, policy, options=OPTIONS))(params, *tiny.prompts(4), jax.random.key(3))
  )


@pytest.mark.parametrize("sizes", [1, 3])
def test_sampling_without_a_cache_equals_sampling_with_one(sizes):
  policy, params = tiny.policy_and_params()
  options = SamplingOptions(5, 2, stop_ids=(0, 1), record_experts=True, cache_sizes=sizes)
  run = jax.jit(functools.partial(sample, without_cache(policy), options=options))
  assert_same(run(params, *tiny.prompts(4), jax.random.key(3)), with_a_cache())


def test_continuous_batching_without_a_cache_equals_sampling_with_one():
  policy, params = tiny.policy_and_params()
  tokens, valid = map(np.asarray, tiny.prompts(4))
  sampler = ContinuousSampler(without_cache(policy), OPTIONS, rows=3, prompt_length=5, refill=2, buckets=(5,))
  assert_same(draw_rollout(sampler, params, tokens, valid, jax.random.key(3)), with_a_cache())


def test_half_a_cache_is_refused():
  policy, _ = tiny.policy_and_params()
  with pytest.raises(ValueError, match=r"the policy has no insert; want all of"):
    with_cache(policy._replace(insert=None))
  assert with_cache(policy) is policy


def forward_alone():
  """The tiny model through its public outputs only: logits and router logits."""
  policy, params = tiny.policy_and_params()

  def forward(params, tokens, valid):
    hidden, router = policy.forward(params, tokens, valid)
    return policy.unembed(params, hidden), router

  return policy_from_forward(lambda key: params, forward, experts_per_token=policy.experts_per_token), policy, params


def test_a_forward_function_alone_samples_and_scores_as_the_whole_policy():
  alone, policy, params = forward_alone()
  assert alone[3:7] == policy[3:7]  # sizes
  run = jax.jit(functools.partial(sample, alone, options=OPTIONS))
  rollout = run(params, *tiny.prompts(4), jax.random.key(3))
  assert_same(rollout, with_a_cache())
  one, other = (
    jax.jit(functools.partial(score, each))(params, rollout.tokens, rollout.valid) for each in (alone, policy)
  )
  np.testing.assert_allclose(one.log_prob, other.log_prob, atol=1e-5)
  np.testing.assert_array_equal(one.trace.expert_index, other.trace.expert_index)
  np.testing.assert_allclose(one.trace.log_prob.astype(np.float32), other.trace.log_prob.astype(np.float32), atol=1e-3)


def test_parameters_without_logical_axes_are_replicated():
  alone, policy, params = forward_alone()
  layout = mesh.make_layout({"data": 4, "fsdp": 2})
  assert all(sharding.is_fully_replicated for sharding in jax.tree.leaves(mesh.param_shardings(alone, layout)))
  tokens, valid = map(np.asarray, tiny.prompts(8))
  sampler = BatchSampler(alone, OPTIONS, prompts=8, prompt_length=5, layout=layout)
  found = draw_rollout(sampler, params, tokens, valid, jax.random.key(3))
  run = jax.jit(functools.partial(sample, policy, options=OPTIONS))
  np.testing.assert_array_equal(found.tokens, run(params, tokens, valid, jax.random.key(3)).tokens)


def test_a_forward_of_another_shape_or_a_replay_is_refused():
  _, _, params = forward_alone()
  make = functools.partial(policy_from_forward, lambda key: params)
  with pytest.raises(ValueError, match=r"shapes \(1, 1\) and \(\); want logits \[B, T, V\]"):
    make(lambda params, tokens, valid: (tokens, jnp.float32(0)), experts_per_token=1)
  with pytest.raises(ValueError, match="experts_per_token is 9; want 1 to the number of experts, 4"):
    make(lambda params, tokens, valid: (jnp.zeros((1, 1, 3)), jnp.zeros((2, 1, 1, 4))), experts_per_token=9)
  alone, *_ = forward_alone()
  with pytest.raises(ValueError, match="cannot replay experts"):
    alone.forward(params, *tiny.prompts(2), replay=object())
