"""F1: rewards to advantages, by comparison within each prompt's group of samples."""

import jax
import jax.numpy as jnp

from rspo_jax.types import Array


def _groups(reward: Array, samples_per_prompt: int) -> Array:
  """[B] prompt-major -> [P, G] float32 (float64 for float64 input)."""
  reward = jnp.asarray(reward)
  if reward.ndim != 1:
    raise ValueError(f"reward has shape {reward.shape}; want [B], one reward per row.")
  if samples_per_prompt < 2:
    raise ValueError(
      f"samples_per_prompt is {samples_per_prompt}; a group needs at least 2 samples to have a baseline."
    )
  if reward.shape[0] % samples_per_prompt:
    raise ValueError(
      f"{reward.shape[0]} rewards do not divide into groups of samples_per_prompt={samples_per_prompt}; "
      "want prompt-major rows, all samples of a prompt side by side, every group complete."
    )
  return reward.astype(jnp.promote_types(reward.dtype, jnp.float32)).reshape(-1, samples_per_prompt)


def _zero_variance(groups: Array) -> Array:
  """[P] bool. By comparison: the rounding of a mean must not turn equal rewards into a signal."""
  return groups.max(axis=1) == groups.min(axis=1)


def group_advantages(
  reward: Array, samples_per_prompt: int, *, normalize_std: bool = True, ddof: int = 1, epsilon: float = 1e-6
) -> Array:
  """Advantage of each sample over its prompt's group: (reward - mean) / (std + epsilon).

  Args:
    reward: [B], prompt-major: the G samples of a prompt side by side.
    samples_per_prompt: G >= 2.
    normalize_std: divide by the group's standard deviation; without, advantages keep the reward's unit.
    ddof: the deviation divides by G - ddof. The paper only says "std"; 1 is torch.std's default, which the
      GRPO of both TRL and verl use; 0 is numpy's.
    epsilon: added to the deviation, in the reward's unit (verl 1e-6, TRL 1e-4).
  Returns:
    [B] float32, no gradient; mean 0 in every group; exactly 0 in a group of equal rewards.
  Raises:
    ValueError: B does not divide by G, G < 2, or ddof not in [0, G).
  Source: DeepSeekMath, arXiv 2402.03300, section 4.1.2.
  """
  groups = _groups(reward, samples_per_prompt)
  if not 0 <= ddof < samples_per_prompt:
    raise ValueError(f"ddof is {ddof}; want 0 <= ddof < samples_per_prompt={samples_per_prompt}. Use 1, or 0 as numpy.")
  advantage = groups - groups.mean(axis=1, keepdims=True)
  if normalize_std:
    advantage /= groups.std(axis=1, ddof=ddof, keepdims=True) + epsilon
  advantage = jnp.where(_zero_variance(groups)[:, None], 0, advantage)
  return jax.lax.stop_gradient(advantage.reshape(-1))


def zero_variance_fraction(reward: Array, samples_per_prompt: int) -> Array:
  """[] float32, the share of groups with all rewards equal: they teach nothing. Arguments as above."""
  return _zero_variance(_groups(reward, samples_per_prompt)).mean(dtype=jnp.float32)
