"""The jitted functions of an RL update: what `rspo_jax.rl_step` calls in order."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rspo_jax.objectives.advantages import AdvantageOptions, compute_advantages
from rspo_jax.objectives.penalties import kl
from rspo_jax.training.diagnostics import over_updates
from rspo_jax.training.loss import UpdateOptions
from rspo_jax.training.minibatches import split_rows
from rspo_jax.training.scoring import Scores, score
from rspo_jax.training.state import state_shardings
from rspo_jax.training.train_step import Step, jit_step, make_train_step
from rspo_jax.types import Array, Layout, Params, Policy, Rollout, TrainBatch


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
    replayed = part.expert_index if update.replay == "sampler" else None
    if update.replay == "sampler" and replayed is None:
      raise ValueError("replay is 'sampler', but the rollout has no experts; set SamplingOptions.record_experts.")
    return score(policy, params, part.tokens, part.valid, expert_index=replayed, **trace, **sizes)

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
