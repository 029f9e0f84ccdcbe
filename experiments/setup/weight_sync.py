"""The remote engine of a run, and its new weights, which pass through a folder."""

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
from rspo_jax.rollout.remote_client import Client
from rspo_jax.rollout.remote_engine import RemoteEngine
from rspo_jax.rollout.remote_weights import update_sglang, update_vllm, when_changed
from rspo_jax.rollout.token_sampling import SamplingOptions
from rspo_jax.types import Params, Policy

UPDATES = {"sglang": update_sglang, "vllm": update_vllm}


@dataclasses.dataclass(frozen=True)
class EngineConfig:
  """A remote inference engine instead of our own sampler (docs/remote_engine.md).

  Attributes:
    urls: root of the server; several are separated by commas.
    kind: a key of `UPDATES`, which selects the requests that make the engine load new weights.
    folder: the Hugging Face folder that weights are written to before every step; the engine sees it under the same
      path.
    model: the model's name in requests; '' sends none.
    timeout: limit for one completion, seconds, > 0.
  Raises:
    ValueError: no url, no folder, or an unknown kind.
  """

  urls: str = ""
  kind: str = "sglang"
  folder: str = ""
  model: str = ""
  timeout: float = 600.0

  def __post_init__(self):
    if not self.urls:
      raise ValueError("urls is ''; name the root of a server, as http://127.0.0.1:8000.")
    if self.kind not in UPDATES:
      raise ValueError(f"kind is {self.kind!r}; want one of {', '.join(UPDATES)}.")
    if not self.folder:
      raise ValueError(
        "folder is ''; name a folder that the engine sees too: its weights are written there before every step."
      )
    if not 0.0 < self.timeout < float("inf"):
      raise ValueError(f"timeout is {self.timeout}; want seconds above 0.")


def remote_engine(
  engine: EngineConfig, policy: Policy, model: TransformerConfig, sources: Sequence[str]
) -> Callable[[SamplingOptions], RemoteEngine]:
  """A function from sampling options to the engine. All its engines share one record of the last weight sync.

  Args:
    model: the configuration of the policy.
    sources: folders of the initial model and its tokenizer, for `write_weights`.
  Raises:
    ValueError: several processes. Each would request all completions, and their completions would differ.
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
  """Writes the parameters, with adapters merged, as a Hugging Face folder; overwrites those of the previous step.

  Each file is replaced atomically. The files do not change together, so the engine must not read them before the
  request to load them.

  Args:
    sources: names of folders; '' and other folders are ignored. The tokenizer and other small files are copied from the
      first that is a Hugging Face folder.
  Returns:
    The folder as an absolute path.
  Raises:
    ValueError: the folder is that source.
  """
  folder = Path(folder).absolute()
  source = next((Path(name) for name in sources if _is_hugging_face_folder(name)), None)
  if source is not None and folder.resolve() == source.resolve():
    raise ValueError(
      f"config.engine.folder is {folder}, the folder that the model comes from, which would be overwritten; name "
      "another folder."
    )
  folder.mkdir(parents=True, exist_ok=True)
  new = folder / ".new"
  shutil.rmtree(new, ignore_errors=True)  # left behind by a run that was killed while writing
  save_pretrained(new, *merge_lora(model, params), source=source)
  for path in new.iterdir():
    if path.is_file():
      os.replace(path, folder / path.name)
  shutil.rmtree(new)
  return folder


def _is_hugging_face_folder(name: str) -> bool:
  settings = Path(name) / "config.json"
  return bool(name) and settings.is_file() and "model_type" in read_json(settings)
