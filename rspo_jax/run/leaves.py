"""The leaves of a state: their abstract values, and a JSON-able table of shapes, dtypes and fingerprints."""

from collections.abc import Sequence
from typing import Any

import jax

LeafTable = dict[str, list[Any]]  # leaf name -> [shape, dtype, fingerprint or None]


def abstract(state: Any) -> Any:
  """The same tree with a `jax.ShapeDtypeStruct` (shape, dtype, sharding) for every array.

  Raises:
    ValueError: a leaf has no sharding, so restoring would not know where to place it.
  """

  def abstract_leaf(path, leaf):
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
      name = jax.tree_util.keystr(path)
      raise ValueError(f"leaf {name} ({leaf}) has no sharding; want a jax array or ShapeDtypeStruct with one.")
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

  return jax.tree_util.tree_map_with_path(abstract_leaf, state)


def leaf_table(state: Any, prints: Sequence[int] | None = None) -> LeafTable:
  """The table of a state's leaves.

  Args:
    state: a pytree of arrays or of `jax.ShapeDtypeStruct`.
    prints: the fingerprints of its leaves, see `fingerprints`; without them the table holds None.
  """
  flat, _ = jax.tree_util.tree_flatten_with_path(state)
  prints = [None] * len(flat) if prints is None else prints
  return {
    jax.tree_util.keystr(path): [list(leaf.shape), str(leaf.dtype), number]
    for (path, leaf), number in zip(flat, prints, strict=True)
  }


def differing_leaves(saved: LeafTable, requested: LeafTable) -> list[str]:
  """A line for each leaf that is absent in one table, or whose shape or dtype differs: name, saved -> requested."""

  def show(table: LeafTable, name: str) -> str:
    return f"{table[name][1]}{table[name][0]}" if name in table else "absent"

  return [
    f"{name}: {show(saved, name)} -> {show(requested, name)}"
    for name in sorted(saved.keys() | requested.keys())
    if show(saved, name) != show(requested, name)
  ]
