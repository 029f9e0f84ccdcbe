"""Splitting a batch into equal pieces, and combining results over pieces and devices."""

from typing import Any

import jax


def split_rows(tree: Any, pieces: int, *, group: int = 1) -> Any:
  """[B, ...] -> [pieces, B / pieces, ...]: piece i has groups i, i + pieces, ... of `group` neighbouring rows each.

  With this order, every piece is spread over all devices that hold rows.

  Raises:
    ValueError: the number of groups is not a multiple of `pieces`.
  """

  def split(leaf):
    if leaf.shape[0] % (pieces * group):
      raise ValueError(
        f"{leaf.shape[0]} rows in groups of {group} do not divide into {pieces} equal pieces; change one of the three."
      )
    by_piece = leaf.reshape(-1, pieces, group, *leaf.shape[1:]).swapaxes(0, 1)
    return by_piece.reshape(pieces, -1, *leaf.shape[1:])

  return jax.tree.map(split, tree)


def join_rows(tree: Any) -> Any:
  """The inverse of `split_rows` for groups of one row: [pieces, B / pieces, ...] -> [B, ...]."""
  return jax.tree.map(lambda leaf: leaf.swapaxes(0, 1).reshape(-1, *leaf.shape[2:]), tree)


def sum_devices(tree: Any, axis_name: str | None) -> Any:
  """The sum over the devices of `jax.pmap`'s axis; the tree itself if axis_name is None."""
  return tree if axis_name is None else jax.lax.psum(tree, axis_name)


def gather_rows(tree: Any, axis_name: str | None) -> Any:
  """The rows of all devices of `jax.pmap`'s axis, [b, ...] -> [devices * b, ...]; the tree itself if it is None."""
  return tree if axis_name is None else jax.lax.all_gather(tree, axis_name, tiled=True)
