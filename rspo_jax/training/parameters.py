"""Choosing parameters by their path: what is frozen, what learns at another rate.

A path is the keys from the root joined by "/", such as "layers_0/moe/router". A pattern is a regular expression that
has to match some part of it.
"""

import re
from collections.abc import Mapping, Sequence

import jax
import optax

from rspo_jax.types import Params

ROUTER = r"(^|/)router(_logit_bias|_lora_[ab])?$"


def path_name(path) -> str:
  """A pytree key path as "layers_0/moe/router"."""
  return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def matches(params: Params, patterns: Sequence[str]) -> Params:
  """A pytree of bools like params, True where the path matches any pattern.

  Raises:
    ValueError: a pattern that is no regular expression or matches no parameter; names it and some paths there are.
  """
  names = [path_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
  compiled = []
  for pattern in patterns:
    try:
      compiled.append(re.compile(pattern))
    except re.error as error:
      raise ValueError(f"the parameter pattern {pattern!r} is no regular expression: {error}.") from error
    if not any(compiled[-1].search(name) for name in names):
      raise ValueError(f"the parameter pattern {pattern!r} matches nothing; there are {', '.join(names[:12])}, ...")
  return jax.tree_util.tree_map_with_path(
    lambda path, _: any(pattern.search(path_name(path)) for pattern in compiled), params
  )


def stop_gradients(params: Params, patterns: Sequence[str]) -> Params:
  """The same parameters, those that match without gradient: the backward pass does no work for them."""
  if not patterns:
    return params
  return jax.tree.map(
    lambda leaf, frozen: jax.lax.stop_gradient(leaf) if frozen else leaf, params, matches(params, patterns)
  )


def freeze(optimizer: optax.GradientTransformation, patterns: Sequence[str]) -> optax.GradientTransformation:
  """The optimizer, for all parameters but those that match: they get no update, no weight decay and no moments.

  Put it around what measures the gradient as well (clipping by global norm), so that frozen ones do not count.
  """
  if not patterns:
    return optimizer

  def frozen(params):
    return matches(params, patterns)

  def trained(params):
    return jax.tree.map(lambda mine: not mine, frozen(params))

  # Not optax.partition, whose state optax.tree.map_params cannot walk (the shardings are made with it).
  return optax.chain(optax.masked(optimizer, trained), optax.masked(optax.set_to_zero(), frozen))


def scale_updates(multipliers: Mapping[str, float]) -> optax.GradientTransformation:
  """Multiplies the updates of parameters that match a pattern: behind Adam, a learning rate of their own.

  Put it behind `freeze`, not inside: what is frozen is not there to be matched.
  """

  def update(updates, state, params=None):
    del params
    for pattern, factor in multipliers.items():
      chosen = matches(updates, (pattern,))
      updates = jax.tree.map(lambda leaf, mine, factor=factor: leaf * factor if mine else leaf, updates, chosen)
    return updates, state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
