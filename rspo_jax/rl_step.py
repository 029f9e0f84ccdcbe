"""One RL step: sample, reward, score, update, and now and then look closer."""

import functools
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging

from experiments.setup.build import Parts, recipe, update_options
from experiments.setup.optimizer import rl_optimizer
from rspo_jax import mesh
from rspo_jax.objectives import advantages, penalties
from rspo_jax.rollout.collector import Rollouts
from rspo_jax.training import diagnostics
from rspo_jax.training.attribution import make_gradient_noise, make_replay_probe
from rspo_jax.training.minibatches import split_rows
from rspo_jax.training.scoring import score
from rspo_jax.training.state import state_shardings
from rspo_jax.training.train_step import jit_step, make_train_step
from rspo_jax.types import Params, Rollout, TrainBatch, TrainState


class RL(NamedTuple):
  """The compiled parts of RL. step: (state, number of the step, reference params or None) -> (state, metrics)."""

  optimizer: optax.GradientTransformation
  step: Callable
  rollouts: Rollouts


def build_rl(parts: Parts) -> RL:
  config = parts.config
  rl, objective, router = config.rl, recipe(config), config.router
  if router.shift and router.placement == "before_clip" and config.objective.name in ("gspo", "gspo_token"):
    logging.warning(
      "%s with router shift before its narrow clip: a mean gamma below the lower bound takes the gradient of every "
      "negative sequence; --config.router.placement=weight does not (docs/algorithms.md).",
      config.objective.name,
    )
  if rl.carry_over and config.mismatch.correction == "none":
    logging.warning(
      "config.rl.carry_over is %d: tokens that older policies drew count as drawn by the present one; "
      "--config.mismatch.correction=tis weighs them (docs/algorithms.md).",
      rl.carry_over,
    )
  optimizer, schedule = rl_optimizer(config)
  options = update_options(config)
  update = jit_step(
    make_train_step(parts.policy, optimizer, options),
    parts.layout,
    state_shardings(parts.policy, optimizer, parts.layout),
  )
  by_rows = parts.layout.sharding("batch")
  combine = jax.jit(diagnostics.over_updates)
  rollouts = Rollouts(parts)
  needs_trace = router.shift or router.replay != "none" or config.diagnostics.every
  kl_in_reward = config.objective.kl_coefficient if config.objective.kl_in == "reward" else 0.0

  @functools.partial(jax.jit, out_shardings=by_rows)
  def score_minibatch(params, part: Rollout):
    return score(
      parts.policy,
      params,
      part.tokens,
      part.valid,
      expert_index=part.expert_index,
      all_experts=router.shift and router.deviation == "kl",
      gates=router.replay_gates,
      microbatches=rl.microbatches,
      chunk=rl.logits_chunk,
    )

  @functools.partial(jax.jit, out_shardings=by_rows)
  def score_reference(params, part: Rollout):
    return score(
      parts.policy, params, part.tokens, part.valid, microbatches=rl.microbatches, chunk=rl.logits_chunk
    ).log_prob

  @functools.partial(jax.jit, out_shardings=by_rows)
  def deal(tree):
    """Whole groups to every minibatch, in turn."""
    cut = split_rows(tree, rl.minibatches, group=rl.samples_per_prompt)
    return [jax.tree.map(lambda leaf, i=i: leaf[i], cut) for i in range(rl.minibatches)]

  rows = rl.prompts * rl.samples_per_prompt
  order = split_rows(np.arange(rows), rl.minibatches, group=rl.samples_per_prompt).reshape(-1)
  back = np.argsort(order)

  @functools.partial(jax.jit, out_shardings=by_rows)
  def kl_penalty(log_probs, references):
    """Per token, of the whole rollout, from its minibatches."""
    old, reference = (jnp.concatenate(pieces)[back] for pieces in (log_probs, references))
    return kl_in_reward * penalties.kl(old, reference, config.objective.kl_estimator)

  @functools.partial(jax.jit, out_shardings=by_rows)
  def advantages_of(reward, mask, penalty):
    """[B], or [B, T] where they are whitened over tokens."""
    of_rows = functools.partial(
      advantages.group_advantages,
      group=rl.samples_per_prompt,
      baseline=objective.baseline,
      scale=objective.scale,
      ddof=config.objective.ddof,
      epsilon=config.objective.std_epsilon,
    )
    if objective.scale == "batch_std":
      return advantages.whiten(advantages.token_advantages(of_rows(reward), mask, penalty=penalty), mask)
    return of_rows(reward if penalty is None else reward - jnp.where(mask, penalty, 0).sum(axis=1))

  if config.diagnostics.every:
    noise = jax.jit(make_gradient_noise(parts.policy, options, config.diagnostics.pieces))
    replay_probe = jax.jit(make_replay_probe(parts.policy, logits_chunk=rl.logits_chunk))

  def step(state: TrainState, number: int, reference: Params | None = None) -> tuple[TrainState, dict]:
    start = time.perf_counter()
    sampled = rollouts(state.params, number)
    times = [time.perf_counter()]
    rollout = sampled.rollout
    if rl.mask_truncated:
      rollout = rollout.replace(action_mask=rollout.action_mask & rollout.finished[:, None])
    dealt = deal(rollout)
    scores = [score_minibatch(state.params, part) for part in dealt]
    references = [None if reference is None else score_reference(reference, part) for part in dealt]
    penalty = kl_penalty([scored.log_prob for scored in scores], references) if kl_in_reward else None
    advantage = advantages_of(mesh.put_batch(sampled.reward, parts.layout), rollout.action_mask, penalty)
    minibatches = [
      TrainBatch(
        part.tokens,
        part.valid,
        part.action_mask,
        scored.log_prob,
        part_advantage,
        old_routing=scored.trace if needs_trace else None,
        sampler_log_prob=None if options.mismatch is None else part.log_prob,
        reference_log_prob=of_reference if options.kl_coefficient else None,
      )
      for part, part_advantage, scored, of_reference in zip(dealt, deal(advantage), scores, references, strict=True)
    ]
    jax.block_until_ready(minibatches)
    times.append(time.perf_counter())
    updates = []
    for batch in minibatches * rl.epochs:
      state, metrics = update(state, batch)
      updates.append(metrics)
    metrics = jax.device_get(combine(updates))
    times.append(time.perf_counter())
    if config.diagnostics.every and (number + 1) % config.diagnostics.every == 0:
      closer = noise(state, minibatches[-1]) | replay_probe(state.params, minibatches[-1])
      metrics |= jax.device_get(closer) | {"seconds/diagnostics": time.perf_counter() - times[-1]}
    scoring, training = np.diff(times)
    tokens = mesh.fetch(rollout.valid).sum()
    done = number * len(updates) + len(updates) - 1
    sampling, rewarding = sampled.seconds
    return state, metrics | sampled.metrics | {
      "optimizer/learning_rate": schedule(done),
      "speed/sample_tokens_per_second": sampled.tokens / sampling,
      "speed/score_tokens_per_second": tokens / scoring,
      "speed/train_tokens_per_second": tokens * rl.epochs / training,
      "seconds/sample": sampling,
      "seconds/reward": rewarding,
      "seconds/score": scoring,
      "seconds/train": training,
      "seconds/step": time.perf_counter() - start,
    }

  return RL(optimizer, step, rollouts)
