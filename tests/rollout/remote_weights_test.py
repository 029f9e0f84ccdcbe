"""Weight sync: when an inference engine is asked to load weights, and what it answers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rspo_jax.rollout.completions import new_completions
from rspo_jax.rollout.remote_client import Client, EngineError
from rspo_jax.rollout.remote_engine import RemoteEngine
from rspo_jax.rollout.remote_weights import update_sglang, update_vllm, when_changed
from rspo_jax.rollout.token_sampling import SamplingOptions
from tests.support import tiny
from tests.support.engine_server import EngineServer

QUICK = {"timeout": 5.0, "retries": 2, "backoff": 0.01}


def server(**settings):
  return EngineServer(lambda body: ([7, 8, 9], [-1.0] * 3, None), **settings)


def test_sync_is_skipped_for_unchanged_parameters_and_repeated_after_a_failure():
  seen, fail = [], [False]

  def sync_weights(params):
    seen.append(params)
    if fail[0]:
      raise EngineError("no")

  changed = when_changed(sync_weights)
  one = {"a": jnp.zeros(2), "b": jnp.ones(2)}
  same = dict(one)
  other = {**one, "b": jnp.ones(2)}
  for params in (one, same, other, other, one):
    changed(params)
  assert [params is one for params in seen] == [True, False, True]
  fail[0] = True
  for _ in range(2):
    with pytest.raises(EngineError):
      changed(other)
  fail[0] = False
  changed(one)
  assert len(seen) == 6


def test_weights_are_synced_once_before_completions_are_requested():
  policy, params = tiny.policy_and_params()
  with server() as engine:
    client = Client(**QUICK)
    sync_weights = when_changed(lambda params: update_sglang([engine.url], "/weights", client))
    sampler = RemoteEngine(policy, SamplingOptions(3), engine.url, sync_weights=sync_weights, **QUICK)
    for _ in range(2):
      sampler.draw(params, new_completions([np.array([5, 6])], 2, limits=3), jax.random.key(0))
    assert [path for path, _ in engine.requests] == ["/update_weights_from_disk"] + ["/v1/completions"] * 4
    assert engine.requests[0][1] == {"model_path": "/weights", "flush_cache": True}


def test_refused_weights_are_an_error():
  def refuse(body):
    raise OSError("no such folder")

  with server(update=refuse) as engine, pytest.raises(EngineError, match="failed on the weights in /weights"):
    update_sglang([engine.url], "/weights", Client(**QUICK))
  with server() as engine:
    engine.answer = lambda path, body: (200, {"success": False, "message": "shapes differ"})
    with pytest.raises(EngineError, match="did not load the weights: shapes differ"):
      update_sglang([engine.url], "/weights", Client(**QUICK))


def test_vllm_reloads_its_own_folder_and_clears_its_cache():
  with server() as engine:
    update_vllm([engine.url], "/weights", Client(**QUICK))
    assert engine.requests == [
      ("/collective_rpc", {"method": "reload_weights"}),
      ("/reset_prefix_cache?reset_running_requests=true", {}),
    ]
