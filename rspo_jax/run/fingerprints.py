"""Fingerprints of arrays: a cheap check on the devices that two states are bitwise equal."""

from typing import Any

import jax
import jax.numpy as jnp


def fingerprints(state: Any) -> list[int]:
  """A 32-bit fingerprint of every leaf's bits, in the order of `jax.tree.leaves`.

  Computed as integer sums on the devices: one pass over memory, independent of the sharding. Equal lists mean bitwise
  equal states, up to a collision chance of 2^-32 per leaf.

  Args:
    state: a pytree of arrays of any dtype except complex numbers and typed random keys.
  """
  leaves = jax.tree.leaves(state)
  return [int(x) for x in jax.device_get(_fingerprint(leaves))] if leaves else []


@jax.jit
def _fingerprint(leaves: list[jax.Array]) -> jax.Array:
  return jnp.stack([_fingerprint_leaf(leaf) for leaf in leaves])


def _fingerprint_leaf(leaf: jax.Array) -> jax.Array:
  if leaf.dtype == jnp.bool_:
    words = leaf.astype(jnp.uint32)
  else:
    word = {1: jnp.uint8, 2: jnp.uint16}.get(leaf.dtype.itemsize, jnp.uint32)
    words = jax.lax.bitcast_convert_type(leaf, word).astype(jnp.uint32)
  # Odd weights detect any single flipped bit; weights that differ by position detect swapped values. The multipliers
  # are arbitrary even constants.
  weight = jnp.ones(words.shape, jnp.uint32)
  for axis in range(words.ndim):
    multiplier = (0x9E3779B0, 0x85EBCA76, 0xC2B2AE3C, 0x27D4EB2E)[axis % 4]
    weight += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(multiplier)
  return jnp.sum(words * weight, dtype=jnp.uint32)
