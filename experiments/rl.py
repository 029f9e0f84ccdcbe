"""F4: one RL step: sample, reward, score, update."""

import functools
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
import optax

from experiments.wiring import SAMPLING, Parts, make_optimizer, update_options
from rspo_jax import advantages, diagnostics, mesh
from rspo_jax.data import batches
from rspo_jax.minibatches import split_rows
from rspo_jax.rewards import score_completions
from rspo_jax.scoring import score
from rspo_jax.train_step import jit_step, make_train_step
from rspo_jax.types import TrainBatch, TrainState


class RL(NamedTuple):
  """The compiled parts of RL. step: (state, number of the step) -> (state, metrics)."""

  optimizer: optax.GradientTransformation
  step: Callable


def build_rl(parts: Parts) -> RL:
  config = parts.config
  rl = config.rl
  optimizer, schedule = make_optimizer(rl.optimizer, rl.steps * rl.epochs * rl.minibatches)
  update = jit_step(
    make_train_step(parts.policy, optimizer, update_options(config)),
    parts.layout,
    mesh.state_shardings(parts.policy, optimizer, parts.layout),
  )
  options = parts.sampling_options(rl.samples_per_prompt)
  examples_of = batches(parts.splits["train"], rl.prompts, config.seed)
  by_rows = parts.layout.sharding("batch")
  combine = jax.jit(diagnostics.over_updates)

  @functools.partial(jax.jit, out_shardings=by_rows)
  def score_minibatch(params, tokens, valid):
    return score(parts.policy, params, tokens, valid, microbatches=rl.microbatches, chunk=rl.logits_chunk)

  @functools.partial(jax.jit, out_shardings=by_rows)
  def deal(rollout, advantage):
    """Whole groups to every minibatch, in turn."""
    cut = split_rows((rollout, advantage), rl.minibatches, group=rl.samples_per_prompt)
    return [jax.tree.map(lambda leaf, i=i: leaf[i], cut) for i in range(rl.minibatches)]

  @jax.jit
  def advantages_of(reward):
    return (
      advantages.group_advantages(reward, rl.samples_per_prompt, normalize_std=config.objective.normalize_std),
      advantages.zero_variance_fraction(reward, rl.samples_per_prompt),
    )

  def step(state: TrainState, number: int) -> tuple[TrainState, dict]:
    times = [time.perf_counter()]

    def lap():
      times.append(time.perf_counter())

    examples = examples_of.at(number)
    rollout, texts, lengths = parts.generate(state.params, options, parts.key(SAMPLING, number), examples)
    lap()
    repeated = [example for example in examples for _ in range(rl.samples_per_prompt)]
    scores = score_completions(parts.reward, texts, repeated)
    lap()
    advantage, zero_variance = advantages_of(mesh.put_batch(scores.reward, parts.layout))
    minibatches = []
    for part, part_advantage in deal(rollout, advantage):
      scored = score_minibatch(state.params, part.tokens, part.valid)
      minibatches.append(
        TrainBatch(
          part.tokens,
          part.valid,
          part.action_mask,
          scored.log_prob,
          part_advantage,
          scored.trace if config.objective.router_shift else None,
        )
      )
    jax.block_until_ready(minibatches)
    lap()
    updates = []
    for batch in minibatches * rl.epochs:
      state, metrics = update(state, batch)
      updates.append(metrics)
    metrics = jax.device_get(combine(updates))
    lap()
    sampling, rewarding, scoring, training = np.diff(times)
    valid, finished = mesh.fetch((rollout.valid, rollout.finished))
    tokens = valid.sum()
    done = number * len(updates) + len(updates) - 1
    return state, metrics | {
      "reward/mean": scores.reward.mean(),
      "reward/std": scores.reward.std(),
      "reward/success": scores.success.mean(),
      "reward/format": scores.format.mean(),
      "groups/zero_variance": zero_variance,
      "length/mean": lengths.mean(),
      "length/max": lengths.max(),
      "length/truncated": 1.0 - finished.mean(),
      "optimizer/learning_rate": schedule(done),
      "speed/sample_tokens_per_second": lengths.sum() / sampling,
      "speed/score_tokens_per_second": tokens / scoring,
      "speed/train_tokens_per_second": tokens * rl.epochs / training,
      "seconds/sample": sampling,
      "seconds/reward": rewarding,
      "seconds/score": scoring,
      "seconds/train": training,
      "seconds/step": times[-1] - times[0],
    }

  return RL(optimizer, step)
