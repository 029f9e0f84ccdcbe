"""Conversion between Hugging Face's `config.json` and `TransformerConfig`, for all families."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from models.config import RopeScaling, TransformerConfig
from models.huggingface.families import FAMILIES
from models.huggingface.family_entries import read_alias


def config_from_hf(hf: Mapping[str, Any], **changes: Any) -> TransformerConfig:
  """Converts the entries of a `config.json`.

  Both spellings are read: the public one (`num_experts`, `rope_theta`, `torch_dtype`) and that of transformers 5
  (`num_local_experts`, `rope_parameters`, `dtype`). Absent entries have the defaults of transformers.

  Args:
    changes: fields of `TransformerConfig` that override the file, for example dtype or remat.
  Raises:
    ValueError: an unknown family, or entries that the model does not support; lists all of them.
  """
  model_type = hf.get("model_type")
  if model_type not in FAMILIES:
    raise ValueError(f"model_type is {model_type!r}; want one of {', '.join(sorted(FAMILIES))}.")
  family, problems = FAMILIES[model_type], []
  for key, values in (("hidden_act", ("silu", None)), ("attention_dropout", (0, None)), *family.supported):
    if hf.get(key) not in values:
      problems.append(f"{key} is {hf[key]!r}, supported: {values[0]!r}")
  fields: dict[str, Any] = {"model_type": model_type, **family.fixed}
  for name, (key, default) in family.keys.items():
    fields[name] = default if hf.get(key) is None else hf[key]
  fields["tie_word_embeddings"] = bool(hf.get("tie_word_embeddings"))
  family.read(hf, fields, problems)
  _read_rope(hf, fields, problems)

  dtype = str(read_alias(hf, "dtype", "torch_dtype", "float32", problems)).removeprefix("torch.")
  # Parameters of float16 checkpoints are float32. Activations are too, because float16 has too small a range.
  fields["dtype"] = "float32" if dtype == "float16" else dtype
  raise_problems("the model does not support these entries", problems, "Use a checkpoint without them.")
  return TransformerConfig(**{**fields, **changes})


def config_to_hf(config: TransformerConfig) -> dict[str, Any]:
  """The entries of a `config.json` for a configuration, in the public spelling.

  Raises:
    ValueError: a configuration that its `model_type` cannot express; lists the fields.
  """
  family = FAMILIES[config.model_type]
  hf = {"architectures": [family.architecture], "model_type": config.model_type, "hidden_act": "silu"}
  hf |= {key: getattr(config, name) for name, (key, _) in family.keys.items()}
  hf |= {"tie_word_embeddings": config.tie_word_embeddings, "torch_dtype": config.dtype}
  hf |= {"rope_theta": config.rope_theta, "rope_scaling": _write_rope(config.rope_scaling)}
  hf |= family.write(config)
  unwritten = {name: getattr(config, name) for name in ("cache_dtype", "remat", "scan_layers", "expert_backend")}
  read_back = config_from_hf(hf, **unwritten)
  problems = [
    f"{field.name} is {getattr(config, field.name)!r}, but would be read as {getattr(read_back, field.name)!r}"
    for field in dataclasses.fields(config)
    if getattr(config, field.name) != getattr(read_back, field.name)
  ]
  raise_problems(f"{config.model_type} cannot express this configuration", problems, "Change them or model_type.")
  return hf


def raise_problems(summary: str, problems: Sequence[str], cure: str, limit: int = 20) -> None:
  """Raises a ValueError that lists the first `limit` problems, one per line, if there are any."""
  if problems:
    more = [f"... and {len(problems) - limit} more"] if len(problems) > limit else []
    raise ValueError("\n  ".join([f"{summary}:", *problems[:limit], *more, cure]))


_SCALING_KEYS = tuple(field.name for field in dataclasses.fields(RopeScaling) if field.name != "rope_type")


def _read_rope(hf: Mapping[str, Any], fields: dict[str, Any], problems: list[str]) -> None:
  rope = {**(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}
  fields["rope_theta"] = float(rope.pop("rope_theta", None) or hf.get("rope_theta") or fields.get("rope_theta", 1e4))
  kind = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
  rope.pop("type", None)
  if rope.pop("partial_rotary_factor", 1) != 1:
    problems.append("partial_rotary_factor is not 1, supported: rotary embeddings of the whole head")
  if kind not in ("default", "linear", "yarn"):
    problems.append(f"rope_type is {kind!r}, supported: 'default', 'linear', 'yarn'")
    return
  unknown = sorted(key for key in rope if key not in _SCALING_KEYS and rope[key] is not None)
  if kind == "default":
    fields["rope_scaling"] = RopeScaling()
  elif unknown:
    problems.append(f"rotary scaling has {', '.join(unknown)}, supported: {', '.join(_SCALING_KEYS)}")
  else:
    if kind == "yarn" and not rope.get("original_max_position_embeddings"):
      # As in transformers, the default is the context length that the checkpoint was trained with.
      rope["original_max_position_embeddings"] = hf.get("max_position_embeddings") or 0
    fields["rope_scaling"] = RopeScaling(kind, **{key: value for key, value in rope.items() if value is not None})


def _write_rope(scaling: RopeScaling) -> dict[str, Any] | None:
  if scaling.rope_type == "default":
    return None
  entries = {key: value for key, value in dataclasses.asdict(scaling).items() if value is not None}
  return entries | {"type": scaling.rope_type}
