"""`experiments.config` to and from the ConfigDict that flags override; types and unknown keys are checked on the way
in.

A group that may be None (shift, mismatch, curriculum, engine) has one key more than its fields, "on": see
`ExperimentConfig`. Ranges are checked by the dataclasses themselves, what groups must agree on by
`experiments.setup.checks`.
"""

import dataclasses
import functools
import types
import typing
from collections.abc import Mapping
from typing import Any

import ml_collections
from ml_collections.config_dict import placeholder

from experiments.config import ExperimentConfig
from experiments.setup.checks import check_config
from models.config import TransformerConfig
from rspo_jax.lookup import near
from rspo_jax.objectives.table import OBJECTIVES, objective_options
from rspo_jax.rollout.token_sampling import SamplingOptions
from rspo_jax.router.shift import ShiftOptions
from rspo_jax.training.loss import UpdateOptions

# Fields of the library's options that follow from other keys, and so are no keys themselves.
DERIVED = {
  SamplingOptions: {"stop_ids": "config.tokenizer", "record_experts": "config.loss.replay"},
  ShiftOptions: {"floor_begin": "config.warm_start.steps"},
  UpdateOptions: {
    "objective": "config.objective",
    "shift": "config.shift",
    "mismatch": "config.mismatch",
    "frozen": "config.optimizer.frozen",
  },
}

# Keys of earlier versions -> today's.
RENAMED = {
  "rl.steps": "steps",
  "rl.optimizer": "optimizer",
  "rl.frozen": "optimizer.frozen",
  "rl.samples_per_prompt": "sampling.samples_per_prompt",
  "rl.microbatches": "loss.microbatches",
  "rl.logits_chunk": "loss.logits_chunk",
  **{
    f"rl.{name}": f"collector.{name}"
    for name in (
      "prompts",
      "dynamic_sampling_rounds",
      "oversampling",
      "carry_over",
      "overlong_buffer",
      "overlong_penalty",
    )
  },
  **{
    f"objective.{name}": f"objective.options.{name}"
    for name in ("eps_low", "eps_high", "dual_clip", "tau_pos", "tau_neg", "bounds", "ratio", "length_epsilon")
  },
  **{
    f"objective.{name}": f"loss.{name}"
    for name in ("aggregation", "norm_length", "kl_coefficient", "kl_estimator", "entropy_coefficient")
  },
  "objective.baseline": "advantage.baseline",
  "objective.scale": "advantage.scale",
  "objective.ddof": "advantage.ddof",
  "objective.std_epsilon": "advantage.epsilon",
  "objective.kl_in": "loss.kl_coefficient (of the loss) or config.rl.reward_kl_coefficient (of the reward)",
  "router.shift": "shift.on",
  "router.shift_floor": "shift.floor",
  "router.shift_floor_start": "shift.floor_start",
  "router.shift_floor_updates": "shift.floor_updates",
  **{f"router.{name}": f"shift.{name}" for name in ("placement", "deviation", "layers", "level")},
  "router.replay": "loss.replay",
  "router.replay_gates": "loss.replay_gates",
  "router.freeze": "optimizer.freeze_router",
  "router.learning_rate_multiplier": "optimizer.router_multiplier",
  "router.load_balance": "loss.load_balance_coefficient",
  "router.z_loss": "loss.router_z_coefficient",
  "router.bias_rate": "loss.router_bias_rate",
  "sampling.engine": "engine.urls",
  **{f"sampling.engine_{name}": f"engine.{name}" for name in ("kind", "folder", "model", "timeout")},
}


def config_dict(config: ExperimentConfig) -> ml_collections.ConfigDict:
  """The dataclasses as a ConfigDict, so that flags can override every field by its dotted name."""
  filled = _fill(ExperimentConfig, config)
  filled["objective"]["options"] = _all_objective_options() | filled["objective"]["options"]
  return ml_collections.ConfigDict(filled)


def read_config(given: ml_collections.ConfigDict) -> ExperimentConfig:
  """The ConfigDict as checked dataclasses.

  Raises:
    ValueError: an unknown key, a wrong type or an impossible value; names the key and the cure.
  """
  plain = given.to_dict()
  options = plain.get("objective", {}).get("options", {}) if isinstance(plain.get("objective"), dict) else {}
  for name in [name for name, value in options.items() if value is None]:  # placeholders that no flag has set
    del options[name]
  config = _build(ExperimentConfig, plain, "config")
  check_config(config)
  return config


def read_model_config(given: Mapping[str, Any]) -> TransformerConfig:
  """A model's configuration from JSON; ValueError names an unknown key or a wrong type."""
  return _build(TransformerConfig, given, "model")


def renamed_key(old: str) -> str:
  """Today's name of a key of an earlier version, without "config."; '' if it never was a key."""
  if old in RENAMED:
    return RENAMED[old]
  group, dot, name = old.rpartition(".")
  return f"{renamed_key(group)}.{name}" if dot and renamed_key(group) else ""


def unknown_key(key: str, value: Any, group: str, known: typing.Iterable[str]) -> str:
  """The message for a key that does not exist in a group such as "config.rl"."""
  dotted = f"{group}.{key}".removeprefix("config.")
  # Of a whole group that is gone, its first key.
  for old in [dotted, *(f"{dotted}.{name}" for name in (value if isinstance(value, Mapping) else ()))]:
    if new := renamed_key(old):
      return f"config.{old} is now config.{new}."
  return f"{group}.{key} is unknown; {near(key, known).replace('did you mean ', f'did you mean {group}.')}"


