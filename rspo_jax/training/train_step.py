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
from rspo_jax.training.minibatches import gather_rows, join_rows, split_rows, sum_devices
from rspo_jax.training.scoring import token_log_prob
from rspo_jax.types import Array, Layout, Params, Policy, TrainBatch, TrainState

Step = Callable[..., tuple[TrainState, dict[str, Array]]]


def skip_nonfinite(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
  """The optimizer, except that a gradient with NaN or infinity changes nothing and is counted ("updates/skipped")."""
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

  Returns (new state, loss, LossAux of the whole minibatch, gradient norm).
  """
  differentiate = jax.value_and_grad(loss, has_aux=True)
  if microbatches == 1:
    (value, aux), gradient = differentiate(state.params, batch)
  else:

    def accumulate(total, microbatch):
      (value, aux), gradient = differentiate(state.params, microbatch)
      return jax.tree.map(jnp.add, total, (value, aux.sums, gradient)), aux.rows

    pieces = split_rows(batch, microbatches)
    shapes = jax.eval_shape(differentiate, state.params, jax.tree.map(lambda leaf: leaf[0], pieces))
    (value, aux), gradient = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    (value, sums, gradient), rows = jax.lax.scan(accumulate, (value, aux.sums, gradient), pieces)
    aux = LossAux(join_rows(rows), sums)
  value, sums, gradient = sum_devices((value, aux.sums, gradient), axis_name)
  aux = LossAux(gather_rows(aux.rows, axis_name), sums)
  updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  new_state = TrainState(params=params, opt_state=opt_state, step=state.step + 1)
  return new_state, value, aux, optax.tree.norm(gradient)


def make_train_step(policy: Policy, optimizer: optax.GradientTransformation, options: UpdateOptions) -> Step:
  """The policy-gradient update.

  Args:
    policy: the trained policy. optimizer: any optax transformation; wrap it in `skip_nonfinite` to skip updates with
      NaN.
    options: objective, router strategies, microbatches.
  Returns:
    step(state, batch, axis_name=None) -> (state, metrics), pure. Under `jax.pmap` pass the axis name; under jit over a
    mesh leave it None. Normalisers are computed over the whole minibatch before any gradient, so microbatches and
    devices do not change the update. `metrics` has the names of `rspo_jax.run.metrics.METRICS` that concern an update.
  Raises:
    ValueError: router_bias_rate for a policy without such a bias; from the step, a batch that lacks a field that the
      options need.
  """
  if options.router_bias_rate and policy.add_router_bias is None:
    raise ValueError(
      f"router_bias_rate is {options.router_bias_rate}, but this model has no bias on the expert choice; set the rate "
      "to 0, or give the model such a bias (router_bias)."
    )
  loss = make_loss(policy, options)

  def step(state: TrainState, batch: TrainBatch, axis_name: str | None = None):
    norms = normalisers(policy, options, state, batch, pieces=options.microbatches, axis_name=axis_name)
    skipped_before = _skipped(state)
    state, value, aux, norm = _gradient_step(
      optimizer,
      lambda params, piece: loss(params, piece, norms),
      state,
      batch,
      options.microbatches,
      axis_name,
    )
    router, losses = aux.sums
    if options.router_bias_rate:
      rate = options.router_bias_rate
      if skipped_before:  # a skipped update leaves the bias as it is, too
        rate = jnp.where(_skipped(state)["updates/skipped"] == skipped_before["updates/skipped"], rate, 0.0)
      bias_step = balance.router_bias_step(router.load, rate)
      state = state.replace(params=policy.add_router_bias(state.params, bias_step))
    mask = gather_rows(batch.action_mask, axis_name)
    return state, {
      "loss/objective": -value,
      "grad/norm": norm,
      **({} if norms.floor is None else {"shift/floor": jnp.float32(norms.floor)}),
      **losses,
      **_skipped(state),
      **diagnostics.token_metrics(aux.rows, mask),
      **diagnostics.router_metrics(router, mask),
    }

  return step


def make_supervised_step(
  policy: Policy, optimizer: optax.GradientTransformation, *, microbatches: int = 1, logits_chunk: int = 128
) -> Step:
  """Maximum likelihood of the action tokens (the warm start). Otherwise as `make_train_step`.

  Args:
    microbatches, logits_chunk: see `rspo_jax.training.loss.UpdateOptions`.
  Returns:
    step(state, batch, axis_name=None) -> (state, metrics). The step reads tokens, valid and action_mask of the batch.
  """

  def step(state: TrainState, batch: TrainBatch, axis_name: str | None = None):
    weight = jnp.maximum(sum_devices(batch.action_mask.sum(), axis_name), 1)

    def loss(params, piece):
      probe = load_probe(policy.router_log_prob, to_positions(piece.action_mask))
      hidden, router = policy.forward(params, piece.tokens, piece.valid, probe=probe)
      log_prob, _ = token_log_prob(policy, params, hidden, piece.tokens, chunk=logits_chunk)
      total = masked_mean(log_prob, piece.action_mask).total
      return -total / weight, LossAux((), router)

    state, value, aux, norm = _gradient_step(optimizer, loss, state, batch, microbatches, axis_name)
    return state, {
      "loss/warm_start": value,
      "grad/norm": norm,
      **_skipped(state),
      **diagnostics.load_metrics(aux.sums.load),
    }

  return step


def jit_step(step: Step, layout: Layout, state_shardings: TrainState) -> Step:
  """The step jitted over the mesh of `layout`; the state is donated, the batch is sharded over its rows."""
  batch = layout.sharding("batch")
  return jax.jit(
    step,
    in_shardings=(state_shardings, batch),
    out_shardings=(state_shardings, layout.sharding()),
    donate_argnums=0,
  )


def pmap_step(step: Step, devices: list[jax.Device] | None = None) -> Step:
  """The step under `jax.pmap`, data-parallel, for a policy built without a layout.

  Every leaf of state and batch leads with the device axis: the state is replicated, the batch reshaped to
  [devices, B / devices, ...].
  """
  step = functools.partial(step, axis_name="data")
  return jax.pmap(lambda state, batch: step(state, batch), axis_name="data", devices=devices, donate_argnums=0)


def _skipped(state: TrainState) -> dict[str, Array]:
  """Updates skipped so far; empty for an optimizer that does not count them."""
  skipped = optax.tree.get(state.opt_state, "total_notfinite")
  return {} if skipped is None else {"updates/skipped": skipped}
