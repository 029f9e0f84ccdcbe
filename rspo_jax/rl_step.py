"""One RL step, top to bottom: collect -> score -> advantages -> minibatches -> update. Read this first.

    collector = Collector(sampler, split, reward, tokenizer, CollectorOptions(), ...)  # rspo_jax.rollout.collector
    functions = compile_update(policy, optimizer, update=UpdateOptions(...), samples_per_prompt=8, layout=layout)
    for step in range(steps):
      state, metrics = rl_step(state, step, collector=collector, functions=functions)

`collect` and `update` share nothing but the record `Collected`, so that a later loop can run them on two threads
(`update` donates the state, so such a loop has to give `collect` parameters of its own). docs/library.md has a whole
training program.
"""

import time
from collections.abc import Callable
from typing import Any

import jax

from rspo_jax import mesh
from rspo_jax.rl_functions import RLOptions, UpdateFunctions, compile_update
from rspo_jax.rollout.collector import Collected, Collector
from rspo_jax.types import Array, Params, TrainBatch, TrainState

__all__ = ["Diagnose", "RLOptions", "UpdateFunctions", "compile_update", "make_minibatches", "rl_step", "update"]

Diagnose = Callable[[TrainState, TrainBatch], dict[str, Array]]


def rl_step(
  state: TrainState,
  step: int,
  *,
  collector: Collector,
  functions: UpdateFunctions,
  reference: Params | None = None,
  diagnose: Diagnose | None = None,
) -> tuple[TrainState, dict[str, Any]]:
  """RL step number `step`, from 0: samples groups with the present policy, then updates it. The state is donated."""
  start = time.perf_counter()
  collected = collector.collect(state.params, step)
  state, metrics = update(functions, state, collected, reference, diagnose)
  return state, metrics | collected.metrics | {"seconds/step": time.perf_counter() - start}


def update(
  functions: UpdateFunctions,
  state: TrainState,
  collected: Collected,
  reference: Params | None = None,
  diagnose: Diagnose | None = None,
) -> tuple[TrainState, dict[str, Any]]:
  """One optimizer update per minibatch and epoch.

  Args:
    state: donated. reference: parameters of the reference policy, for a KL term.
    diagnose: extra metrics from the new state and the last minibatch.
  Returns:
    The new state, and metrics by the names of `rspo_jax.run.metrics.METRICS`.
  """
  start = time.perf_counter()
  minibatches = make_minibatches(functions, state.params, collected, reference)
  jax.block_until_ready(minibatches)
  scored = time.perf_counter()
  updates = []
  for batch in minibatches * functions.options.epochs:
    state, metrics = functions.train_step(state, batch)
    updates.append(metrics)
  metrics = jax.device_get(functions.combine(updates))
  trained = time.perf_counter()
  if diagnose is not None:
    metrics |= jax.device_get(diagnose(state, minibatches[-1]))
    metrics["seconds/diagnostics"] = time.perf_counter() - trained
  tokens = mesh.fetch(collected.rollout.valid).sum()
  return state, metrics | {
    "speed/score_tokens_per_second": tokens / (scored - start),
    "speed/train_tokens_per_second": tokens * functions.options.epochs / (trained - scored),
    "seconds/score": scored - start,
    "seconds/train": trained - scored,
  }


def make_minibatches(
  functions: UpdateFunctions, params: Params, collected: Collected, reference: Params | None = None
) -> list[TrainBatch]:
  """Scores a rollout under the policy that sampled it, computes advantages, and splits both into minibatches.

  Scoring runs on the update's own minibatches: right after it, every ratio and every gamma is exactly 1.
  """
  rollout = collected.rollout
  if functions.options.mask_truncated:
    rollout = rollout.replace(action_mask=rollout.action_mask & rollout.finished[:, None])
  parts = functions.split(rollout)
  scores = [functions.score(params, part) for part in parts]
  references = [None if reference is None else functions.score_reference(reference, part) for part in parts]
  penalty = None
  if functions.options.reward_kl_coefficient:
    penalty = functions.kl_penalty([scored.log_prob for scored in scores], references)
  reward = mesh.put_batch(collected.reward, functions.layout)
  advantages = functions.split(functions.advantages(reward, rollout.action_mask, penalty))
  return [functions.make_batch(*each) for each in zip(parts, advantages, scores, references, strict=True)]