def plain_config(config: Any) -> Any:
  """A config (or a part of one) as plain values for JSON; `read_config` of them gives the same config."""
  if dataclasses.is_dataclass(config):
    return {name: plain_config(getattr(config, name)) for name in _types(type(config))}
  if isinstance(config, Mapping):
    return {key: plain_config(item) for key, item in config.items()}
  return config


@functools.cache
def _types(kind: type) -> dict[str, Any]:
  """Types of the fields of a dataclass that are keys of the config."""
  hints = typing.get_type_hints(kind)
  hidden = DERIVED.get(kind, {})
  return {field.name: hints[field.name] for field in dataclasses.fields(kind) if field.name not in hidden}


def _optional(kind: Any) -> Any:
  """`float` of `float | None`; any other type unchanged."""
  members = (
    typing.get_args(kind) if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union else ()
  )
  inner = [member for member in members if member is not types.NoneType]
  return inner[0] if len(inner) < len(members) else kind


def _fill(kind: type, node: Any) -> dict[str, Any]:
  """The fields of a dataclass as plain values; a node of None gives placeholders for all of them."""
  filled = {}
  for name, declared in _types(kind).items():
    value, inner = None if node is None else getattr(node, name), _optional(declared)
    if inner is TransformerConfig and value is None:
      filled[name] = None  # a policy of the user's own
    elif dataclasses.is_dataclass(inner):
      group = _fill(inner, value)
      if inner is not declared and inner is not TransformerConfig:
        group = {"on": True, **group} if value is not None else {"on": placeholder(bool), **group}
      filled[name] = group
    elif isinstance(value, Mapping):
      filled[name] = {
        key: _fill(type(item), item) if dataclasses.is_dataclass(item) else item for key, item in value.items()
      }
    else:
      # A flag can give a placeholder a value of its type.
      filled[name] = placeholder(typing.get_origin(inner) or inner) if value is None else value
  return filled


def _all_objective_options() -> dict[str, Any]:
  """A placeholder for every option of every objective, so that each is a flag."""
  every: dict[str, type] = {}
  for recipe in OBJECTIVES.values():
    every |= objective_options(recipe.objective)
  return {name: placeholder(kind) for name, kind in every.items()}


def _build(kind: type, values: Any, where: str) -> Any:
  if not isinstance(values, Mapping):
    raise ValueError(f"{where} is {values!r}; want a group of settings.")
  fields = _types(kind)
  for key in values:
    if source := DERIVED.get(kind, {}).get(key):
      raise ValueError(f"{where}.{key} follows from {source}; set that instead.")
    if key not in fields:
      raise ValueError(unknown_key(key, values[key], where, fields))
  declared = {field.name: field for field in dataclasses.fields(kind)}
  missing = [
    name
    for name in fields
    if name not in values and declared[name].default is declared[name].default_factory is dataclasses.MISSING
  ]
  if missing:
    raise ValueError(f"{where} lacks {', '.join(missing)}.")
  given = {key: _convert(fields[key], value, f"{where}.{key}") for key, value in values.items()}
  try:
    return kind(**given)
  except ValueError as error:
    # Dataclasses name the field; the config adds the group.
    dot = "." if str(error).split(" ", 1)[0] in declared else ": "
    raise ValueError(f"{where}{dot}{error}") from error


def _build_optional(kind: type, values: Any, where: str) -> Any:
  """A group that may be None, by its key "on"; without it, a group that has anything set."""
  if values is None:
    return None
  if not isinstance(values, Mapping):
    raise ValueError(f"{where} is {values!r}; want a group of settings. Switch it with {where}.on=true or false.")
  on = values.get("on")
  if on is not None and not isinstance(on, bool):
    raise ValueError(f"{where}.on is {on!r}; want true or false.")
  rest = {key: value for key, value in values.items() if key != "on"}
  is_set = {key: value for key, value in rest.items() if value is not None}
  if on is False or (on is None and not is_set):
    return None
  return _build(kind, is_set, where)


def _convert(kind: Any, value: Any, where: str) -> Any:
  inner = _optional(kind)
  if dataclasses.is_dataclass(inner):
    return _build(inner, value, where) if inner is kind else _build_optional(inner, value, where)
  if inner is not kind and value is None:
    return None
  origin = typing.get_origin(inner) or inner
  if inner is float and type(value) is int:
    return float(value)
  if origin is tuple and isinstance(value, list | tuple):
    return tuple(_convert(typing.get_args(inner)[0], item, where) for item in value)
  if origin is Mapping and isinstance(value, Mapping):
    of_items = typing.get_args(inner)[1]
    if dataclasses.is_dataclass(of_items):
      return {key: _convert(of_items, item, f"{where}.{key}") for key, item in value.items()}
    return value
  if not isinstance(origin, type) or not isinstance(value, origin) or (origin is int and isinstance(value, bool)):
    name = getattr(inner, "__name__", str(inner))
    raise ValueError(f"{where} is {value!r} ({type(value).__name__}); want {name}.")
  return value
