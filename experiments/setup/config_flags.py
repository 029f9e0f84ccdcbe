"""Conversion between `ExperimentConfig` and the ConfigDict whose fields are flags.

Reading a ConfigDict checks keys and types here, ranges in the dataclasses, and agreement between groups in
`experiments.setup.checks`. A group that may be None (shift, mismatch, curriculum, engine) has the key "on" besides its
fields, see `ExperimentConfig`.
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
from experiments.setup.renamed_keys import renamed_key
from models.config import TransformerConfig
from rspo_jax.lookup import near
from rspo_jax.objectives.table import OBJECTIVES, objective_options
from rspo_jax.rollout.token_sampling import SamplingOptions
from rspo_jax.router.shift import ShiftOptions
from rspo_jax.training.loss import UpdateOptions

# Fields of the library's options that are not keys, because other keys decide them.
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


def config_dict(config: ExperimentConfig) -> ml_collections.ConfigDict:
  """The config as a ConfigDict, in which flags can override every field by its dotted name.

  Fields that are None are placeholders, which accept a value of their type.
  """
  filled = _fill(ExperimentConfig, config)
  filled["objective"]["options"] = _all_objective_options() | filled["objective"]["options"]
  return ml_collections.ConfigDict(filled)


def read_config(settings: ml_collections.ConfigDict) -> ExperimentConfig:
  """The ConfigDict as dataclasses, checked.

  Raises:
    ValueError: an unknown or missing key, a value of another type or out of range, or groups that contradict each
      other; names the key and the cure.
  """
  plain = settings.to_dict()
  options = plain.get("objective", {}).get("options", {}) if isinstance(plain.get("objective"), dict) else {}
  for name in [name for name, value in options.items() if value is None]:  # placeholders without a value
    del options[name]
  config = _build(ExperimentConfig, plain, "config")
  check_config(config)
  return config


def read_model_config(settings: Mapping[str, Any]) -> TransformerConfig:
  """A model's configuration from plain values, as `plain_config` writes them.

  Raises:
    ValueError: an unknown or missing key, or a value of another type or out of range; names the key.
  """
  return _build(TransformerConfig, settings, "model")


def unknown_key(key: str, value: Any, group: str, known: typing.Iterable[str]) -> str:
  """The message for a key that does not exist in a group such as "config.rl".

  Args:
    value: of the key. If it is a group of an earlier version, the message names the current key of its first key.
    known: the keys of the group.
  """
  dotted = f"{group}.{key}".removeprefix("config.")
  for old in (dotted, *(f"{dotted}.{name}" for name in (value if isinstance(value, Mapping) else ()))):
    if new := renamed_key(old):
      return f"config.{old} is now config.{new}."
  return f"{group}.{key} is unknown; {near(key, known).replace('did you mean ', f'did you mean {group}.')}"


def plain_config(config: Any) -> Any:
  """A config, or a group of one, as plain values for JSON, from which `read_config` gives an equal config."""
  if dataclasses.is_dataclass(config):
    return {name: plain_config(getattr(config, name)) for name in _types(type(config))}
  if isinstance(config, Mapping):
    return {key: plain_config(item) for key, item in config.items()}
  return config


@functools.cache
def _types(kind: type) -> dict[str, Any]:
  """Key -> type, for the fields of a dataclass that are keys of the config."""
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
  """The fields of a dataclass as plain values; if the node is None, placeholders for all of them."""
  filled = {}
  for name, declared in _types(kind).items():
    value, inner = None if node is None else getattr(node, name), _optional(declared)
    if inner is TransformerConfig and value is None:
      filled[name] = None  # no flags for the fields of a model that is not used
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
      filled[name] = placeholder(typing.get_origin(inner) or inner) if value is None else value
  return filled


def _all_objective_options() -> dict[str, Any]:
  """A placeholder for every option of every objective, so that each is a flag."""
  every: dict[str, type] = {}
  for recipe in OBJECTIVES.values():
    every |= objective_options(recipe.objective)
  return {name: placeholder(kind) for name, kind in every.items()}


def _build(kind: type, values: Any, where: str) -> Any:
  """A dataclass from a group of values; where: its key, for messages."""
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
    raise ValueError(f"{where} lacks {', '.join(missing)}; these keys have no default.")
  converted = {key: _convert(fields[key], value, f"{where}.{key}") for key, value in values.items()}
  try:
    return kind(**converted)
  except ValueError as error:
    # The message of a dataclass starts with the field, or is about several.
    dot = "." if str(error).split(" ", 1)[0] in declared else ": "
    raise ValueError(f"{where}{dot}{error}") from error


def _build_optional(kind: type, values: Any, where: str) -> Any:
  """A group that may be None: its key "on" decides, or if that is not set, whether any other key is set."""
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
  """A value as the declared type: groups become dataclasses, lists tuples, whole numbers floats where one is wanted."""
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
    item_type = typing.get_args(inner)[1]
    if dataclasses.is_dataclass(item_type):
      return {key: _convert(item_type, item, f"{where}.{key}") for key, item in value.items()}
    return value
  if not isinstance(origin, type) or not isinstance(value, origin) or (origin is int and isinstance(value, bool)):
    name = getattr(inner, "__name__", str(inner))
    raise ValueError(f"{where} is {value!r} ({type(value).__name__}); want {name}.")
  return value
