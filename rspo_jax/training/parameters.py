"""Selecting parameters by their path: to freeze them, or to give them another learning rate.

A path is the keys from the root joined by "/", such as "layers_0/moe/router". A pattern is a regular expression that is
searched in the path.
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
    ValueError: a pattern that is no regular expression or matches no parameter; names it and some existing paths.
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
  """The same parameters, without gradient where a pattern matches: the backward pass does not compute it."""
  if not patterns:
    return params
  return jax.tree.map(
    lambda leaf, frozen: jax.lax.stop_gradient(leaf) if frozen else leaf, params, matches(params, patterns)
  )


def freeze(optimizer: optax.GradientTransformation, patterns: Sequence[str]) -> optax.GradientTransformation:
  """The optimizer restricted to parameters that match no pattern: the others get no update, weight decay or moments.

  Wrap the whole chain, including clipping by global norm, so that the norm excludes frozen parameters.
  """
  if not patterns:
    return optimizer

  def frozen(params):
    return matches(params, patterns)

  def trained(params):
    return jax.tree.map(lambda matched: not matched, frozen(params))

  # Not optax.partition: optax.tree.map_params, which gives the shardings, cannot traverse its state.
  return optax.chain(optax.masked(optimizer, trained), optax.masked(optax.set_to_zero(), frozen))


def scale_updates(multipliers: Mapping[str, float]) -> optax.GradientTransformation:
  """Multiplies the updates of parameters that match a pattern; after Adam, that is a separate learning rate.

  Chain it after `freeze`; inside it, frozen parameters are masked and would not match.

  Args:
    multipliers: pattern -> factor. The factors of several patterns that match a parameter multiply.
  """

  def update(updates, state, params=None):
    del params
    for pattern, factor in multipliers.items():
      matched = matches(updates, (pattern,))
      updates = jax.tree.map(lambda leaf, match, factor=factor: leaf * factor if match else leaf, updates, matched)
    return updates, state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
