"""A remote engine continues partial completions, and a stop or an error ends the requests in flight."""

import threading
import time

import jax
import numpy as np
import pytest

from rspo_jax.rollout.completions import new_completions
from rspo_jax.rollout.remote_client import Client, EngineError
from rspo_jax.rollout.remote_engine import RemoteEngine
from rspo_jax.rollout.token_sampling import SamplingOptions
from tests.support import tiny
from tests.support.engine_server import EngineServer

NEW, KEY = 6, jax.random.key(7)
OPTIONS = SamplingOptions(NEW, stop_ids=(0, 1, 2), record_experts=True)
HANGS = 30.0  # seconds


def make(urls, **settings):
  return RemoteEngine(
    tiny.policy_and_params()[0], OPTIONS, urls, **{"timeout": 60.0, "retries": 2, "backoff": 0.01} | settings
  )


def queue(count):
  return new_completions([np.array([4, 5 + row], np.int32) for row in range(count)], 1, limits=NEW)


def answer_from(first):
  """Answers every request with tokens first, first + 1, ... up to its max_tokens, all routed to expert first // 10."""

  def answer(body):
    count = body["max_tokens"]
    experts = np.full((len(body["prompt"]) + count - 1, 2, 2), first // 10)
    return list(range(first, first + count)), [-0.5] * count, experts

  return answer


def request_threads():
  return [thread for thread in threading.enumerate() if thread.name.startswith("ThreadPoolExecutor")]


def assert_request_threads_end():
  deadline = time.monotonic() + 5
  while request_threads() and time.monotonic() < deadline:
    time.sleep(0.01)
  assert not request_threads()


def test_partial_completions_are_requested_with_their_tokens_and_remaining_limit():
  (new,) = queue(1)
  with EngineServer(answer_from(10)) as engine:
    (partial,) = make(engine.url).draw(None, [new._replace(limit=2)], KEY, version=3)
    engine.complete = answer_from(20)
    (done,) = make(engine.url).draw(None, [partial._replace(limit=NEW)], KEY, version=4)
    first, second = (body for _, body in engine.requests)
  assert (first["prompt"], second["prompt"]) == ([4, 5], [4, 5, 10, 11])
  assert (first["max_tokens"], second["max_tokens"]) == (2, NEW - 2) and first["seed"] != second["seed"]
  assert done.tokens.tolist() == [10, 11, 20, 21, 22, 23] and done.done and not done.finished
  assert done.version.tolist() == [3, 3, 4, 4, 4, 4]
  np.testing.assert_array_equal(done.experts[:, 0, 0], [0, 1, 1, 1, 2, 2, 2, 2])


def test_completions_that_are_done_are_reported_first_and_not_requested():
  reported = []

  def on_finished(finished):
    reported.append([completion.number for completion in finished])
    return ()

  with EngineServer(answer_from(10)) as engine:
    (done,) = make(engine.url).draw(None, queue(1), KEY)
    completions = make(engine.url, concurrency=1).draw(None, [done, *queue(3)[1:]], KEY, on_finished=on_finished)
    assert len(engine.requests) == 3
  assert completions[0] is done and reported == [[0], [1], [2]]


def test_early_stop_ends_the_requests_in_flight_and_does_not_delay_the_next_draw():
  with EngineServer(answer_from(10), faults=[HANGS] * 3) as engine:
    sampler = make(engine.url, concurrency=4)
    stopped = sampler.draw(None, queue(4), KEY, on_finished=lambda finished: None if finished else ())
    assert [completion.done for completion in stopped].count(True) == 1
    assert all(len(completion.tokens) in (0, NEW) for completion in stopped)
    begin = time.monotonic()
    assert all(completion.done for completion in sampler.draw(None, stopped, KEY))
    assert time.monotonic() - begin < HANGS / 2
    assert_request_threads_end()


def test_an_error_ends_the_requests_in_flight():
  with EngineServer(answer_from(10), faults=[HANGS] * 3 + [400]) as engine:
    begin = time.monotonic()
    with pytest.raises(EngineError, match="HTTP 400"):
      make(engine.url, concurrency=4).draw(None, queue(4), KEY)
    assert_request_threads_end()
    assert time.monotonic() - begin < HANGS / 2


def test_an_error_of_on_finished_is_raised_and_ends_the_requests_in_flight():
  def fail(finished):
    if finished:
      raise ZeroDivisionError
    return ()

  with EngineServer(answer_from(10), faults=[HANGS] * 2) as engine:
    with pytest.raises(ZeroDivisionError):
      make(engine.url, concurrency=3).draw(None, queue(3), KEY, on_finished=fail)
    assert_request_threads_end()


def test_a_closed_client_posts_nothing():
  with EngineServer(answer_from(10)) as engine:
    client = Client(retries=2, backoff=0.01)
    client.close()
    with pytest.raises(EngineError, match="the client is closed"):
      client.post([engine.url], "/v1/completions", {}, what="nothing", read=bytes)
    assert not engine.requests
