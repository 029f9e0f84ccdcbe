"""Models in folders: a Hugging Face folder ("hf"), an Orbax folder of `experiments.convert` ("orbax"), or a run's
workdir ("run")."""

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from experiments.setup.build import INIT, Components, make_policy, optimizers
from experiments.setup.config_flags import read_config, read_model_config
from models import lora
from models.config import TransformerConfig
from models.huggingface import checkpoint
from models.huggingface.checkpoint import load_pretrained, source_dtype
from models.huggingface.config_json import raise_problems
from models.policy import build_policy
from rspo_jax import mesh
from rspo_jax.files import read_json
from rspo_jax.run import host_state
from rspo_jax.run.checkpoint import Checkpoints
from rspo_jax.run.host_state import unbundle
from rspo_jax.run.workdir import dump_json_atomic
from rspo_jax.training.state import abstract_state, init_state, restart_optimizer
from rspo_jax.types import Layout, Params, TrainState

# Fields of a model's configuration that change how it is computed or trained, but not its weights.
FREE_FIELDS = ("dtype", "cache_dtype", "remat", "scan_layers", "expert_backend", "lora")


class Model(NamedTuple):
  """A configuration and parameters for it."""

  config: TransformerConfig
  params: Params


def kind_of(folder: str | Path) -> str:
  """The kind of a folder: "hf", "orbax" or "run".

  Raises:
    ValueError: it is none of them.
  """
  folder = Path(folder)
  settings = read_json(folder / "config.json")
  if "model_type" in settings:
    return "hf"
  if "model" in settings and (folder / "checkpoints").is_dir():
    return "run" if "rl" in settings else "orbax"
  raise ValueError(
    f"{folder / 'config.json'} is neither a model's nor a run's, or {folder} has no checkpoints yet; want a Hugging "
    "Face folder, a folder of experiments.convert, or the workdir of a run that has saved a checkpoint."
  )


def read_model(folder: str | Path, **changes: Any) -> TransformerConfig:
  """The configuration of the model in a folder.

  Args:
    changes: fields of the configuration to replace, for example remat.
  Raises:
    ValueError: not a folder of a model, a model that is not supported, or a run with a policy of the user's own.
  """
  if kind_of(folder) == "hf":
    return checkpoint.read_config(folder, **changes)
  settings = read_json(Path(folder) / "config.json")
  if settings["model"] is None:
    raise ValueError(
      f"{folder} is a run whose policy is {settings['policy']['name']}; commands read only the transformer. Evaluate "
      "such a policy during training (config.evaluation)."
    )
  config = read_model_config(settings["model"])
  return dataclasses.replace(config, **changes)


def read_base(folder: str | Path) -> str:
  """The source of a run's initial parameters (`config.pretrained`); '' if they were random, or it is no run."""
  return read_json(Path(folder) / "config.json").get("pretrained", "")


def saved_dtype(folder: str | Path) -> str:
  """The dtype of the weights in a folder, such as "bfloat16"."""
  kind, settings = kind_of(folder), read_json(Path(folder) / "config.json")
  if kind == "orbax":
    return settings["dtype"]
  return "float32" if kind == "run" else source_dtype(folder) or "float32"


def load_model(
  folder: str | Path,
  layout: Layout | None = None,
  *,
  dtype: str = "float32",
  step: int | None = None,
  progress: Callable[[int], None] = lambda done: None,
) -> Model:
  """Loads the configuration and the parameters of a model.

  Args:
    layout: the mesh that parameters are placed on; None is the default device.
    dtype: of the parameters of a Hugging Face folder. Other folders are loaded in the dtype they were saved in.
    step: of a run's checkpoints, as `find_step` returns it; None is the newest that can be read.
    progress: called with the number of bytes loaded since the last call.
  Raises:
    ValueError: a file or checkpoint is missing or cannot be read; names it and the cure.
  """
  kind = kind_of(folder)
  if kind == "hf":
    return Model(*load_pretrained(folder, layout, dtype=dtype, progress=progress))
  layout = layout or mesh.make_layout({"data": 1}, jax.devices()[:1])
  config = read_model(folder)
  with Checkpoints(folder, read_only=True) as checkpoints:
    if kind == "run":
      states = _states_of_run(folder, layout)
      restored = checkpoints.restore(states) if step is None else checkpoints.restore_step(step, states)
      params = None if restored is None else unbundle(restored.state, restored.meta)[0].params
    else:
      restored = checkpoints.restore(_converted_params(config, layout))
      params = None if restored is None else restored.state
  if restored is None:
    raise ValueError(f"{folder} has no complete checkpoint; name a folder that has one.")
  progress(sum(leaf.nbytes for leaf in jax.tree.leaves(params)))
  return Model(config, params)


