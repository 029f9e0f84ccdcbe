"""F1: what the router did, recorded compactly, compared with what it does now, and turned into router shift.

Positions and slots: a forward scores token t from position t - 1. Probes speak of positions, batches of slots
(see `rspo_jax.types`); `to_slots` and `to_positions` are the only two moves between them.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from rspo_jax.types import Array, Probe, RoutingTrace

RouterLogProb = Callable[[Array], Array]  # router logits [..., E] -> log-probabilities [..., E] float32


class RoutingDrift(NamedTuple):
  """How one layer's router moved against its old trace; position-aligned, without gradient.

  Attributes:
    drift: [B, T] float32, nats, >= 0: mean over the K old experts of |new - old router log-prob|.
    overlap: [B, T] float32 in [0, 1]: the share of the old experts that the layer executes now.
    load: [E] int32: how many (masked position, k) choices went to each expert.
  Positions without an old entry (the last one of every row) hold finite values that mean nothing; `to_slots`
  drops them.
  """

  drift: Array
  overlap: Array
  load: Array


def _shift(x: Array, by: int, axis: int) -> Array:
  """Moves x by one along axis; what falls out is lost, what comes in is 0."""
  padding = [(0, 0, 0)] * x.ndim
  padding[axis] = (by, -by, 0)
  return jax.lax.pad(x, jnp.zeros((), x.dtype), padding)


def to_slots(x: Array, *, axis: int = 1) -> Array:
  """Position-aligned to slot-aligned: out[:, t] = x[:, t - 1], out[:, 0] = 0.

  Args:
    x: [B, T, ...], or any shape with the time axis named by `axis` (2 for [L, B, T, ...]).
  """
  return _shift(x, 1, axis)


def to_positions(x: Array, *, axis: int = 1) -> Array:
  """Slot-aligned to position-aligned: out[:, t] = x[:, t + 1], the last 0. Undoes `to_slots` except there."""
  return _shift(x, -1, axis)


def _of_experts(router_log_prob: RouterLogProb, router_logits: Array, expert_index: Array) -> Array:
  """[B, T, E] logits, [B, T, K] experts -> [B, T, K] float16 log-probs, nats, without gradient.

  `reduce_precision` does the rounding because XLA may delete a float32 -> float16 -> float32 pair of
  converts, which would leave the new values unrounded and let an unmoved router drift.
  """
  log_prob = router_log_prob(jax.lax.stop_gradient(router_logits))
  log_prob = jnp.take_along_axis(log_prob, expert_index.astype(jnp.int32), axis=-1)
  return jax.lax.reduce_precision(log_prob, exponent_bits=5, mantissa_bits=10).astype(jnp.float16)


def record_routing(router_log_prob: RouterLogProb) -> Probe:
  """A probe that keeps what router shift needs of each layer: 3 bytes per (token, k) for E <= 256, else 4.

  Args:
    router_log_prob: `Policy.router_log_prob`.
  Returns:
    A probe whose output is (expert_index [B, T, K] uint8, or uint16 for E > 256; log_prob [B, T, K] float16,
    nats). Stacked over layers it goes to `stack_trace`.
  """

  def probe(router_logits, expert_index, probe_inputs):
    del probe_inputs
    index_dtype = jnp.uint8 if router_logits.shape[-1] <= 256 else jnp.uint16
    return expert_index.astype(index_dtype), _of_experts(router_log_prob, router_logits, expert_index)

  return probe


def stack_trace(probed: tuple[Array, Array]) -> RoutingTrace:
  """What `record_routing` gave, each [L, B, T, K] by position -> the trace, each [B, T, L, K] by slot.

  Slot 0 was scored by nothing; its entries are 0.
  """
  chex.assert_rank(probed, 4)
  chex.assert_equal_shape(probed)
  expert_index, log_prob = (jnp.moveaxis(to_slots(x, axis=2), 0, 2) for x in probed)
  return RoutingTrace(expert_index=expert_index, log_prob=log_prob)


def trace_for_probe(trace: RoutingTrace) -> tuple[Array, Array]:
  """The way back: (expert_index, log_prob), each [L, B, T, K] by position: `probe_inputs` of a forward."""
  chex.assert_rank([trace.expert_index, trace.log_prob], 4)
  return tuple(to_positions(jnp.moveaxis(x, 2, 0), axis=2) for x in (trace.expert_index, trace.log_prob))


def router_drift(new_log_prob: Array, old_log_prob: Array) -> Array:
  """Mean absolute change of the old experts' router log-probs.

  Args:
    new_log_prob, old_log_prob: [..., K], nats, of the experts the OLD policy chose.
  Returns:
    [...] float32, nats, >= 0. Average it over layers for the Delta of router shift.
  Source: RSPO, arXiv 2510.23027v2.
  """
  return jnp.abs(new_log_prob.astype(jnp.float32) - old_log_prob.astype(jnp.float32)).mean(axis=-1)


def expert_overlap(new_index: Array, old_index: Array) -> Array:
  """[..., K] new and old experts (each distinct) -> [...] float32, the share of the old ones still chosen."""
  same = new_index[..., None, :].astype(jnp.int32) == old_index[..., :, None].astype(jnp.int32)
  return same.any(axis=-1).mean(axis=-1, dtype=jnp.float32)


def expert_load(expert_index: Array, mask: Array, num_experts: int) -> Array:
  """[B, T, K] choices, [B, T] bool -> [num_experts] int32, masked choices per expert; batches add up."""
  # A comparison rather than a scatter: it partitions over a sharded batch and fuses into its reduction.
  chosen = expert_index.astype(jnp.int32)[..., None] == jnp.arange(num_experts, dtype=jnp.int32)
  return jnp.sum(chosen & mask[..., None, None], axis=(0, 1, 2), dtype=jnp.int32)


def watch_routing(router_log_prob: RouterLogProb, mask_positions: Array) -> Probe:
  """A probe that compares the live router with `trace_for_probe(trace)`, which it wants as probe_inputs.

  Nothing it computes carries a gradient, so the backward pass keeps nothing for it. New log-probs are rounded
  as the recorded ones were: an unmoved router drifts by exactly 0. Where the layer replays experts, `overlap`
  and `load` speak of the replayed ones.

  Args:
    router_log_prob: `Policy.router_log_prob`.
    mask_positions: [B, T] bool, the positions that count for `load` (`to_positions(action_mask)`).
  Returns:
    A probe whose output is `RoutingDrift`.
  Raises:
    ValueError: in the probe, when it is given no probe_inputs; use `count_load` when there is no trace.
  """

  def probe(router_logits, expert_index, probe_inputs):
    if probe_inputs is None:
      raise ValueError(
        "watch_routing got probe_inputs=None; want trace_for_probe(trace). "
        "Use count_load(mask_positions) when there is no trace."
      )
    old_index, old_log_prob = probe_inputs
    new_log_prob = _of_experts(router_log_prob, router_logits, old_index)
    return RoutingDrift(
      drift=router_drift(new_log_prob, old_log_prob),
      overlap=expert_overlap(expert_index, old_index),
      load=expert_load(expert_index, mask_positions, router_logits.shape[-1]),
    )

  return probe


def count_load(mask_positions: Array) -> Probe:
  """A probe for training without a trace: it returns the load [E] int32, as in `RoutingDrift`."""

  def probe(router_logits, expert_index, probe_inputs):
    del probe_inputs
    return expert_load(expert_index, mask_positions, router_logits.shape[-1])

  return probe


def router_log_shift(drift: Array, *, floor: float) -> Array:
  """Log trust in a token whose routing moved since the rollout: log(max(exp(-drift), floor)).

  Args:
    drift: [B, T] mean absolute change of the old experts' router log-probs over experts and layers, nats, >=
      0.
    floor: smallest trust, in (0, 1]; the paper uses 0.8; 1 switches router shift off.
  Returns:
    [B, T] float32, nats, in [log(floor), 0]; carries no gradient.
  Raises:
    ValueError: floor outside (0, 1].
  Source: RSPO, arXiv 2510.23027v2.
  """
  if not 0.0 < floor <= 1.0:
    raise ValueError(f"floor is {floor}; want a value in (0, 1]. Use 1.0 to switch router shift off.")
  return jax.lax.stop_gradient(jnp.maximum(-drift.astype(jnp.float32), math.log(floor)))
