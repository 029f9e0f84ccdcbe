"""F2: one update as a pure function (state, batch) -> (state, metrics), for jit over a mesh or for pmap."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from rspo_jax import diagnostics, objectives, reductions, routing
from rspo_jax.diagnostics import RouterSums, ShiftStatistics, TokenStatistics
from rspo_jax.minibatches import join_rows, split_rows
from rspo_jax.scoring import token_log_prob
from rspo_jax.types import Array, Layout, Params, Policy, TrainBatch, TrainState

Step = Callable[..., tuple[TrainState, dict[str, Array]]]


@dataclasses.dataclass(frozen=True)
class UpdateOptions:
  """What an update optimises, and in how many pieces.

  Attributes:
    objective: a function of `rspo_jax.objectives`; bind its clip bounds and placement with functools.partial.
    aggregation: how tokens and rows are averaged, one of `objectives.AGGREGATIONS`.
    shift_floor: gamma_min of router shift, in (0, 1]. None takes no notice of the routing trace: the base objective.
    microbatches: pieces a minibatch is cut into to save memory; the update is the same.
    logits_chunk: positions whose logits are held at once.
  """

  objective: objectives.Objective = objectives.gmpo
  aggregation: str = "sequence_mean_token_mean"
  shift_floor: float | None = 0.8
  microbatches: int = 1
  logits_chunk: int = 128

  def __post_init__(self):
    if self.aggregation not in objectives.AGGREGATIONS:
      raise ValueError(f"aggregation is {self.aggregation!r}; want one of {objectives.AGGREGATIONS}.")
    if self.shift_floor is not None and not 0 < self.shift_floor <= 1:
      raise ValueError(f"shift_floor is {self.shift_floor}; want a value in (0, 1], or None for no router shift.")
    if self.microbatches < 1 or self.logits_chunk < 1:
      raise ValueError(f"microbatches is {self.microbatches} and logits_chunk {self.logits_chunk}; both start at 1.")


class Pieces(NamedTuple):
  """What a loss hands out beside its value. rows: arrays [b, ...] of the microbatch's rows, put together again; sums:
  arrays that add up over microbatches and devices."""

  rows: Any
  sums: Any


def skip_nonfinite(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
  """The optimizer, but a gradient with a NaN or infinity changes nothing and is counted ("updates/skipped")."""
  return optax.apply_if_finite(optimizer, max_consecutive_errors=jnp.iinfo(jnp.int32).max)


def _gradient_step(
  optimizer: optax.GradientTransformation,
  loss: Callable[[Params, TrainBatch], tuple[Array, Pieces]],
  state: TrainState,
  batch: TrainBatch,
  microbatches: int,
  axis_name: str | None,
) -> tuple[TrainState, Array, Pieces, Array]:
  """Sums the gradient of `loss` over microbatches (and over `axis_name`) and takes one optimizer step.

  Returns (new state, loss, pieces of the whole minibatch, gradient norm).
  """
  differentiate = jax.value_and_grad(loss, has_aux=True)
  if microbatches == 1:
    (value, pieces), gradient = differentiate(state.params, batch)
  else:

    def accumulate(total, microbatch):
      (value, pieces), gradient = differentiate(state.params, microbatch)
      return jax.tree.map(jnp.add, total, (value, pieces.sums, gradient)), pieces.rows

    parts = split_rows(batch, microbatches)
    shapes = jax.eval_shape(differentiate, state.params, jax.tree.map(lambda leaf: leaf[0], parts))
    (value, pieces), gradient = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    (value, sums, gradient), rows = jax.lax.scan(accumulate, (value, pieces.sums, gradient), parts)
    pieces = Pieces(join_rows(rows), sums)
  if axis_name is not None:
    value, sums, gradient = jax.lax.psum((value, pieces.sums, gradient), axis_name)
    pieces = Pieces(jax.lax.all_gather(pieces.rows, axis_name, tiled=True), sums)
  updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  new_state = TrainState(params=params, opt_state=opt_state, step=state.step + 1)
  return new_state, value, pieces, optax.global_norm(gradient)


def _global(weight: Array, axis_name: str | None) -> Array:
  """A normaliser of the whole minibatch; at least 1, so that an empty one gives 0 and not NaN."""
  weight = weight if axis_name is None else jax.lax.psum(weight, axis_name)
  return jnp.maximum(weight, 1)


def make_train_step(policy: Policy, optimizer: optax.GradientTransformation, options: UpdateOptions) -> Step:
  """The policy-gradient update.

  Args:
    policy: what is trained. optimizer: any optax transformation; wrap it in `skip_nonfinite` to survive NaN.
    options: objective, router shift, microbatches.
  Returns:
    step(state, batch, axis_name=None) -> (state, metrics), pure. Under `jax.pmap` pass the axis name; under jit over a
    mesh leave it None. Normalisers are taken over the whole minibatch before any gradient, so microbatches and
    devices do not change the update. `metrics` holds the names of `rspo_jax.metrics.METRICS` that an update knows.
  """

  def loss(params: Params, batch: TrainBatch, weight: Array) -> tuple[Array, Pieces]:
    mask = batch.action_mask
    hidden, shift, router = _watched_forward(policy, params, batch, options)
    log_prob, entropy = token_log_prob(policy, params, hidden, batch.tokens, chunk=options.logits_chunk)
    log_ratio = log_prob - batch.old_log_prob
    terms = options.objective(log_ratio, batch.advantage, mask, log_shift=None if shift is None else shift.log_shift)
    objective = objectives.aggregate(terms, mask, options.aggregation).total / weight
    seen = TokenStatistics(log_prob, entropy, log_ratio, terms.clipped_low, terms.clipped_high, shift)
    return -objective, Pieces(jax.lax.stop_gradient(seen), router)

  def step(state: TrainState, batch: TrainBatch, axis_name: str | None = None):
    chex.assert_equal_shape([batch.tokens, batch.valid, batch.action_mask, batch.old_log_prob])
    weight = _global(objectives.aggregation_weight(batch.action_mask, options.aggregation), axis_name)
    state, value, pieces, norm = _gradient_step(
      optimizer,
      lambda params, part: loss(params, part, weight),
      state,
      batch,
      options.microbatches,
      axis_name,
    )
    mask = batch.action_mask
    if axis_name is not None:
      mask = jax.lax.all_gather(mask, axis_name, tiled=True)
    return state, {
      "loss/objective": -value,
      "grad/norm": norm,
      **_skipped(state),
      **diagnostics.token_metrics(pieces.rows, mask),
      **diagnostics.router_metrics(pieces.sums, mask),
    }

  return step


def make_supervised_step(
  policy: Policy, optimizer: optax.GradientTransformation, *, microbatches: int = 1, logits_chunk: int = 128
) -> Step:
  """Maximum likelihood of the action tokens (the warm start). As `make_train_step`; advantage and old values unused."""

  def step(state: TrainState, batch: TrainBatch, axis_name: str | None = None):
    weight = _global(batch.action_mask.sum(), axis_name)

    def loss(params, part):
      hidden, load = policy.forward(params, part.tokens, part.valid, probe=_load_probe(part))
      log_prob, _ = token_log_prob(policy, params, hidden, part.tokens, chunk=logits_chunk)
      total = reductions.masked_mean(log_prob, part.action_mask).total
      return -total / weight, Pieces((), RouterSums(load, None))

    state, value, pieces, norm = _gradient_step(optimizer, loss, state, batch, microbatches, axis_name)
    return state, {
      "loss/warm_start": value,
      "grad/norm": norm,
      **_skipped(state),
      **diagnostics.load_metrics(pieces.sums.load),
    }

  return step


def jit_step(step: Step, layout: Layout, state_shardings: TrainState) -> Step:
  """The step jitted over the mesh of `layout`; the state is donated, the batch is split over its rows."""
  batch = layout.sharding("batch")
  return jax.jit(
    step,
    in_shardings=(state_shardings, batch),
    out_shardings=(state_shardings, layout.sharding()),
    donate_argnums=0,
  )


def pmap_step(step: Step, devices: list[jax.Device] | None = None) -> Step:
  """The step under `jax.pmap`, data-parallel. Every leaf of state and batch leads with the device axis: the state
  replicated, the batch reshaped to [devices, B / devices, ...]. Build the policy without a layout."""
  step = functools.partial(step, axis_name="data")
  return jax.pmap(lambda state, batch: step(state, batch), axis_name="data", devices=devices, donate_argnums=0)


def _load_probe(batch: TrainBatch):
  return routing.count_load(routing.to_positions(batch.action_mask))


def _watched_forward(policy: Policy, params: Params, batch: TrainBatch, options: UpdateOptions):
  """One training forward: (hidden, ShiftStatistics or None, RouterSums)."""
  if options.shift_floor is None:
    hidden, load = policy.forward(params, batch.tokens, batch.valid, probe=_load_probe(batch))
    return hidden, None, RouterSums(load, None)
  if batch.old_routing is None:
    raise ValueError(
      f"shift_floor is {options.shift_floor} but the batch has no old_routing; put the trace of `scoring.score` into "
      "it, or set shift_floor to None for the base objective."
    )
  probe = routing.watch_routing(policy.router_log_prob, routing.to_positions(batch.action_mask))
  hidden, seen = policy.forward(
    params, batch.tokens, batch.valid, probe=probe, probe_inputs=routing.trace_for_probe(batch.old_routing)
  )
  by_layer = routing.to_slots(seen.drift, axis=2)
  drift = by_layer.mean(axis=0)
  shift = ShiftStatistics(
    drift=drift,
    overlap=routing.to_slots(seen.overlap, axis=2).mean(axis=0),
    log_shift=routing.router_log_shift(drift, floor=options.shift_floor),
  )
  return hidden, shift, RouterSums(seen.load, jnp.sum(jnp.where(batch.action_mask, by_layer, 0), axis=(1, 2)))


def _skipped(state: TrainState) -> dict[str, Array]:
  skipped = optax.tree.get(state.opt_state, "total_notfinite")
  return {} if skipped is None else {"updates/skipped": skipped}
