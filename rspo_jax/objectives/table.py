"""The objectives by name, each with the aggregation and advantages of its paper; and the loss on plain arrays.

`docs/algorithms.md` has the table of formulas, sources and defaults.
"""

import functools
import inspect
import types
import typing
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rspo_jax.lookup import look_up, near
from rspo_jax.objectives.aggregation import DEFAULT_AGGREGATION, aggregate
from rspo_jax.objectives.sequence_level import gmpo, gspo, rloo
from rspo_jax.objectives.terms import Objective
from rspo_jax.objectives.token_level import cispo, grpo, gspo_token, policy_gradient, sapo
from rspo_jax.types import Array


class Recipe(NamedTuple):
  """An objective with the aggregation and the advantages that its paper or its usual implementation combines it with.

  Attributes:
    objective: a function of `rspo_jax.objectives.token_level` or `rspo_jax.objectives.sequence_level`.
    aggregation: one of `rspo_jax.objectives.aggregation.AGGREGATIONS`.
    baseline, scale: of the advantages, see `rspo_jax.objectives.advantages.group_advantages`.
  """

  objective: Objective
  aggregation: str = DEFAULT_AGGREGATION
  baseline: str = "group_mean"
  scale: str = "group_std"


# Arguments of every objective; all its other parameters are options of its own.
_SHARED_ARGUMENTS = ("log_ratio", "advantage", "mask", "log_shift", "placement")

OBJECTIVES: dict[str, Recipe] = {
  "policy_gradient": Recipe(policy_gradient, "token_mean", "group_mean", "none"),
  "reinforce_pp": Recipe(grpo, "token_mean", "none", "batch_std"),
  "reinforce_pp_baseline": Recipe(grpo, "token_mean", "group_mean", "batch_std"),
  "rloo": Recipe(rloo, "seq_mean_token_mean", "leave_one_out", "none"),
  "grpo": Recipe(grpo),
  "dr_grpo": Recipe(grpo, "seq_mean_token_sum_norm", "group_mean", "none"),
  "dapo": Recipe(functools.partial(grpo, eps_high=0.28), "token_mean"),
  "gspo": Recipe(gspo),
  "gspo_token": Recipe(gspo_token),
  "gmpo": Recipe(gmpo),
  "cispo": Recipe(cispo, "token_mean"),
  "sapo": Recipe(sapo),
}


def make_objective(name: str, /, **options: Any) -> Recipe:
  """The recipe of an objective with its options bound.

  Args:
    name: a key of `OBJECTIVES`, or "package.module:function", the path of a function with the signature of all
      objectives (`rspo_jax.objectives.token_level`); its recipe has the defaults of `Recipe`.
    options: the objective's own, as `objective_options` lists them. One that is None keeps its default.
  Raises:
    ValueError: an unknown name or option (the message names the nearest), or a function of another signature.
  """
  entry = look_up("objective", name, OBJECTIVES)
  recipe = entry if isinstance(entry, Recipe) else Recipe(entry)
  known = _own_parameters(inspect.signature(recipe.objective))
  options = {option: value for option, value in options.items() if value is not None}
  for option in options:
    if option not in known:
      has = f"it has {', '.join(known)}; {near(option, known)}" if known else "it has none."
      raise ValueError(f"objective {name!r} has no option {option!r}; {has}")
  objective = functools.partial(recipe.objective, **options)
  try:
    inspect.signature(objective).bind(None, None, None, log_shift=None, placement=None)
  except TypeError as error:
    raise ValueError(
      f"objective {name!r}: {error}; want a function (log_ratio, advantage, mask, *, log_shift, placement, **options)."
    ) from error
  return recipe._replace(objective=objective)


def objective_options(objective: Objective) -> dict[str, type]:
  """Names and plain types of an objective's own options, in the order of its signature.

  The type is the annotation without None ("float | None" gives float); that of its values for a Literal; that of the
  default for an option without an annotation.

  Raises:
    ValueError: an option whose annotation names no plain type.
  """
  own = _own_parameters(inspect.signature(objective, eval_str=True))
  return {name: _plain_type(name, parameter) for name, parameter in own.items()}


def _own_parameters(signature: inspect.Signature) -> dict[str, inspect.Parameter]:
  named = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
  return {name: p for name, p in signature.parameters.items() if p.kind in named and name not in _SHARED_ARGUMENTS}


def _plain_type(name: str, parameter: inspect.Parameter) -> type:
  annotation = parameter.annotation
  if annotation is parameter.empty:
    annotation = type(parameter.default)
  if typing.get_origin(annotation) in (typing.Union, types.UnionType):
    members = [member for member in typing.get_args(annotation) if member is not type(None)]
    annotation = members[0] if len(members) == 1 else annotation
  if typing.get_origin(annotation) is typing.Literal:
    annotation = type(typing.get_args(annotation)[0])
  if annotation not in (bool, int, float, str):
    raise ValueError(f"option {name} of an objective is annotated {annotation}; want float, int, bool, str or Literal.")
  return annotation


def check_recipe(recipe: Recipe) -> None:
  """Checks the values of the objective's options, and that it accepts the advantages of its recipe.

  Raises:
    ValueError: a value out of range; or scale is "batch_std", whose advantages are [B, T], but the objective takes one
      advantage per row.
  """
  values, mask = (jax.ShapeDtypeStruct((1, 1), dtype) for dtype in (jnp.float32, bool))
  jax.eval_shape(recipe.objective, values, jax.ShapeDtypeStruct((1,), jnp.float32), mask)
  if recipe.scale != "batch_std":
    return
  try:
    jax.eval_shape(recipe.objective, values, values, mask)
  except ValueError as error:
    function = getattr(recipe.objective, "func", recipe.objective)
    name = getattr(function, "__name__", repr(function))
    raise ValueError(f"scale is 'batch_std', whose advantages are [B, T], and {name} refuses them: {error}") from error


def policy_loss(
  log_prob: Array,
  old_log_prob: Array,
  advantage: Array,
  mask: Array,
  *,
  objective: Objective = gmpo,
  aggregation: str = DEFAULT_AGGREGATION,
  norm_length: int | None = None,
  log_shift: Array | None = None,
  **options,
) -> Array:
  """The loss of one whole minibatch on plain arrays: minus the mean objective. `gmpo` with a log_shift is RSPO.

  Args:
    log_prob, old_log_prob: [B, T] nats, of the tokens under the trained and the sampling policy; gradient flows only
      into the first.
    advantage: [B] (or [B, T] for token-level objectives). mask: [B, T] bool.
    objective: a function of `rspo_jax.objectives.token_level` or `rspo_jax.objectives.sequence_level`.
    options: of the objective (placement, eps_low, eps_high, ...).
    aggregation, norm_length: see `rspo_jax.objectives.aggregation.aggregate`.
    log_shift: [B, T] from `router_log_shift`, or None.
  Returns:
    [] float32; 0 for an empty mask.
  """
  log_ratio = log_prob - jax.lax.stop_gradient(old_log_prob)
  terms = objective(log_ratio, advantage, mask, log_shift=log_shift, **options)
  return -aggregate(terms.objective, mask, aggregation, norm_length=norm_length).mean
