"""Where a model comes from: a Hugging Face folder, a folder that `experiments.convert` made, or a run's workdir."""

import dataclasses
from collections.abc import Callable
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

# Fields of a model's configuration that change how it runs or is trained, not what its weights are.
FREE_FIELDS = ("dtype", "cache_dtype", "remat", "scan_layers", "expert_backend", "lora")


class Model(NamedTuple):
  config: TransformerConfig
  params: Params


def kind_of(folder: str | Path) -> str:
  """ "hf", "orbax" or "run"; ValueError for a folder that is none of them."""
  folder = Path(folder)
  settings = read_json(folder / "config.json")
  if "model_type" in settings:
    return "hf"
  if "model" in settings and (folder / "checkpoints").is_dir():
    return "run" if "rl" in settings else "orbax"
  raise ValueError(f"{folder / 'config.json'} is neither a model's nor a run's, or {folder} has no checkpoints yet.")


def read_model(folder: str | Path, **ours: Any) -> TransformerConfig:
  """The configuration alone. ours: fields of it to set."""
  if kind_of(folder) == "hf":
    return checkpoint.read_config(folder, **ours)
  settings = read_json(Path(folder) / "config.json")
  if settings["model"] is None:
    raise ValueError(
      f"{folder} is a run whose policy is {settings['policy']['name']}; commands read models of ours only. Such a "
      "policy is evaluated during training (config.evaluation)."
    )
  config = read_model_config(settings["model"])
  return dataclasses.replace(config, **ours)


def read_base(folder: str | Path) -> str:
  """The folder that a run's parameters came from; '' if they were drawn at random, or it is no run."""
  return read_json(Path(folder) / "config.json").get("pretrained", "")


def saved_dtype(folder: str | Path) -> str:
  """The type its weights are kept in."""
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
  """Configuration and parameters, placed on the mesh (None: the default device).

  Args:
    dtype: of the parameters, from a Hugging Face folder; elsewhere they are of the type they were saved in.
    step: of a run's checkpoints, as `find_step` gives; None is the newest that can be read.
    progress: told the bytes of every array in place (Hugging Face folders; of all at once elsewhere).
  Raises:
    ValueError: names the file at fault and the cure.
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
    raise ValueError(f"{folder} holds no complete checkpoint.")
  progress(sum(leaf.nbytes for leaf in jax.tree.leaves(params)))
  return Model(config, params)


def find_step(folder: str | Path, wanted: str) -> int | None:
  """The step of a run's checkpoint that is wanted; None for a folder that is no run.

  Args:
    wanted: "newest", "best" (by held-out success) or a number.
  Raises:
    ValueError: there is no such checkpoint; says which there are.
  """
  if kind_of(folder) != "run":
    if wanted != "newest":
      raise ValueError(f"--step is {wanted}, but {folder} is no run and has no steps; leave --step out.")
    return None
  with Checkpoints(folder, read_only=True) as checkpoints:
    there, best, newest = checkpoints.steps(), checkpoints.best_step(), checkpoints.latest_step()
  found = {"best": best, "newest": newest}[wanted] if wanted in ("best", "newest") else None
  if wanted.isdecimal() and int(wanted) in there:
    found = int(wanted)
  if found is None:
    raise ValueError(
      f"--step is {wanted}, and {folder} has no such checkpoint; want newest, best (there is "
      f"{'one' if best is not None else 'none: no checkpoint was evaluated'}) or one of {', '.join(map(str, there))}."
    )
  return found


def initial_state(components: Components, optimizer: optax.GradientTransformation) -> TrainState:
  """The state that a run begins with: `config.pretrained`, with new adapters if asked for, or random parameters.

  Raises:
    ValueError: the pretrained model is not the configured one; names the fields that differ.
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
  differing = [
    f"config.model.{field.name} is {getattr(config.model, field.name)!r}, there {getattr(stored, field.name)!r}"
    for field in dataclasses.fields(stored)
    if field.name not in FREE_FIELDS and getattr(config.model, field.name) != getattr(stored, field.name)
  ]
  raise_problems(
    f"{config.pretrained} is another model than config.model", differing, "Use configs/pretrained.py with it."
  )
  # Parameters are trained in float32, whatever dtype they are stored in.
  params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), load_model(config.pretrained, layout).params)
  if config.model.lora.rank and not stored.lora.rank:
    params = lora.add_lora(config.model, params, components.key(INIT))
    params = jax.device_put(params, mesh.param_shardings(components.policy, layout))
  step = jax.device_put(np.zeros((), np.int32), layout.sharding())
  return restart_optimizer(TrainState(params, None, step), components.policy, optimizer, layout)


def save_orbax(folder: str | Path, model: Model) -> None:
  """Writes a model as an Orbax checkpoint that `load_model` reads."""
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
  """What `save_orbax` kept, by the meta of its checkpoint."""
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
  """What each phase of a run keeps, by the meta of its checkpoint."""
  config = read_config(ml_collections.ConfigDict(read_json(Path(folder) / "config.json")))
  policy, by_phase = make_policy(config, layout), optimizers(config)

  def abstract(meta: dict[str, Any]) -> Any:
    return host_state.abstract_bundle(abstract_state(policy, by_phase[meta["phase"]][0], layout), meta, layout)

  return abstract