def find_step(folder: str | Path, name: str) -> int | None:
  """The step of a run's checkpoint; None for a folder that is not a run.

  Args:
    name: "newest", "best" (largest held-out success) or a number, from the flag --step.
  Raises:
    ValueError: there is no such checkpoint; lists the existing ones.
  """
  if kind_of(folder) != "run":
    if name != "newest":
      raise ValueError(f"--step is {name}, but {folder} is no run and has no steps; leave --step out.")
    return None
  with Checkpoints(folder, read_only=True) as checkpoints:
    steps, best, newest = checkpoints.steps(), checkpoints.best_step(), checkpoints.latest_step()
  by_name = {"best": best, "newest": newest} | {str(step): step for step in steps}
  if by_name.get(name) is None:
    raise ValueError(
      f"--step is {name}, but {folder} has no such checkpoint; want newest, best (there is "
      f"{'one' if best is not None else 'none: no checkpoint was evaluated'}) or one of {', '.join(map(str, steps))}."
    )
  return by_name[name]


def check_same_model(
  folder: str | Path, stored: TransformerConfig, config: TransformerConfig, fields: Iterable[str], cure: str
) -> None:
  """Checks that `config.model` is the model in a folder.

  Args:
    stored: its configuration. config: `config.model`.
    fields: names of the fields to compare; those in `FREE_FIELDS` may differ.
    cure: last line of the message.
  Raises:
    ValueError: lists the fields that differ.
  """
  differing = [
    f"config.model.{name} is {getattr(config, name)!r}, there {getattr(stored, name)!r}"
    for name in fields
    if name not in FREE_FIELDS and getattr(config, name) != getattr(stored, name)
  ]
  raise_problems(f"{folder} is another model than config.model", differing, cure)


def initial_state(components: Components, optimizer: optax.GradientTransformation) -> TrainState:
  """The initial train state: parameters of `config.pretrained`, or random ones; new adapters if the config has some.

  Raises:
    ValueError: the pretrained model is not that of `config.model`; lists the fields that differ.
  """
  config, layout = components.config, components.layout
  if not config.pretrained:
    return init_state(components.policy, optimizer, config.seed, layout)
  if config.model is None:
    raise ValueError(
      f"config.pretrained is {config.pretrained!r}, but config.policy.name is {config.policy.name!r}: only our own "
      "models are read from folders. Load the parameters in your policy's init, and set config.pretrained to ''."
    )
  stored = read_model(config.pretrained)
  fields = [field.name for field in dataclasses.fields(stored)]
  check_same_model(config.pretrained, stored, config.model, fields, "Use configs/pretrained.py with it.")
  # Training keeps parameters in float32.
  params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), load_model(config.pretrained, layout).params)
  if config.model.lora.rank and not stored.lora.rank:
    params = lora.add_lora(config.model, params, components.key(INIT))
    params = jax.device_put(params, mesh.param_shardings(components.policy, layout))
  step = jax.device_put(np.zeros((), np.int32), layout.sharding())
  return restart_optimizer(TrainState(params, None, step), components.policy, optimizer, layout)


def save_orbax(folder: str | Path, model: Model) -> None:
  """Writes a model as an Orbax folder, which `load_model` reads.

  Raises:
    ValueError: the folder is not empty.
  """
  folder = Path(folder)
  if folder.exists() and any(folder.iterdir()):
    raise ValueError(f"{folder} is not empty; name a new folder.")
  with Checkpoints(folder) as checkpoints:
    dtypes = [str(leaf.dtype) for leaf in jax.tree.leaves(model.params)]
    checkpoints.save(0, model.params, {"phase": "converted", "dtypes": dtypes})
    checkpoints.wait()
  if jax.process_index() == 0:
    dtype = str(model.params["embedding"].dtype)
    dump_json_atomic(folder / "config.json", {"model": dataclasses.asdict(model.config), "dtype": dtype})


def _converted_params(config: TransformerConfig, layout: Layout) -> Callable[[dict[str, Any]], Params]:
  """A function from the meta of a checkpoint of `save_orbax` to its abstract parameters."""
  policy = build_policy(config)
  shapes, tree = jax.tree.flatten(jax.eval_shape(policy.init, jax.random.key(0)))
  shardings = jax.tree.leaves(mesh.param_shardings(policy, layout))

  def abstract(meta: dict[str, Any]) -> Params:
    leaves = [
      jax.ShapeDtypeStruct(shape.shape, jnp.dtype(dtype), sharding=sharding)
      for shape, dtype, sharding in zip(shapes, meta["dtypes"], shardings, strict=True)
    ]
    return jax.tree.unflatten(tree, leaves)

  return abstract


def _states_of_run(folder: str | Path, layout: Layout) -> Callable[[dict[str, Any]], Any]:
  """A function from the meta of a run's checkpoint to its abstract state, which differs between phases."""
  config = read_config(ml_collections.ConfigDict(read_json(Path(folder) / "config.json")))
  policy, by_phase = make_policy(config, layout), optimizers(config)

  def abstract(meta: dict[str, Any]) -> Any:
    return host_state.abstract_bundle(abstract_state(policy, by_phase[meta["phase"]][0], layout), meta, layout)

  return abstract
