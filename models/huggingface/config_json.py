"""`config.json` of Hugging Face to our configuration and back, for the families of `models.huggingface.families`."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from models.config import RopeScaling, TransformerConfig
from models.huggingface.families import FAMILIES, either


def config_from_hf(hf: Mapping[str, Any], **ours: Any) -> TransformerConfig:
  """A parsed `config.json` as our configuration.

  Both spellings are read: the public one (`num_experts`, `rope_theta`, `torch_dtype`) and the one transformers 5 writes
  (`num_local_experts`, `rope_parameters`, `dtype`). What is left out has transformers' default.

  Args:
    ours: fields of `TransformerConfig` to set instead of what the file says, for instance dtype or remat.
  Raises:
    ValueError: another model family, or a setting that this model does not have; all of them named.
  """
  model_type = hf.get("model_type")
  if model_type not in FAMILIES:
    raise ValueError(f"model_type is {model_type!r}; the families that can be read are {', '.join(sorted(FAMILIES))}.")
  family, problems = FAMILIES[model_type], []
  for key, values in (("hidden_act", ("silu", None)), ("attention_dropout", (0, None)), *family.only):
    if hf.get(key) not in values:
      problems.append(f"{key} is {hf[key]!r}, supported: {values[0]!r}")
  fields: dict[str, Any] = {"model_type": model_type, **family.fixed}
  for name, (key, default) in family.keys.items():
    fields[name] = default if hf.get(key) is None else hf[key]
  fields["tie_word_embeddings"] = bool(hf.get("tie_word_embeddings"))
  family.read(hf, fields, problems)
  _read_rope(hf, fields, problems)

  dtype = str(either(hf, "dtype", "torch_dtype", "float32", problems)).removeprefix("torch.")
  # A float16 checkpoint loads (parameters become float32), but to compute in its range is no option.
  fields["dtype"] = "float32" if dtype == "float16" else dtype
  raise_problems("this configuration cannot be run", problems, "Use a checkpoint without these settings.")
  return TransformerConfig(**{**fields, **ours})


def config_to_hf(config: TransformerConfig) -> dict[str, Any]:
  """Our configuration as a `config.json` in the public spelling.

  Raises:
    ValueError: a configuration that its `model_type` cannot express; names the fields.
  """
  family = FAMILIES[config.model_type]
  hf = {"architectures": [family.architecture], "model_type": config.model_type, "hidden_act": "silu"}
  hf |= {key: getattr(config, name) for name, (key, _) in family.keys.items()}
  hf |= {"tie_word_embeddings": config.tie_word_embeddings, "torch_dtype": config.dtype}
  hf |= {"rope_theta": config.rope_theta, "rope_scaling": _write_rope(config.rope_scaling)}
  hf |= family.write(config)
  ours = {name: getattr(config, name) for name in ("cache_dtype", "remat", "scan_layers", "expert_backend")}
  back = config_from_hf(hf, **ours)
  lost = [
    f"{field.name} is {getattr(config, field.name)!r}, {config.model_type} would read {getattr(back, field.name)!r}"
    for field in dataclasses.fields(config)
    if getattr(config, field.name) != getattr(back, field.name)
  ]
  raise_problems(f"{config.model_type} checkpoints cannot say this", lost, "Change these fields, or model_type.")
  return hf


def raise_problems(what: str, problems: Sequence[str], cure: str, shown: int = 20) -> None:
  """ValueError with every problem on a line of its own, if there are any."""
  if problems:
    more = [f"... and {len(problems) - shown} more"] if len(problems) > shown else []
    raise ValueError("\n  ".join([f"{what}:", *problems[:shown], *more, cure]))


_SCALING_KEYS = tuple(field.name for field in dataclasses.fields(RopeScaling) if field.name != "rope_type")


def _read_rope(hf: Mapping[str, Any], fields: dict[str, Any], problems: list[str]) -> None:
  rope = {**(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}
  fields["rope_theta"] = float(rope.pop("rope_theta", None) or hf.get("rope_theta") or fields.get("rope_theta", 1e4))
  kind = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
  rope.pop("type", None)
  if rope.pop("partial_rotary_factor", 1) != 1:
    problems.append("partial_rotary_factor is not 1, supported: rotary positions over the whole head")
  if kind not in ("default", "linear", "yarn"):
    problems.append(f"rotary positions of rope_type {kind!r}, supported: 'default', 'linear', 'yarn'")
    return
  unknown = sorted(key for key in rope if key not in _SCALING_KEYS and rope[key] is not None)
  if kind == "default":
    fields["rope_scaling"] = RopeScaling()
  elif unknown:
    problems.append(f"rotary positions with {', '.join(unknown)}, supported: {', '.join(_SCALING_KEYS)}")
  else:
    if kind == "yarn" and not rope.get("original_max_position_embeddings"):
      # transformers' standard reading of a checkpoint that says nothing: the context it was trained with.
      rope["original_max_position_embeddings"] = hf.get("max_position_embeddings") or 0
    given = {key: value for key, value in rope.items() if value is not None}
    fields["rope_scaling"] = RopeScaling(kind, **given)


def _write_rope(scaling: RopeScaling) -> dict[str, Any] | None:
  if scaling.rope_type == "default":
    return None
  given = {key: value for key, value in dataclasses.asdict(scaling).items() if value is not None}
  return given | {"type": scaling.rope_type}
