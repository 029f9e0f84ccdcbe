"""Weight sync: makes inference engines load new weights."""

import json
import weakref
from collections.abc import Callable, Sequence

import jax

from rspo_jax.rollout.remote_client import Client
from rspo_jax.types import Params


def when_changed(sync_weights: Callable[[Params], None]) -> Callable[[Params], None]:
  """Skips `sync_weights` for the parameters of its last successful call; keeps no reference to them."""
  last: list[weakref.ref] = []

  def changed(params: Params) -> None:
    leaves = jax.tree.leaves(params)
    if len(leaves) == len(last) and all(ref() is leaf for ref, leaf in zip(last, leaves, strict=True)):
      return
    last.clear()
    sync_weights(params)
    last.extend(map(weakref.ref, leaves))

  return changed


def update_sglang(urls: Sequence[str], folder: str, client: Client | None = None) -> None:
  """Makes every server load the weights of a Hugging Face folder and clear its cache.

  Args:
    urls: roots of the servers. folder: its path as the servers see it.
  Raises:
    EngineError: a server cannot be reached, or reports a failure.
  """
  client, body = client or Client(), {"model_path": folder, "flush_cache": True}
  for url in urls:
    client.post([url], "/update_weights_from_disk", body, what=f"the weights in {folder}", read=_check_success)


def _check_success(answer: bytes) -> None:
  response = json.loads(answer or b"{}")
  if not response.get("success", True):
    raise ValueError(f"the engine did not load the weights: {response.get('message', response)}")


def update_vllm(urls: Sequence[str], folder: str, client: Client | None = None) -> None:
  """Makes every server reload its weights from the folder that it was started with, and clear its cache.

  Args:
    urls: roots of servers that were started with VLLM_SERVER_DEV_MODE=1. folder: the servers' own, for messages.
  Raises:
    EngineError: a server cannot be reached or refuses.
  """
  client = client or Client()
  for url in urls:
    client.post([url], "/collective_rpc", {"method": "reload_weights"}, what=f"new weights, from {folder}", read=bytes)
    reset = "/reset_prefix_cache?reset_running_requests=true"
    client.post([url], reset, {}, what="an empty prefix cache", read=bytes)
