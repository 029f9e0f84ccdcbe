"""Train states: their initialisation, abstract shapes and shardings, and a change of optimizer."""

import functools

import jax
import jax.numpy as jnp
import optax

from rspo_jax.mesh import param_shardings
from rspo_jax.types import Array, Layout, Policy, TrainState


def state_shardings(policy: Policy, optimizer: optax.GradientTransformation, layout: Layout) -> TrainState:
  """Shardings of a `TrainState`: the optimizer's moments are sharded as their parameters, all else is replicated."""
  params = param_shardings(policy, layout)
  shapes = jax.eval_shape(policy.init, jax.random.key(0))
  replicated = layout.sharding()

  def is_masked(leaf):
    """The place of the moments of a frozen parameter (`rspo_jax.training.parameters.freeze`)."""
    return isinstance(leaf, optax.MaskedNode)

  opt_state = optax.tree.map_params(
    optimizer,
    lambda leaf, sharding: leaf if is_masked(leaf) else sharding,
    jax.eval_shape(optimizer.init, shapes),
    params,
    transform_non_params=lambda _: replicated,
    is_leaf=is_masked,
  )
  return TrainState(params=params, opt_state=opt_state, step=replicated)


def create_state(policy: Policy, optimizer: optax.GradientTransformation, seed: Array | int) -> TrainState:
  """A new train state; pure, for jit (`init_state`) and eval_shape (`abstract_state`)."""
  params = policy.init(jax.random.key(seed))
  return TrainState(params=params, opt_state=optimizer.init(params), step=jnp.zeros((), jnp.int32))


def init_state(policy: Policy, optimizer: optax.GradientTransformation, seed: int, layout: Layout) -> TrainState:
  """A new train state, initialised under jit, directly into its shardings."""
  create = functools.partial(create_state, policy, optimizer)
  return jax.jit(create, out_shardings=state_shardings(policy, optimizer, layout))(seed)


def abstract_state(policy: Policy, optimizer: optax.GradientTransformation, layout: Layout) -> TrainState:
  """Shapes, dtypes and shardings of `init_state`, without computing it: the target of a checkpoint's restore."""
  shapes = jax.eval_shape(functools.partial(create_state, policy, optimizer), 0)
  shardings = state_shardings(policy, optimizer, layout)
  return jax.tree.map(
    lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding), shapes, shardings
  )


def restart_optimizer(
  state: TrainState, policy: Policy, optimizer: optax.GradientTransformation, layout: Layout
) -> TrainState:
  """The same parameters and step with a newly initialised optimizer, for the next phase of training."""
  shardings = state_shardings(policy, optimizer, layout)
  opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(state.params)
  return state.replace(opt_state=opt_state)
