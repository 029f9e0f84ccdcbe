"""One update as a pure function (state, batch) -> (state, metrics), for jit over a mesh or for pmap."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from rspo_jax.masked import masked_mean
from rspo_jax.router import balance
from rspo_jax.router.trace import load_probe, to_positions
from rspo_jax.training import diagnostics
from rspo_jax.training.loss import LossAux, UpdateOptions, make_loss, normalisers
from rspo_jax.training.minibatches import join_rows, split_rows
from rspo_jax.training.scoring import token_log_prob
from rspo_jax.types import Array, Layout, Params, Policy, TrainBatch, TrainState

Step = Callable[..., tuple[TrainState, dict[str, Array]]]


def skip_nonfinite(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
  """The optimizer, but a gradient with a NaN or infinity changes nothing and is counted ("updates/skipped")."""
  return optax.apply_if_finite(optimizer, max_consecutive_errors=jnp.iinfo(jnp.int32).max)


def _gradient_step(
  optimizer: optax.GradientTransformation,
  loss: Callable[[Params, TrainBatch], tuple[Array, LossAux]],
  state: TrainState,
  batch: TrainBatch,
  microbatches: int,
  axis_name: str | None,
) -> tuple[TrainState, Array, LossAux, Array]:
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
    pieces = LossAux(join_rows(rows), sums)
  if axis_name is not None:
    value, sums, gradient = jax.lax.psum((value, pieces.sums, gradient), axis_name)
    pieces = LossAux(jax.lax.all_gather(pieces.rows, axis_name, tiled=True), sums)
  updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  new_state = TrainState(params=params, opt_state=opt_state, step=state.step + 1)
  return new_state, value, pieces, optax.global_norm(gradient)


def make_train_step(policy: Policy, optimizer: optax.GradientTransformation, options: UpdateOptions) -> Step:
  """The policy-gradient update.

  Args:
    policy: what is trained. optimizer: any optax transformation; wrap it in `skip_nonfinite` to survive NaN.
    options: objective, router strategies, microbatches.
  Returns:
    step(state, batch, axis_name=None) -> (state, metrics), pure. Under `jax.pmap` pass the axis name; under jit over a
    mesh leave it None. Normalisers are taken over the whole minibatch before any gradient, so microbatches and
    devices do not change the update. `metrics` holds the names of `rspo_jax.run.metrics.METRICS` that an update knows.
  Raises:
    ValueError: router_bias_rate for a policy without such a bias.
  """
  if options.router_bias_rate and policy.add_router_bias is None:
    raise ValueError(
      f"router_bias_rate is {options.router_bias_rate}, but this model has no bias on its experts' choice; set the "
      "rate to 0, or give the model one (router_bias)."
    )
  loss = make_loss(policy, options)

  def step(state: TrainState, batch: TrainBatch, axis_name: str | None = None):
    norms = normalisers(policy, options, state, batch, pieces=options.microbatches, axis_name=axis_name)
    before = state.opt_state
    state, value, pieces, norm = _gradient_step(
      optimizer,
      lambda params, part: loss(params, part, norms),
      state,
      batch,
      options.microbatches,
      axis_name,
    )
    router, losses = pieces.sums
    if options.router_bias_rate:
      rate = jnp.where(_skips(state.opt_state) == _skips(before), options.router_bias_rate, 0.0)
      bias_step = balance.router_bias_step(router.load, rate)
      state = state.replace(params=policy.add_router_bias(state.params, bias_step))
    mask = batch.action_mask
    if axis_name is not None:
      mask = jax.lax.all_gather(mask, axis_name, tiled=True)
    return state, {
      "loss/objective": -value,
      "grad/norm": norm,
      **({} if norms.floor is None else {"shift/floor": jnp.float32(norms.floor)}),
      **losses,
      **_skipped(state),
      **diagnostics.token_metrics(pieces.rows, mask),
      **diagnostics.router_metrics(router, mask),
    }

  return step


def make_supervised_step(
  policy: Policy, optimizer: optax.GradientTransformation, *, microbatches: int = 1, logits_chunk: int = 128
) -> Step:
  """Maximum likelihood of the action tokens (the warm start). As `make_train_step`; advantage and old values unused."""

  def step(state: TrainState, batch: TrainBatch, axis_name: str | None = None):
    weight = batch.action_mask.sum()
    weight = jnp.maximum(weight if axis_name is None else jax.lax.psum(weight, axis_name), 1)

    def loss(params, part):
      hidden, router = policy.forward(params, part.tokens, part.valid, probe=_load_probe(policy, part))
      log_prob, _ = token_log_prob(policy, params, hidden, part.tokens, chunk=logits_chunk)
      total = masked_mean(log_prob, part.action_mask).total
      return -total / weight, LossAux((), router)

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


def _load_probe(policy: Policy, batch: TrainBatch):
  return load_probe(policy.router_log_prob, to_positions(batch.action_mask))


def _skips(opt_state: optax.OptState) -> Array | int:
  """Updates skipped so far, 0 for an optimizer that does not count them."""
  skips = optax.tree.get(opt_state, "total_notfinite")
  return 0 if skips is None else skips


def _skipped(state: TrainState) -> dict[str, Array]:
  skipped = optax.tree.get(state.opt_state, "total_notfinite")
  return {} if skipped is None else {"updates/skipped": skipped}
