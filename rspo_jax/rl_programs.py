"""The programs of an RL step as records, for the lines that are printed before compiling, and for a planner."""

import jax
import jax.numpy as jnp
import optax

from rspo_jax import mesh
from rspo_jax.rl_functions import UpdateFunctions
from rspo_jax.rollout.samplers import Sampler
from rspo_jax.router.trace import index_dtype
from rspo_jax.training.state import abstract_state
from rspo_jax.types import Policy, Program, Rollout


def rl_programs(
  policy: Policy,
  optimizer: optax.GradientTransformation,
  functions: UpdateFunctions,
  sampler: Sampler,
  *,
  rows: int,
  prompt_length: int,
  versions: bool = False,
) -> tuple[Program, ...]:
  """Everything that RL steps compile, from shapes alone: nothing is computed, and no device is needed.

  Args:
    rows: B = P * G of a rollout. prompt_length: Tp, tokens. versions: rollouts say which policy sampled each token.
  """
  options, layout = functions.options, functions.layout
  slots = prompt_length + sampler.options.max_new_tokens

  def outputs(function, *arguments):
    """Abstract outputs, which are split over their rows."""
    return mesh.abstract_batch(jax.eval_shape(function, *arguments), layout)

  state = abstract_state(policy, optimizer, layout)
  rollout = mesh.abstract_batch(_rollout(policy, rows, slots, sampler.options.record_experts, versions), layout)
  reward = mesh.abstract_batch(jax.ShapeDtypeStruct((rows,), jnp.float32), layout)
  part = outputs(functions.split, rollout)[0]
  scores = outputs(functions.score, state.params, part)
  penalty = None
  programs = [
    Program(f"split {rows} rows into {options.minibatches} minibatches", functions.split, (rollout,)),
    Program(
      f"score a minibatch of {part.tokens.shape[0]} rows of {slots} tokens", functions.score, (state.params, part)
    ),
  ]
  needs_reference = functions.make_batch(part, reward, scores, scores.log_prob).reference_log_prob is not None
  if needs_reference or options.reward_kl_coefficient:
    programs.append(Program("score a minibatch under the reference", functions.score_reference, (state.params, part)))
  if options.reward_kl_coefficient:
    log_probs = [scores.log_prob] * options.minibatches
    programs.append(Program("KL penalty", functions.kl_penalty, (log_probs, log_probs)))
    penalty = outputs(functions.kl_penalty, log_probs, log_probs)
  advantages = (reward, rollout.action_mask, penalty)
  advantage = outputs(functions.advantages, *advantages)
  batch = functions.make_batch(part, outputs(functions.split, advantage)[0], scores, scores.log_prob)
  programs += [
    Program(f"advantages of {rows} rows", functions.advantages, advantages),
    Program(f"split the advantages of {rows} rows", functions.split, (advantage,)),
    Program(f"train step on {part.tokens.shape[0]} rows of {slots} tokens", functions.train_step, (state, batch)),
  ]
  return (*sampler.programs, *programs)


def _rollout(policy: Policy, rows: int, slots: int, record_experts: bool, versions: bool) -> Rollout:
  def shape(dtype, *more):
    return jax.ShapeDtypeStruct((rows, slots, *more), dtype)

  experts = (policy.num_moe_layers, policy.experts_per_token)
  return Rollout(
    tokens=shape(jnp.int32),
    valid=shape(bool),
    action_mask=shape(bool),
    sampler_log_prob=shape(jnp.float32),
    log_prob=shape(jnp.float32),
    finished=jax.ShapeDtypeStruct((rows,), bool),
    expert_index=shape(index_dtype(policy.num_experts), *experts) if record_experts else None,
    version=shape(jnp.int32) if versions else None,
  )
