"""The routing trace: recorded compactly, compared with the current router, and replayed.

A forward scores token t at position t - 1. Outputs of probes are position-aligned, batches are slot-aligned (see
`rspo_jax.types`); `to_slots` and `to_positions` are the only conversions between the two.
"""

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from rspo_jax.router.shift import expert_overlap, layer_deviation
from rspo_jax.types import Array, Probe, Replay, RouterOutput, RoutingTrace

RouterLogProb = Callable[[Array], Array]  # router logits [..., E] -> log-probabilities [..., E] float32


class RoutingDrift(NamedTuple):
  """One layer's router compared with its old trace; without gradient. Stacked over layers, all fields lead with L.

  Attributes:
    deviation: [B, T] float32, position-aligned, >= 0, see `rspo_jax.router.shift.layer_deviation`. The last position of
      every row has no old entry: its value is finite and meaningless, and `to_slots` drops it.
    overlap: [] float32, sum over the masked positions of the share of the old experts that the layer chooses now.
    entropy: [] float32, nats, sum over the masked positions of the router's entropy.
    load: [E] int32, choices of each expert at the masked positions.
  """

  deviation: Array
  overlap: Array
  entropy: Array
  load: Array


class RoutingLoad(NamedTuple):
  """The fields of `RoutingDrift` that need no old trace."""

  entropy: Array
  load: Array


def _shift(x: Array, by: int, axis: int) -> Array:
  """x moved by `by` (1 or -1) along axis; the entry that leaves is dropped, the one that enters is 0."""
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


def _rounded(log_prob: Array) -> Array:
  """As float16. `reduce_precision` rounds, because XLA may remove a float32 -> float16 -> float32 pair of converts: the
  new values would then not be rounded, and an unmoved router would drift."""
  return jax.lax.reduce_precision(log_prob, exponent_bits=5, mantissa_bits=10).astype(jnp.float16)


def _log_prob_of(log_prob: Array, expert_index: Array) -> Array:
  """[B, T, E] and [B, T, K] experts -> [B, T, K] float16, nats."""
  return _rounded(jnp.take_along_axis(log_prob, expert_index.astype(jnp.int32), axis=-1))


def index_dtype(num_experts: int) -> jnp.dtype:
  """The smallest of uint8 and uint16 that holds the indices of `num_experts` experts."""
  return jnp.uint8 if num_experts <= 256 else jnp.uint16


def record_experts(router: RouterOutput, probe_inputs) -> Array:
  """A probe whose output is the expert choice alone, [B, T, K] uint8 or uint16."""
  del probe_inputs
  return router.expert_index.astype(index_dtype(router.logits.shape[-1]))


def trace_probe(router_log_prob: RouterLogProb, *, all_experts: bool = False, gates: bool = False) -> Probe:
  """A probe that records each layer's routing for router shift: 3 bytes per (token, k) for E <= 256, else 4.

  Args:
    router_log_prob: `Policy.router_log_prob`.
    all_experts: record the log-probabilities of all E experts too (2 bytes each; deviation "kl").
    gates: record the gates too (4 bytes each; to replay them).
  Returns:
    A probe whose output is a `RoutingTrace` of one layer, [B, T, K]. Stacked over layers, it is the input of
    `stack_trace`.
  """

  def probe(router, probe_inputs):
    log_prob = router_log_prob(jax.lax.stop_gradient(router.logits))
    return RoutingTrace(
      expert_index=record_experts(router, probe_inputs),
      log_prob=_log_prob_of(log_prob, router.expert_index),
      all_log_prob=_rounded(log_prob) if all_experts else None,
      gate=jax.lax.stop_gradient(router.gate) if gates else None,
    )

  return probe


def stack_trace(probed: RoutingTrace) -> RoutingTrace:
  """The trace from the output of `trace_probe`: [L, B, T, ...] by position -> [B, T, L, ...] by slot.

  Slot 0 has no scoring position; its entries are 0.
  """
  chex.assert_rank(jax.tree.leaves(probed), 4)
  return jax.tree.map(lambda x: jnp.moveaxis(to_slots(x, axis=2), 0, 2), probed)


def slots_to_layers(x: Array) -> Array:
  """[B, T, L, ...] by slot -> [L, B, T, ...] by position."""
  return to_positions(jnp.moveaxis(x, 2, 0), axis=2)


