"""The remote engine of a run, and the folder through which it gets new weights."""

import dataclasses
import functools
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from models.config import TransformerConfig
from models.huggingface.checkpoint import save_pretrained
from models.layers.weights import merge_lora
from rspo_jax.files import read_json
from rspo_jax.rollout.remote_engine import Client, RemoteEngine, update_sglang, update_vllm, when_changed
from rspo_jax.rollout.token_sampling import SamplingOptions
from rspo_jax.types import Params, Policy

UPDATES = {"sglang": update_sglang, "vllm": update_vllm}


@dataclasses.dataclass(frozen=True)
class EngineConfig:
  """A remote inference engine instead of our own sampler (docs/remote_engine.md).

  Attributes:
    urls: root of the server, several separated by commas. kind: "sglang" or "vllm", how it loads new weights.
    folder: where the weights are written for it, as a Hugging Face folder that it sees under the same path.
    model: the model's name in requests; '' for none. timeout: seconds that a completion may take.
  """

  urls: str = ""
  kind: str = "sglang"
  folder: str = ""
  model: str = ""
  timeout: float = 600.0


def remote_engine(
  engine: EngineConfig, policy: Policy, model: TransformerConfig, sources: Sequence[str]
) -> Callable[[SamplingOptions], RemoteEngine]:
  """Makes the engine for any options; all of them share one record of the last weight sync.

  Args:
    model: what the policy is built from. sources: folders that the initial model or its tokenizer may come from.
  Raises:
    ValueError: several processes, each of which would request all completions and get different ones.
  """
  if jax.process_count() > 1:
    raise ValueError(
      f"config.engine.urls is {engine.urls!r} on {jax.process_count()} processes; a remote engine works with one "
      "process only. Set config.engine.on=false on several hosts."
    )
  urls = [url.strip().rstrip("/") for url in engine.urls.split(",")]
  update = functools.partial(UPDATES[engine.kind], client=Client(timeout=engine.timeout))

  def sync_weights(params: Params) -> None:
    update(urls, str(write_weights(engine.folder, model, params, sources)))

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


def write_weights(folder: str | Path, model: TransformerConfig, params: Params, sources: Sequence[str]) -> Path:
  """Writes the parameters, adapters merged, into a folder, over those of the step before.

  File by file, each whole or not at all; the engine reads them only when it is told to. The tokenizer and the other
  small files are copied from the first of the sources that is a Hugging Face folder.

  Raises:
    ValueError: the folder is that source.
  """
  folder = Path(folder).absolute()
  source = next((Path(name) for name in sources if _is_hugging_face_folder(name)), None)
  if source is not None and folder.resolve() == source.resolve():
    raise ValueError(
      f"config.engine.folder is {folder}, the folder that the model comes from, which would be overwritten; name "
      "another."
    )
  folder.mkdir(parents=True, exist_ok=True)
  new = folder / ".new"
  shutil.rmtree(new, ignore_errors=True)  # of a run that was killed here
  save_pretrained(new, *merge_lora(model, params), source=source)
  for path in new.iterdir():
    if path.is_file():
      os.replace(path, folder / path.name)
  shutil.rmtree(new)
  return folder


def _is_hugging_face_folder(name: str) -> bool:
  settings = Path(name) / "config.json"
  return bool(name) and settings.is_file() and "model_type" in read_json(settings)
