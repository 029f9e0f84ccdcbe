"""Aggregation of values per token to one number that does not depend on how a minibatch is split.

    token_mean               sum over all tokens / number of tokens
    seq_mean_token_mean      mean over rows of the row's mean
    seq_mean_token_sum       mean over rows of the row's sum
    seq_mean_token_sum_norm  mean over rows of the row's sum / a constant length (Dr.GRPO)

Only rows with at least one token count (as in verl; TRL counts empty rows too). Weights depend on the mask alone, so
the weight of the whole global minibatch is known before any gradient is computed.
"""

import chex
import jax.numpy as jnp

from rspo_jax.types import Array, Weighted

AGGREGATIONS = ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm")
DEFAULT_AGGREGATION = "seq_mean_token_mean"


def aggregation_weight(mask: Array, mode: str) -> Array:
  """The weight of a mask: its number of tokens ("token_mean"), or of rows with at least one.

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
  """Total and weight of values: over any split of a batch, (sum of totals) / (sum of weights) is the batch's mean.

  Args:
    values: [B, T], 0 outside the mask. mask: [B, T] bool.
    norm_length: the constant divisor of "seq_mean_token_sum_norm": the largest number of new tokens of a completion.
  Returns:
    Weighted of scalars; its weight is `aggregation_weight(mask, mode)`.
  Raises:
    ValueError: unknown mode, or no norm_length for "seq_mean_token_sum_norm".
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