def trace_probe_inputs(trace: RoutingTrace) -> RoutingTrace:
  """The inverse of `stack_trace`: `probe_inputs` of a forward, [L, B, T, ...] by position, last position 0."""
  chex.assert_rank(jax.tree.leaves(trace), 4)
  return jax.tree.map(slots_to_layers, trace)


def replay_from_trace(trace: RoutingTrace, *, gates: bool = False) -> Replay:
  """The argument of `Policy.forward` that repeats the routing of a trace (by slot, [B, T, L, K]).

  The last position of a row scores no token and has no entry: it gets expert 0, and nothing depends on it.

  Args:
    gates: repeat the gates too; otherwise they come from the current router, with gradient.
  Raises:
    ValueError: gates is True and the trace has none.
  """
  if gates and trace.gate is None:
    raise ValueError("the trace holds no gates to replay; record it with trace_probe(..., gates=True).")
  return Replay(slots_to_layers(trace.expert_index), slots_to_layers(trace.gate) if gates else None)


def expert_load(expert_index: Array, mask: Array, num_experts: int) -> Array:
  """[B, T, K] choices, [B, T] bool -> [num_experts] int32, choices of each expert where mask; batches add up."""
  # A comparison, not a scatter: it partitions over a sharded batch and fuses into its reduction.
  chosen = expert_index.astype(jnp.int32)[..., None] == jnp.arange(num_experts, dtype=jnp.int32)
  return jnp.sum(chosen & mask[..., None, None], axis=(0, 1, 2), dtype=jnp.int32)


def _routing_load(router: RouterOutput, log_prob: Array, mask: Array) -> RoutingLoad:
  """Entropy and load over a mask [B, T]. log_prob: [B, T, E]; those of sigmoid routers are normalised first."""
  log_prob = jax.nn.log_softmax(log_prob, axis=-1)
  entropy = -jnp.sum(jnp.where(mask, jnp.sum(jnp.exp(log_prob) * log_prob, axis=-1), 0))
  return RoutingLoad(entropy, expert_load(router.expert_index, mask, router.logits.shape[-1]))


def drift_probe(router_log_prob: RouterLogProb, mask_positions: Array, *, deviation: str = "abs") -> Probe:
  """A probe that compares the current router with `trace_probe_inputs(trace)`, which it expects as probe_inputs.

  Its output carries no gradient, so the backward pass stores nothing for it. New log-probs are rounded as the recorded
  ones were: an unmoved router deviates by exactly 0. If the layer replays experts, the overlap (also as a deviation)
  and the load are those of the replayed experts.

  Args:
    router_log_prob: `Policy.router_log_prob`.
    mask_positions: [B, T] bool, the positions that count for the sums (`to_positions(action_mask)`).
    deviation: one of `rspo_jax.router.shift.DEVIATIONS`.
  Returns:
    A probe whose output is `RoutingDrift`.
  Raises:
    ValueError: from the probe, if its probe_inputs are None; use `load_probe` if there is no trace.
  """

  def probe(router, probe_inputs):
    if probe_inputs is None:
      raise ValueError(
        "drift_probe got probe_inputs=None; want trace_probe_inputs(trace). Use load_probe if there is no trace."
      )
    log_prob = router_log_prob(jax.lax.stop_gradient(router.logits))
    old = probe_inputs
    new = RoutingTrace(
      expert_index=router.expert_index,
      log_prob=_log_prob_of(log_prob, old.expert_index),
      all_log_prob=_rounded(log_prob) if deviation == "kl" else None,
    )
    overlap = jnp.sum(jnp.where(mask_positions, expert_overlap(new.expert_index, old.expert_index), 0))
    return RoutingDrift(layer_deviation(deviation, new, old), overlap, *_routing_load(router, log_prob, mask_positions))

  return probe


def load_probe(router_log_prob: RouterLogProb, mask_positions: Array) -> Probe:
  """A probe for training without a trace: its output is `RoutingLoad`. Arguments as in `drift_probe`."""

  def probe(router, probe_inputs):
    del probe_inputs
    return _routing_load(router, router_log_prob(jax.lax.stop_gradient(router.logits)), mask_positions)

  return probe
