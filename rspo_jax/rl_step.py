"""One RL step, top to bottom: collect -> score -> advantages -> minibatches -> update. Read this first.

    collector = Collector(sampler, split, reward, tokenizer, CollectorOptions(), ...)  # rspo_jax.rollout.collector
    functions = compile_update(policy, optimizer, update=UpdateOptions(...), samples_per_prompt=8, layout=layout)
    for step in range(steps):
      state, metrics = rl_step(state, step, collector=collector, functions=functions)

`collect` and `update` share nothing but the record `Collected`, so that they can run on two threads. docs/library.md
has a whole training program.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rspo_jax import mesh
from rspo_jax.objectives.advantages import AdvantageOptions, compute_advantages
from rspo_jax.objectives.penalties import kl
from rspo_jax.rollout.collector import Collected, Collector
from rspo_jax.training.diagnostics import over_updates
from rspo_jax.training.loss import UpdateOptions
from rspo_jax.training.minibatches import split_rows
from rspo_jax.training.scoring import Scores, score
from rspo_jax.training.state import state_shardings
from rspo_jax.training.train_step import Step, jit_step, make_train_step
from rspo_jax.types import Array, Layout, Params, Policy, Rollout, TrainBatch, TrainState

Diagnose = Callable[[TrainState, TrainBatch], dict[str, Array]]


@dataclasses.dataclass(frozen=True)
class RLOptions:
  """How a rollout becomes updates.

  Attributes:
    minibatches: parts that a rollout is split into, one update each. epochs: passes over them.
    mask_truncated: completions without a stop token count for the baseline, but are not trained on (DAPO).
    reward_kl_coefficient: of the KL to the reference policy taken off the reward of a completion, or with advantage
      scale "batch_std" off the return of every token (REINFORCE++), per nat; 0 is off. Its estimator is the update's.
  """

  minibatches: int = 4
  epochs: int = 1
  mask_truncated: bool = False
  reward_kl_coefficient: float = 0.0

  def __post_init__(self):
    for name in ("minibatches", "epochs"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name} is {getattr(self, name)}; want 1 or more.")


class UpdateFunctions(NamedTuple):
  """The jitted functions of an update; rows are split over the mesh. `rspo_jax.rl_programs` lists them for a planner.

  Attributes:
    split: a tree of [B, ...] -> a list of minibatches of whole groups, round-robin.
    score: (params, minibatch of a rollout) -> `Scores`. score_reference: likewise -> log-probs [b, T].
    kl_penalty: (log-probs, reference log-probs; lists over minibatches) -> [B, T].
    advantages: (reward [B], mask [B, T], penalty or None) -> [B] or [B, T].
    train_step: (state, `TrainBatch`) -> (state, metrics); the state is donated. combine: metrics of updates -> of a
      step.
  """

  options: RLOptions
  layout: Layout
  split: Callable[[Any], list[Any]]
  score: Callable[[Params, Rollout], Scores]
  score_reference: Callable[[Params, Rollout], Array]
  kl_penalty: Callable[[list[Array], list[Array]], Array]
  advantages: Callable[[Array, Array, Array | None], Array]
  make_batch: Callable[..., TrainBatch]
  train_step: Step
  combine: Callable[[list[dict[str, Array]]], dict[str, Array]]


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


def compile_update(
  policy: Policy,
  optimizer: optax.GradientTransformation,
  options: RLOptions | None = None,
  *,
  update: UpdateOptions,
  samples_per_prompt: int,
  layout: Layout,
  advantage: AdvantageOptions | None = None,
  keep_trace: bool = False,
) -> UpdateFunctions:
  """The jitted functions of an RL update; each compiles at its first call.

  Args:
    policy: what is trained. optimizer: any optax transformation; wrap it in `skip_nonfinite` to survive NaN.
    options: minibatches and epochs. update: objective, router shift, auxiliary losses.
    advantage: baseline and scale; None of either is "group_mean" and "group_std".
    samples_per_prompt: G, rows of a group, which stay together in a minibatch. layout: the mesh.
    keep_trace: minibatches keep the routing trace although the update does not read it (for `diagnose`).
  """
  options, group = options or RLOptions(), samples_per_prompt
  by_rows = functools.partial(jax.jit, out_shardings=layout.sharding("batch"))
  # A baseline or scale of None is the objective recipe's; without a recipe, GRPO's.
  chosen = {name: value for name, value in vars(advantage or AdvantageOptions()).items() if value is not None}
  chosen = {"baseline": "group_mean", "scale": "group_std"} | chosen
  sizes = {"microbatches": update.microbatches, "chunk": update.logits_chunk}
  trace = {"all_experts": update.shift is not None and update.shift.deviation == "kl", "gates": update.replay_gates}

  @by_rows
  def split(tree):
    parts = split_rows(tree, options.minibatches, group=group)
    return [jax.tree.map(lambda leaf, i=i: leaf[i], parts) for i in range(options.minibatches)]

  @by_rows
  def score_minibatch(params, part: Rollout):
    return score(policy, params, part.tokens, part.valid, expert_index=part.expert_index, **trace, **sizes)

  @by_rows
  def score_reference(params, part: Rollout):
    return score(policy, params, part.tokens, part.valid, **sizes).log_prob

  @by_rows
  def kl_penalty(log_probs, references):
    rows = sum(part.shape[0] for part in log_probs)
    order = split_rows(np.arange(rows), options.minibatches, group=group).reshape(-1)
    old, reference = (jnp.concatenate(parts)[np.argsort(order)] for parts in (log_probs, references))
    return options.reward_kl_coefficient * kl(old, reference, update.kl_estimator)

  @by_rows
  def advantages(reward, mask, penalty):
    return compute_advantages(reward, mask, group=group, penalty=penalty, **chosen)

  def make_batch(part: Rollout, advantage: Array, scores: Scores, reference: Array | None) -> TrainBatch:
    return TrainBatch(
      part.tokens,
      part.valid,
      part.action_mask,
      scores.log_prob,
      advantage,
      old_routing=scores.trace if keep_trace or update.needs_trace else None,
      sampler_log_prob=None if update.mismatch is None else part.log_prob,
      reference_log_prob=reference if update.kl_coefficient else None,
    )

  train_step = jit_step(make_train_step(policy, optimizer, update), layout, state_shardings(policy, optimizer, layout))
  return UpdateFunctions(
    options,
    layout,
    split,
    score_minibatch,
    score_reference,
    kl_penalty,
    advantages,
    make_batch,
    train_step,
    jax.jit(over_updates),
  )
