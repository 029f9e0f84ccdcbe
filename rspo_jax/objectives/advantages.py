"""Advantages from rewards: baselines within a prompt's group, scales, and returns of tokens.

Advantages are computed over the whole rollout, before it is split into minibatches, so that they do not depend on the
split. Rows that are filtered out (`keep`) get no advantage and do not enter the baseline of other rows.
"""

import dataclasses

import jax
import jax.numpy as jnp

from rspo_jax.types import Array

BASELINES = ("group_mean", "leave_one_out", "none")
SCALES = ("group_std", "batch_std", "none")


@dataclasses.dataclass(frozen=True)
class AdvantageOptions:
  """How rewards become advantages (`compute_advantages`).

  Attributes:
    baseline: subtracted from the reward, one of `BASELINES`: "group_mean" (GRPO); "leave_one_out" (RLOO), the mean of
      the group's other samples; "none". None: that of the objective's recipe (`rspo_jax.objectives.table.OBJECTIVES`).
    scale: one of `SCALES`: "group_std" divides by the standard deviation of the group (GRPO); "batch_std" whitens the
      advantages of all tokens of the rollout (REINFORCE++), which gives [B, T]; "none" (Dr.GRPO). None: that of the
      objective's recipe.
    ddof: the group's deviation divides by n - ddof: 1 (torch; TRL, verl) or 0 (numpy). Less than the size of a group.
    epsilon: added to the group's deviation, in the reward's unit, > 0 (verl 1e-6, TRL 1e-4).
  """

  baseline: str | None = None
  scale: str | None = None
  ddof: int = 1
  epsilon: float = 1e-6

  def __post_init__(self):
    for name, known in (("baseline", BASELINES), ("scale", SCALES)):
      if getattr(self, name) not in (None, *known):
        raise ValueError(f"{name} is {getattr(self, name)!r}; want one of {known}, or None for the objective's own.")
    if self.ddof < 0 or not self.epsilon > 0:
      raise ValueError(
        f"ddof is {self.ddof} and epsilon {self.epsilon}; want ddof >= 0 (1, or 0 as numpy), epsilon > 0."
      )


def _checked(reward: Array, group: int | Array, keep: Array | None) -> tuple[Array, Array, Array]:
  """(reward [B] in at least float32, group ids [B] int32, keep [B] bool)."""
  reward = jnp.asarray(reward)
  if reward.ndim != 1:
    raise ValueError(f"reward has shape {reward.shape}; want [B], one reward per row.")
  rows = reward.shape[0]
  if isinstance(group, int):
    if group < 2:
      raise ValueError(f"group is {group}; a group needs at least 2 samples to have a baseline.")
    if rows % group:
      raise ValueError(
        f"{rows} rewards do not divide into groups of {group}; want prompt-major rows, all samples of a prompt side by "
        "side, every group complete. For groups of unequal size pass group=[B], the group of every row."
      )
    group = jnp.arange(rows, dtype=jnp.int32) // group
  keep = jnp.ones(rows, bool) if keep is None else jnp.asarray(keep)
  for name, array in (("group", group), ("keep", keep)):
    if array.shape != (rows,):
      raise ValueError(f"{name} has shape {array.shape}; want [{rows}], one entry for every reward.")
  reward = reward.astype(jnp.promote_types(reward.dtype, jnp.float32))
  return jnp.where(keep, reward, 0), group.astype(jnp.int32), keep


def _per_group(x: Array, group: Array) -> Array:
  """[B] -> [B], for every row the sum over its group."""
  return jax.ops.segment_sum(x, group, num_segments=group.size)[group]


def _uniform(reward: Array, group: Array, keep: Array) -> Array:
  """[B] bool, all kept rewards of the row's group are equal. Exact, unlike a comparison with their rounded mean."""
  largest = jax.ops.segment_max(jnp.where(keep, reward, -jnp.inf), group, num_segments=group.size)
  smallest = jax.ops.segment_min(jnp.where(keep, reward, jnp.inf), group, num_segments=group.size)
  return (largest <= smallest)[group]


