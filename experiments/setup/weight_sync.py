"""The remote engine of a config, and the folder through which it gets new weights."""

import functools
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import jax

from experiments.config import ExperimentConfig
from models.huggingface.checkpoint import save_pretrained
from models.layers.weights import merge_lora
from rspo_jax.files import read_json
from rspo_jax.rollout.remote_engine import Client, RemoteEngine, update_sglang, update_vllm, when_changed
from rspo_jax.rollout.token_sampling import SamplingOptions
from rspo_jax.types import Params, Policy

UPDATES = {"sglang": update_sglang, "vllm": update_vllm}


def remote_engine(config: ExperimentConfig, policy: Policy) -> Callable[[SamplingOptions], RemoteEngine]:
  """Makes the engine of `config.engine` for any options; all of them share one record of the last weight sync.

  Raises:
    ValueError: several processes, each of which would request all completions and get different ones; or a policy that
      is not ours, whose weights have no public names.
  """
  engine, model = config.engine, config.model
  if jax.process_count() > 1:
    raise ValueError(
      f"config.engine.urls is {engine.urls!r} on {jax.process_count()} processes; a remote engine works with one "
      "process only. Set config.engine.on=false on several hosts."
    )
  if config.policy.name != "transformer":
    raise ValueError(
      f"config.engine is set, but config.policy.name is {config.policy.name!r}, whose weights no engine can read. Set "
      "config.engine.on=false."
    )
  urls = [url.strip().rstrip("/") for url in engine.urls.split(",")]
  update = functools.partial(UPDATES[engine.kind], client=Client(timeout=engine.timeout))

  def sync_weights(params: Params) -> None:
    update(urls, str(write_weights(config, params)))

  return functools.partial(
    RemoteEngine,
    policy,
    urls=urls,
    model=engine.model,
    moe_layers=[layer for layer in range(model.num_hidden_layers) if model.is_moe_layer(layer)],
    num_layers=model.num_hidden_layers,
    sync_weights=when_changed(sync_weights),
    timeout=engine.timeout,
  )


def write_weights(config: ExperimentConfig, params: Params) -> Path:
  """Writes the parameters, adapters merged, into `config.engine.folder`, over those of the step before.

  File by file, each whole or not at all; the engine reads them only when it is told to. The tokenizer and the other
  small files of the initial model are copied along.

  Raises:
    ValueError: the folder is that of the initial model.
  """
  folder, source = Path(config.engine.folder).absolute(), _small_files(config)
  if source is not None and folder.resolve() == source.resolve():
    raise ValueError(
      f"config.engine.folder is {folder}, the folder that the model comes from, which would be overwritten; name "
      "another."
    )
  folder.mkdir(parents=True, exist_ok=True)
  new = folder / ".new"
  shutil.rmtree(new, ignore_errors=True)  # of a run that was killed here
  save_pretrained(new, *merge_lora(config.model, params), source=source)
  for path in new.iterdir():
    if path.is_file():
      os.replace(path, folder / path.name)
  shutil.rmtree(new)
  return folder


def _small_files(config: ExperimentConfig) -> Path | None:
  """The first Hugging Face folder among those of the run's model and tokenizer."""
  for name in (config.pretrained, config.tokenizer):
    settings = Path(name) / "config.json"
    if name and settings.is_file() and "model_type" in read_json(settings):
      return Path(name)
  return None
