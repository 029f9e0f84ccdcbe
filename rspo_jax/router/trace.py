"""What the router did: recorded compactly, compared with what it does now, handed back to be replayed.

Positions and slots: a forward scores token t from position t - 1. Probes speak of positions, batches of slots
(see `rspo_jax.types`); `to_slots` and `to_positions` are the only two moves between them.
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
  """How one layer's router moved against its old trace, and how it stands now; without gradient.

  Attributes:
    deviation: [B, T] float32, position-aligned, >= 0, see `rspo_jax.router.shift.layer_deviation`. Positions without
      an old entry (the last one of every row) hold finite values that mean nothing; `to_slots` drops them.
    overlap: [] float32, sum over the masked positions of the share of the old experts that the layer chooses now.
    entropy: [] float32, nats, sum over the masked positions of the router's entropy.
    load: [E] int32: how many (masked position, k) choices went to each expert.
  """

  deviation: Array
  overlap: Array
  entropy: Array
  load: Array


class RoutingLoad(NamedTuple):
  """`RoutingDrift` without an old trace to compare with."""

  entropy: Array
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


def _rounded(log_prob: Array) -> Array:
  """As float16. `reduce_precision` does the rounding because XLA may delete a float32 -> float16 -> float32 pair of
  converts, which would leave the new values unrounded and let an unmoved router drift."""
  return jax.lax.reduce_precision(log_prob, exponent_bits=5, mantissa_bits=10).astype(jnp.float16)


def _of_experts(log_prob: Array, expert_index: Array) -> Array:
  """[B, T, E] and [B, T, K] experts -> [B, T, K] float16, nats."""
  return _rounded(jnp.take_along_axis(log_prob, expert_index.astype(jnp.int32), axis=-1))


def index_dtype(num_experts: int) -> jnp.dtype:
  """The smallest type that tells so many experts apart."""
  return jnp.uint8 if num_experts <= 256 else jnp.uint16


def record_experts(router: RouterOutput, probe_inputs) -> Array:
  """A probe that keeps the chosen experts only, [B, T, K] uint8 or uint16."""
  del probe_inputs
  return router.expert_index.astype(index_dtype(router.logits.shape[-1]))


def trace_probe(router_log_prob: RouterLogProb, *, all_experts: bool = False, gates: bool = False) -> Probe:
  """A probe that keeps what router shift needs of each layer: 3 bytes per (token, k) for E <= 256, else 4.

  Args:
    router_log_prob: `Policy.router_log_prob`.
    all_experts: keep the log-probabilities of all E experts too (2 bytes each; deviation "kl").
    gates: keep the gates too (4 bytes each; to replay them).
  Returns:
    A probe whose output is a `RoutingTrace` of one layer, [B, T, K]. Stacked over layers it goes to `stack_trace`.
  """

  def probe(router, probe_inputs):
    log_prob = router_log_prob(jax.lax.stop_gradient(router.logits))
    return RoutingTrace(
      expert_index=record_experts(router, probe_inputs),
      log_prob=_of_experts(log_prob, router.expert_index),
      all_log_prob=_rounded(log_prob) if all_experts else None,
      gate=jax.lax.stop_gradient(router.gate) if gates else None,
    )

  return probe


def stack_trace(probed: RoutingTrace) -> RoutingTrace:
  """What `trace_probe` gave, [L, B, T, ...] by position -> the trace, [B, T, L, ...] by slot.

  Slot 0 was scored by nothing; its entries are 0.
  """
  chex.assert_rank(jax.tree.leaves(probed), 4)
  return jax.tree.map(lambda x: jnp.moveaxis(to_slots(x, axis=2), 0, 2), probed)


def slots_to_layers(x: Array) -> Array:
  """[B, T, L, ...] by slot -> [L, B, T, ...] by position."""
  return to_positions(jnp.moveaxis(x, 2, 0), axis=2)


def trace_probe_inputs(trace: RoutingTrace) -> RoutingTrace:
  """The way back: [L, B, T, ...] by position: `probe_inputs` of a forward."""
  chex.assert_rank(jax.tree.leaves(trace), 4)
  return jax.tree.map(slots_to_layers, trace)


def replay_from_trace(trace: RoutingTrace, *, gates: bool = False) -> Replay:
  """What `Policy.forward` is given to repeat the routing of a trace (by slot, [B, T, L, K]).

  The last position of a row scores no token and has no entry: it gets expert 0, and nothing depends on it.

  Args:
    gates: repeat the gates too; else they come from the live router, with gradient.
  Raises:
    ValueError: gates are asked for and the trace has none.
  """
  if gates and trace.gate is None:
    raise ValueError("the trace holds no gates to replay; record it with trace_probe(..., gates=True).")
  return Replay(slots_to_layers(trace.expert_index), slots_to_layers(trace.gate) if gates else None)


def expert_load(expert_index: Array, mask: Array, num_experts: int) -> Array:
  """[B, T, K] choices, [B, T] bool -> [num_experts] int32, masked choices per expert; batches add up."""
  # A comparison rather than a scatter: it partitions over a sharded batch and fuses into its reduction.
  chosen = expert_index.astype(jnp.int32)[..., None] == jnp.arange(num_experts, dtype=jnp.int32)
  return jnp.sum(chosen & mask[..., None, None], axis=(0, 1, 2), dtype=jnp.int32)


def _entropy(log_prob: Array, mask: Array) -> Array:
  """[B, T, E] router log-probabilities -> [], nats, summed over the mask; sigmoid scores are normalised first."""
  log_prob = jax.nn.log_softmax(log_prob, axis=-1)
  return -jnp.sum(jnp.where(mask, jnp.sum(jnp.exp(log_prob) * log_prob, axis=-1), 0))


def drift_probe(router_log_prob: RouterLogProb, mask_positions: Array, *, deviation: str = "abs") -> Probe:
  """A probe that compares the live router with `trace_probe_inputs(trace)`, which it wants as probe_inputs.

  Nothing it computes carries a gradient, so the backward pass keeps nothing for it. New log-probs are rounded
  as the recorded ones were: an unmoved router deviates by exactly 0. Where the layer replays experts, the overlap
  (also as a deviation) and the load speak of the replayed ones.

  Args:
    router_log_prob: `Policy.router_log_prob`.
    mask_positions: [B, T] bool, the positions that count for the sums (`to_positions(action_mask)`).
    deviation: one of `rspo_jax.router.shift.DEVIATIONS`.
  Returns:
    A probe whose output is `RoutingDrift`.
  Raises:
    ValueError: in the probe, when it is given no probe_inputs; use `load_probe` when there is no trace.
  """

  def probe(router, probe_inputs):
    if probe_inputs is None:
      raise ValueError(
        "drift_probe got probe_inputs=None; want trace_probe_inputs(trace). "
        "Use load_probe(mask_positions) when there is no trace."
      )
    log_prob = router_log_prob(jax.lax.stop_gradient(router.logits))
    old = probe_inputs
    new = RoutingTrace(
      expert_index=router.expert_index,
      log_prob=_of_experts(log_prob, old.expert_index),
      all_log_prob=_rounded(log_prob) if deviation == "kl" else None,
    )
    overlap = jnp.sum(jnp.where(mask_positions, expert_overlap(new.expert_index, old.expert_index), 0))
    return RoutingDrift(
      deviation=layer_deviation(deviation, new, old),
      overlap=overlap,
      entropy=_entropy(log_prob, mask_positions),
      load=expert_load(router.expert_index, mask_positions, router.logits.shape[-1]),
    )

  return probe


def load_probe(router_log_prob: RouterLogProb, mask_positions: Array) -> Probe:
  """A probe for training without a trace: its output is `RoutingLoad`."""

  def probe(router, probe_inputs):
    del probe_inputs
    log_prob = router_log_prob(jax.lax.stop_gradient(router.logits))
    return RoutingLoad(
      entropy=_entropy(log_prob, mask_positions),
      load=expert_load(router.expert_index, mask_positions, router.logits.shape[-1]),
    )

  return probe
