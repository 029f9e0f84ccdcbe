"""Updates of the tiny model: batches, and jitted train steps that tests share, because compiling them dominates."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rspo_jax.objectives.mismatch import MismatchOptions
from rspo_jax.router.shift import ShiftOptions
from rspo_jax.training.loss import UpdateOptions
from rspo_jax.training.train_step import make_train_step
from rspo_jax.types import TrainState
from tests.support import tiny

# Parameters move by exactly minus the gradient. Adam's first step, lr * sign(gradient), would hide its size.
SGD = optax.sgd(1.0)
TERMS = {
  "kl_coefficient": 0.3,
  "entropy_coefficient": 0.1,
  "load_balance_coefficient": 0.2,
  "router_z_coefficient": 0.05,
}
ALL_OPTIONS = UpdateOptions(
  shift=ShiftOptions(0.5, placement="weight", deviation="kl", layers="max", level="sequence"),
  replay="sampler",
  replay_gates=True,
  mismatch=MismatchOptions("icepop", "sequence_mean", upper=1.2, lower=0.8),
  **TERMS,
)
BASE = UpdateOptions(shift=None)


def new_state(params, optimizer=SGD):
  return TrainState(jax.tree.map(jnp.copy, params), optimizer.init(params), jnp.zeros((), jnp.int32))


@functools.cache
def setup(microbatches=1):
  """(policy, params, batch), the batch scored in that many pieces."""
  policy, params = tiny.policy_and_params()
  return policy, params, tiny.train_batch(policy, params, microbatches=microbatches)


def drifted(batch, by=0.3):
  """The batch as if the policy had moved since: other old log-probs and old routing."""
  rng = np.random.default_rng(0)
  noise = jnp.asarray(rng.normal(size=batch.old_log_prob.shape) * by, jnp.float32)
  trace = batch.old_routing
  log_prob = trace.log_prob - jnp.asarray(rng.random(trace.log_prob.shape) * by, jnp.float16)
  return batch.replace(old_log_prob=batch.old_log_prob + noise, old_routing=trace.replace(log_prob=log_prob))


@functools.cache
def jitted(policy, optimizer, options):
  return jax.jit(make_train_step(policy, optimizer, options))


def update(policy, params, batch, options=UpdateOptions(), optimizer=SGD):
  """(state, metrics) after one update of a new state."""
  return jitted(policy, optimizer, options)(new_state(params, optimizer), batch)


def gradient(policy, params, batch, options=UpdateOptions()):
  state, _ = update(policy, params, batch, options)
  return jax.tree.map(lambda old, new: old - new, params, state.params)


def moved_params(policy, params, batch, by=0.5):
  """Parameters after an update: the batch is off-policy to them, and their routers have moved."""
  step = gradient(policy, params, batch, BASE)
  return jax.tree.map(lambda leaf, change: leaf - by * change, params, step)


def assert_close(left, right, tolerance=2e-6):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance), left, right)