def group_advantages(
  reward: Array,
  group: int | Array,
  *,
  keep: Array | None = None,
  baseline: str = "group_mean",
  scale: str = "group_std",
  ddof: int = 1,
  epsilon: float = 1e-6,
) -> Array:
  """Advantage of each sample over its prompt's group.

  Args:
    reward: [B].
    group: G >= 2, for prompt-major rows with G samples of every prompt side by side; or [B] integers in [0, B), the
      group of every row, for groups of any size in any order.
    keep: [B] bool, rows that are used; the others get 0. None keeps all.
    baseline: "group_mean" (GRPO); "leave_one_out", the mean of the group's other samples (RLOO), 0 for a lone sample;
      "none".
    scale: "group_std" divides by the group's standard deviation + epsilon (GRPO); "none" keeps the reward's unit
      (Dr.GRPO). "batch_std" has no effect here: it whitens the advantages of tokens, see `compute_advantages`.
    ddof: the deviation divides by n - ddof. The GRPO paper only says "std"; 1 is torch.std's default, which TRL and
      verl use; 0 is numpy's. A group with no more than ddof samples is not scaled.
    epsilon: added to the deviation, in the reward's unit (verl 1e-6, TRL 1e-4).
  Returns:
    [B] float32, no gradient. With "group_mean" its mean is 0 in every group; with a baseline it is exactly 0 in a
    group of equal rewards.
  Raises:
    ValueError: inconsistent shapes, a group of 1, an unknown baseline or scale, or a negative ddof.
  Source: DeepSeekMath, arXiv 2402.03300, section 4.1.2; Dr.GRPO, arXiv 2503.20783; RLOO, arXiv 2402.14740.
  """
  if baseline not in BASELINES or scale not in SCALES:
    raise ValueError(
      f"baseline is {baseline!r} and scale {scale!r}; want a baseline of {BASELINES} and a scale of {SCALES}."
    )
  if ddof < 0 or (isinstance(group, int) and ddof >= max(group, 2)):
    raise ValueError(f"ddof is {ddof}; want 0 <= ddof < the size of a group. Use 1, or 0 as numpy.")
  reward, group, keep = _checked(reward, group, keep)
  count = _per_group(keep.astype(reward.dtype), group)
  centred = jnp.where(keep, reward - _per_group(reward, group) / jnp.maximum(count, 1), 0)
  if baseline == "none":
    advantage = reward
  else:
    advantage = jnp.where(_uniform(reward, group, keep), 0, centred)
    if baseline == "leave_one_out":
      advantage = advantage * count / jnp.maximum(count - 1, 1)
  if scale == "group_std":
    std = jnp.sqrt(_per_group(centred**2, group) / jnp.maximum(count - ddof, 1))
    advantage = jnp.where(count > ddof, advantage / (std + epsilon), advantage)
  return jax.lax.stop_gradient(jnp.where(keep, advantage, 0))


def zero_variance(reward: Array, group: int | Array, *, keep: Array | None = None) -> Array:
  """[B] bool, all (kept) rewards of the row's group are equal: under a group baseline its advantages are 0.

  Arguments as in `group_advantages`. Dynamic sampling removes such groups (DAPO, arXiv 2503.14476, eq. 11).
  """
  return _uniform(*_checked(reward, group, keep))


def zero_variance_fraction(reward: Array, samples_per_prompt: int) -> Array:
  """[] float32 in [0, 1], the share of groups whose rewards are all equal, for prompt-major rows [B]."""
  return zero_variance(reward, samples_per_prompt)[::samples_per_prompt].mean(dtype=jnp.float32)


def token_advantages(advantage: Array, mask: Array, *, penalty: Array | None = None) -> Array:
  """Advantages of rows for each of their tokens, minus the costs of that token and all later ones (not discounted).

  Args:
    advantage: [B]. mask: [B, T] bool.
    penalty: [B, T], cost of each token, in the reward's unit (a KL coefficient times
      `rspo_jax.objectives.penalties.kl`).
  Returns:
    [B, T] float32, no gradient, 0 outside the mask.
  Source: REINFORCE++, arXiv 2501.03262.
  """
  returns = jnp.broadcast_to(advantage[:, None], mask.shape)
  if penalty is not None:
    cost = jnp.where(mask, penalty, 0)
    returns = returns - jnp.flip(jnp.cumsum(jnp.flip(cost, axis=1), axis=1), axis=1)
  return jax.lax.stop_gradient(jnp.where(mask, returns, 0))


def whiten(x: Array, mask: Array, *, ddof: int = 1, epsilon: float = 1e-8) -> Array:
  """(x - mean) / sqrt(variance + epsilon) over all selected entries of the batch.

  For tokens [B, T], long rows therefore weigh more than short ones, as in verl and OpenRLHF.

  Args:
    x: any shape. mask: bool, same shape. ddof: the variance divides by n - ddof (verl: 1).
    epsilon: in the unit of x squared.
  Returns:
    As x, no gradient, 0 outside the mask; all 0 if at most ddof entries are selected.
  Source: REINFORCE++, arXiv 2501.03262.
  """
  count = mask.sum()
  x = jnp.where(mask, x, 0)
  centred = jnp.where(mask, x - x.sum() / jnp.maximum(count, 1), 0)
  variance = jnp.sum(centred**2) / jnp.maximum(count - ddof, 1)
  return jax.lax.stop_gradient(jnp.where(count > ddof, centred * jax.lax.rsqrt(variance + epsilon), 0))


def compute_advantages(
  reward: Array,
  mask: Array,
  *,
  group: int | Array,
  baseline: str,
  scale: str,
  ddof: int = 1,
  epsilon: float = 1e-6,
  penalty: Array | None = None,
) -> Array:
  """Advantages of a whole rollout: of rows, or of tokens for scale "batch_std".

  Args:
    reward: [B]. mask: [B, T] bool, the tokens the policy sampled.
    group, baseline, scale, ddof, epsilon: see `group_advantages`.
    penalty: [B, T], cost of each token, in the reward's unit (a KL coefficient times
      `rspo_jax.objectives.penalties.kl`). Its sum over the row is subtracted from the reward; with "batch_std", the
      sum from each token on is subtracted from that token's advantage (`token_advantages`).
  Returns:
    [B] float32; for "batch_std" [B, T], whitened over the mask and 0 outside it. No gradient.
  Raises:
    ValueError: as `group_advantages`.
  """
  per_token = scale == "batch_std"
  if penalty is not None and not per_token:
    reward = reward - jnp.where(mask, penalty, 0).sum(axis=1)
  advantage = group_advantages(reward, group, baseline=baseline, scale=scale, ddof=ddof, epsilon=epsilon)
  return whiten(token_advantages(advantage, mask, penalty=penalty), mask) if per_token else advantage
