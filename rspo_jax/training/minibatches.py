"""Cutting a batch into equal pieces, and putting per-row results together again."""

from typing import Any

import jax


def split_rows(tree: Any, pieces: int, *, group: int = 1) -> Any:
  """[B, ...] -> [pieces, B / pieces, ...], dealing out groups of `group` neighbouring rows in turn.

  Dealing in turn (piece i takes groups i, i + pieces, ...) keeps every piece spread over all devices that hold rows.

  Raises:
    ValueError: the groups do not divide by `pieces`.
  """

  def split(leaf):
    if leaf.shape[0] % (pieces * group):
      raise ValueError(
        f"{leaf.shape[0]} rows in groups of {group} do not divide into {pieces} equal pieces; change one of the three."
      )
    dealt = leaf.reshape(-1, pieces, group, *leaf.shape[1:]).swapaxes(0, 1)
    return dealt.reshape(pieces, -1, *leaf.shape[1:])

  return jax.tree.map(split, tree)


def join_rows(tree: Any) -> Any:
  """Undoes `split_rows` for groups of one row: [pieces, B / pieces, ...] -> [B, ...]."""
  return jax.tree.map(lambda leaf: leaf.swapaxes(0, 1).reshape(-1, *leaf.shape[2:]), tree)
