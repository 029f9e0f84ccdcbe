"""From values per token to one number, exactly, whatever the split of a minibatch.

    token_mean               sum over all tokens / number of tokens
    seq_mean_token_mean      mean over rows of the row's mean
    seq_mean_token_sum       mean over rows of the row's sum
    seq_mean_token_sum_norm  mean over rows of the row's sum / a constant length (Dr.GRPO)

"Rows" are those with at least one token: an empty row weighs nothing (TRL counts it, verl does not). Weights depend on
the mask alone, so that of a whole global minibatch is known before any gradient is taken.
"""

import chex
import jax.numpy as jnp

from rspo_jax.types import Array, Weighted

AGGREGATIONS = ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm")
DEFAULT_AGGREGATION = "seq_mean_token_mean"


def aggregation_weight(mask: Array, mode: str) -> Array:
  """What a mask counts for: its tokens ("token_mean") or its rows with a token.

  Args:
    mask: [B, T] bool.
  Returns:
    [] float32, >= 0.
  Raises:
    ValueError: unknown mode.
  """
  chex.assert_rank(mask, 2)
  chex.assert_type(mask, bool)
  if mode not in AGGREGATIONS:
    raise ValueError(f"aggregation is {mode!r}; want one of {AGGREGATIONS}.")
  counted = mask if mode == "token_mean" else mask.any(axis=1)
  return counted.sum().astype(jnp.float32)


def aggregate(values: Array, mask: Array, mode: str, *, norm_length: int | None = None) -> Weighted:
  """Sums values so that, over any split of a batch, (sum of totals) / (sum of weights) is the whole's mean.

  Args:
    values: [B, T], 0 outside the mask. mask: [B, T] bool.
    norm_length: the constant length of "seq_mean_token_sum_norm", tokens: the longest completion there can be.
  Returns:
    Weighted of scalars; its weight is `aggregation_weight(mask, mode)`.
  Raises:
    ValueError: unknown mode, or no norm_length where it is needed.
  """
  chex.assert_equal_shape([values, mask])
  weight = aggregation_weight(mask, mode)
  if mode == "seq_mean_token_mean":
    length = jnp.maximum(mask.sum(axis=1), 1).astype(values.dtype)
    return Weighted((values.sum(axis=1) / length).sum(), weight)
  if mode != "seq_mean_token_sum_norm":
    return Weighted(values.sum(), weight)
  if norm_length is None or norm_length < 1:
    raise ValueError(
      f"norm_length is {norm_length}, but 'seq_mean_token_sum_norm' divides by it; give it the largest number of new "
      "tokens a completion may have."
    )
  return Weighted(values.sum() / norm_length, weight)
