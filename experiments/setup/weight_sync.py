"""The outside engine of a config, and the folder through which it gets the weights it is to draw with."""

import functools
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import jax

from experiments.config import ExperimentConfig
from models import lora
from models.huggingface.checkpoint import save_pretrained
from rspo_jax.files import read_json
from rspo_jax.rollout.remote_engine import Client, RemoteEngine, update_sglang, update_vllm, when_changed
from rspo_jax.rollout.sampling import SamplingOptions
from rspo_jax.types import Params, Policy

UPDATES = {"sglang": update_sglang, "vllm": update_vllm}


def remote_engine(config: ExperimentConfig, policy: Policy) -> Callable[[SamplingOptions], RemoteEngine]:
  """The engine of `config.sampling`, for any options; all share one record of what was published last.

  Raises:
    ValueError: several processes, which would all ask for all completions and get different ones.
  """
  if jax.process_count() > 1:
    raise ValueError(
      f"config.sampling.engine is {config.sampling.engine!r} on {jax.process_count()} processes; an outside engine "
      "works with one process only. Let it be '' on several hosts."
    )
  sampling, model = config.sampling, config.model
  urls = [url.strip().rstrip("/") for url in sampling.engine.split(",")]
  update = functools.partial(UPDATES[sampling.engine_kind], client=Client(timeout=sampling.engine_timeout))

  def publish(params: Params) -> None:
    update(urls, str(write_weights(config, params)))

  return functools.partial(
    RemoteEngine,
    policy,
    urls=urls,
    model=sampling.engine_model,
    moe_layers=[layer for layer in range(model.num_hidden_layers) if model.is_moe_layer(layer)],
    num_layers=model.num_hidden_layers,
    publish=when_changed(publish),
    timeout=sampling.engine_timeout,
  )


def write_weights(config: ExperimentConfig, params: Params) -> Path:
  """Writes the parameters, adapters merged, into `config.sampling.engine_folder`, over those of the step before.

  File by file, each whole or not at all: nobody reads them until the engine is told to. The tokenizer and the other
  small files of the model that the run began with come along.

  Raises:
    ValueError: the folder is the one that the run began with.
  """
  folder, source = Path(config.sampling.engine_folder).absolute(), _small_files(config)
  if source is not None and folder.resolve() == source.resolve():
    raise ValueError(
      f"config.sampling.engine_folder is {folder}, the folder that the model comes from, which would be overwritten; "
      "name another."
    )
  folder.mkdir(parents=True, exist_ok=True)
  new = folder / ".new"
  shutil.rmtree(new, ignore_errors=True)  # of a run that was stopped here
  save_pretrained(new, *lora.merge_lora(config.model, params), source=source)
  for path in new.iterdir():
    if path.is_file():
      os.replace(path, folder / path.name)
  shutil.rmtree(new)
  return folder


def _small_files(config: ExperimentConfig) -> Path | None:
  """The first Hugging Face folder that the run's model or tokenizer comes from."""
  for name in (config.pretrained, config.tokenizer):
    settings = Path(name) / "config.json"
    if name and settings.is_file() and "model_type" in read_json(settings):
      return Path(name)
  return None
