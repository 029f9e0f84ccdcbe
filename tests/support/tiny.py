"""A model and batches small enough for tests."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from models.config import tiny_moe
from models.policy import build_policy
from rspo_jax.rollout.sampling import sample
from rspo_jax.rollout.token_sampling import SamplingOptions
from rspo_jax.training.scoring import score
from rspo_jax.types import TrainBatch

CONFIG = tiny_moe(
  vocab_size=24,
  hidden_size=16,
  num_hidden_layers=3,
  head_dim=8,
  num_experts=4,
  moe_intermediate_size=16,
  intermediate_size=16,
  mlp_only_layers=(1,),
  scan_layers=True,  # compiles in less time
)


@functools.cache
def policy_and_params(config=CONFIG, seed=0):
  """The policy on one device, and parameters whose router logits differ enough that rounding changes no expert."""
  policy = build_policy(config)
  params = jax.jit(policy.init)(jax.random.key(seed))
  return policy, jax.tree_util.tree_map_with_path(
    lambda path, leaf: leaf * 4 if "router" in jax.tree_util.keystr(path) else leaf, params
  )


def prompts(rows=8, length=5, seed=0):
  """Left-padded prompts of different lengths: tokens [rows, length], valid."""
  rng = np.random.default_rng(seed)
  valid = np.arange(length) >= rng.integers(0, length - 1, size=(rows, 1))
  tokens = rng.integers(1, CONFIG.vocab_size, size=(rows, length)) * valid
  return jnp.asarray(tokens, jnp.int32), jnp.asarray(valid)


@functools.cache
def _sampler(policy, options):
  return jax.jit(functools.partial(sample, policy, options=options))


@functools.cache
def _scorer(policy, microbatches):
  return jax.jit(functools.partial(score, policy, all_experts=True, gates=True, microbatches=microbatches))


def rollout(policy, params, rows=8, new=6, samples=2, seed=0):
  options = SamplingOptions(new, samples, stop_ids=(0, 1, 2))
  return _sampler(policy, options)(params, *prompts(rows // samples), jax.random.key(seed))


def train_batch(policy, params, rows=8, seed=0, microbatches=1):
  """A scored batch with advantages of both signs, one of them 0."""
  sampled = rollout(policy, params, rows, seed=seed)
  scored = _scorer(policy, microbatches)(params, sampled.tokens, sampled.valid)
  advantage = np.random.default_rng(seed).normal(size=rows).astype(np.float32)
  advantage[1] = 0
  return TrainBatch(
    sampled.tokens,
    sampled.valid,
    sampled.action_mask,
    scored.log_prob,
    jnp.asarray(advantage),
    scored.trace,
    sampler_log_prob=sampled.log_prob,
    reference_log_prob=scored.log_prob - 0.1 * sampled.action_mask,
  )
