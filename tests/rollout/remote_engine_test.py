"""Completions from an engine over HTTP: our own sampler behind a small server that can be made to fail."""

import functools
import math
import socket
import time

import jax
import numpy as np
import pytest

from rspo_jax.rollout.remote_client import EngineError
from rspo_jax.rollout.remote_engine import RemoteEngine, seeds_of
from rspo_jax.rollout.samplers import draw_rollout
from rspo_jax.rollout.sampling import sample
from rspo_jax.rollout.token_sampling import SamplingOptions
from tests.support import tiny
from tests.support.engine_server import EXPERTS, EngineServer

NEW, SAMPLES, FIRST = 6, 2, 10
OPTIONS = SamplingOptions(NEW, SAMPLES, stop_ids=(0, 1, 2), record_experts=True)
KEY = jax.random.key(7)
QUICK = {"timeout": 5.0, "retries": 2, "backoff": 0.01}


@functools.cache
def direct():
  """The rollout of our own sampler for these prompts."""
  policy, params = tiny.policy_and_params()
  run = jax.jit(functools.partial(sample, policy, options=OPTIONS))
  return jax.device_get(run(params, *tiny.prompts(), KEY, first_row=FIRST))


@functools.cache
def table():
  """seed -> (prompt, tokens, log-probs, experts by position) of every completion of `direct`."""
  completions, rollout = {}, direct()
  rows = len(rollout.tokens)
  for row, seed in enumerate(seeds_of(KEY, FIRST + np.arange(rows))):
    action, valid = rollout.action_mask[row], rollout.valid[row]
    prompt = rollout.tokens[row][valid & ~action].tolist()
    experts = rollout.expert_index[row][valid][1:]  # slot t is of position t - 1
    completions[seed] = prompt, rollout.tokens[row][action].tolist(), rollout.log_prob[row][action].tolist(), experts
  assert len(completions) == rows
  return completions


def complete(body):
  prompt, tokens, log_probs, experts = table()[body["seed"]]
  assert body["prompt"] == prompt
  return tokens, log_probs, experts if body.get("return_routed_experts") else None


def server(**settings):
  table()  # computed before threads use it
  return EngineServer(complete, **settings)


def make(urls, options=OPTIONS, **settings):
  return RemoteEngine(tiny.policy_and_params()[0], options, urls, **(QUICK | settings))


def rollout_of(urls, options=OPTIONS, **settings):
  return draw_rollout(make(urls, options, **settings), None, *map(np.asarray, tiny.prompts()), KEY, first_row=FIRST)


def assert_same(actual, expected):
  for name in ("tokens", "valid", "action_mask", "finished", "log_prob", "sampler_log_prob"):
    got, want = getattr(actual, name), getattr(expected, name)
    np.testing.assert_array_equal(got, want, err_msg=name)
    assert got.dtype == want.dtype, name
  # No position routes the first token of a prompt.
  mask = expected.valid & np.pad(expected.valid, ((0, 0), (1, 0)))[:, :-1]
  np.testing.assert_array_equal(actual.expert_index[mask], expected.expert_index[mask])
  assert actual.expert_index.dtype == expected.expert_index.dtype


# Sampling


@pytest.mark.parametrize("experts_as", EXPERTS)
def test_rollout_equals_that_of_the_sampler_behind_the_engine(experts_as):
  with server(experts_as=experts_as) as engine:
    assert_same(rollout_of(engine.url), direct())
    assert {path for path, _ in engine.requests} == {"/v1/completions"}


def test_experts_are_requested_only_if_they_are_recorded():
  with server() as engine:
    rollout = rollout_of(engine.url, SamplingOptions(NEW, SAMPLES, stop_ids=(0, 1, 2)))
    assert rollout.expert_index is None
    assert not any("return_routed_experts" in body for _, body in engine.requests)
  np.testing.assert_array_equal(rollout.tokens, direct().tokens)


def test_entries_of_layers_without_experts_are_dropped():
  def padded(body):
    tokens, log_probs, experts = complete(body)
    wide = np.zeros((len(experts), 3, experts.shape[2]), experts.dtype)
    wide[:, [0, 2]] = experts  # layer 1 of the tiny model is dense
    return tokens, log_probs, wide

  for experts_as in EXPERTS:
    with EngineServer(padded, experts_as=experts_as) as engine:
      assert_same(rollout_of(engine.url, moe_layers=(0, 2), num_layers=3), direct())
      with pytest.raises(EngineError, match=r"want integers for 2 layers, 2 each"):
        rollout_of(engine.url)


def test_requests_hold_every_sampling_parameter_and_different_seeds():
  options = SamplingOptions(NEW, SAMPLES, temperature=0.7, top_k=5, top_p=0.9, stop_ids=(0, 1, 2))
  with server() as engine:
    rollout_of(engine.url, options, model="tiny")
    bodies = [body for _, body in engine.requests]
  body = bodies[0]
  expected = {"n": 1, "max_tokens": NEW, "temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.0, "model": "tiny"}
  expected |= {"repetition_penalty": 1.0, "stop_token_ids": [0, 1, 2], "return_token_ids": True, "logprobs": 1}
  assert {key: body[key] for key in expected} == expected
  assert len({body["seed"] for body in bodies}) == len(bodies) == len(direct().tokens)
  assert all(0 <= body["seed"] < 2**31 for body in bodies)


def test_seeds_depend_on_key_and_number_alone():
  numbers = np.arange(100)
  assert seeds_of(KEY, numbers)[40:] == seeds_of(KEY, numbers[40:])
  assert len(set(seeds_of(KEY, numbers)) | set(seeds_of(jax.random.key(8), numbers))) == 200


def test_servers_share_the_prompts_and_replace_each_other():
  with server() as one, server(faults=[503] * 3) as other:
    assert_same(rollout_of([one.url, other.url]), direct())
    prompts_of = [{tuple(body["prompt"]) for _, body in engine.requests} for engine in (one, other)]
    assert prompts_of[0] and prompts_of[1]
    assert len(one.requests) == len(direct().tokens) // 2 + 3


def test_concurrency_bounds_the_requests_in_flight():
  def slowly(body):
    time.sleep(0.02)
    return complete(body)

  with EngineServer(slowly) as engine:
    rollout_of(engine.url, concurrency=2)
    assert engine.most == 2


# Faults


@pytest.mark.parametrize("fault", [500, 429, 503])
def test_transient_faults_are_retried(fault):
  with server(faults=[fault]) as engine:
    assert_same(rollout_of(engine.url), direct())
    assert len(engine.requests) == len(direct().tokens) + 1


def aborted(answer):
  answer["choices"][0]["finish_reason"] = "abort"
  return answer


def test_aborted_completions_and_timeouts_are_retried():
  with server(faults=[aborted, 5.0]) as engine:
    assert_same(rollout_of(engine.url, timeout=1.5), direct())
    assert len(engine.requests) == len(direct().tokens) + 2


def test_persistent_faults_name_server_completion_and_answer():
  with server(faults=[500] * 99) as engine:
    with pytest.raises(
      EngineError, match=rf"{engine.url}/v1/completions failed on completion \d+ .*try 3 of 3: HTTP 500: .*out of order"
    ):
      rollout_of(engine.url, concurrency=1)
    assert len(engine.requests) < len(direct().tokens)  # the others are cancelled


def test_hanging_engine_is_an_error_in_bounded_time():
  with server(faults=[2.0] * 99) as engine:
    begin = time.monotonic()
    with pytest.raises(EngineError, match=r"no answer within 0.2 s.*raise the timeout"):
      rollout_of(engine.url, timeout=0.2, retries=1)
    assert time.monotonic() - begin < 10


def test_unreachable_engine_is_an_error():
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(EngineError, match=rf"{url}/v1/completions failed .*refused.*Is the engine up"):
      rollout_of(url)


@pytest.mark.parametrize(("status", "cure"), [(400, "log says more"), (404, "root, without /v1"), (422, "log says")])
def test_refusals_are_not_retried(status, cure):
  with server(faults=[status] * 99) as engine:
    with pytest.raises(EngineError, match=rf"refused completion .*HTTP {status}: .*out of order.*{cure}"):
      rollout_of(engine.url, concurrency=1)
    assert len(engine.requests) < len(direct().tokens)


def choice(**changed):
  """A fault: these entries of the choice are replaced."""

  def fault(answer):
    answer["choices"][0] |= changed
    return answer

  return fault


def log_probs(change):
  def fault(answer):
    part = answer["choices"][0]["logprobs"]
    part["token_logprobs"] = change(part["token_logprobs"])
    return answer

  return fault


LONG = {"token_ids": [5] * 7, "logprobs": {"token_logprobs": [-1.0] * 7}, "finish_reason": "length"}


@pytest.mark.parametrize(
  ("fault", "message"),
  [
    (lambda answer: {"error": "no"}, "no completion: .*root of an OpenAI server"),
    (lambda answer: {"choices": []}, "0 choices; want 1"),
    (lambda answer: {"choices": answer["choices"] * 2}, "2 choices; want 1"),
    (choice(token_ids=None, logprobs={"tokens": ["a"], "token_logprobs": [-1.0]}), "no token ids.*vLLM .*0.10.2"),
    (choice(token_ids=[5.5]), "no token ids"),
    (choice(logprobs=None), r"0 log-probabilities came for \d tokens"),
    (log_probs(lambda values: values[1:]), "log-probabilities came for"),
    (log_probs(lambda values: [math.nan, *values[1:]]), "nan.*want finite numbers"),
    (log_probs(lambda values: [None, *values[1:]]), "None.*want finite numbers"),
    (log_probs(lambda values: [-math.inf, *values[1:]]), "want finite numbers"),
    (choice(**LONG), "7 tokens came; want 1 to 6"),
    (choice(token_ids=[], logprobs={}), "0 tokens came"),
    (
      choice(**LONG | {"token_ids": [24, 0], "logprobs": {"token_logprobs": [-1, -1]}}),
      "token 24 .* vocabulary has 24",
    ),
    (choice(**LONG | {"token_ids": [5, 6], "logprobs": {"token_logprobs": [-1, -1]}}), r"none of the stop tokens \(0"),
    (
      choice(**LONG | {"token_ids": [0, 6], "logprobs": {"token_logprobs": [-1, -1]}}),
      "continues after the stop token 0",
    ),
    (choice(prompt_token_ids=[1, 2, 3]), "read the prompt as"),
    (choice(routed_experts=None), "has no routed experts.*--enable-return-routed-experts"),
    (choice(routed_experts="%%%"), "experts cannot be read"),
    (choice(routed_experts="AAAA"), "experts cannot be read"),
    (choice(routed_experts=[[[0, 1], [0, 1]]] * 2), r"routed experts are \[2, 2, 2\]; want \d+ rows"),
    (choice(routed_experts={"data": "AAAA"}), "experts cannot be read"),
  ],
)
def test_incorrect_answers_are_refused_with_the_cure(fault, message):
  with server(faults=[fault] * 99) as engine, pytest.raises(EngineError, match=rf"{engine.url}/.*{message}"):
    rollout_of(engine.url, concurrency=1)


def test_unknown_experts_are_refused():
  def shifted(body):
    tokens, log_probs, experts = complete(body)
    return tokens, log_probs, experts + 4

  with EngineServer(shifted) as engine, pytest.raises(EngineError, match=r"want numbers in \[0, 4\)"):
    rollout_of(engine.url)


def test_token_ids_are_read_from_token_strings():
  with server(faults=[choice(token_ids=None)] * 99) as engine:
    assert_same(rollout_of(engine.url), direct())


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"timeout": 0.0}, "timeout is 0"),
    ({"retries": -1}, "retries -1"),
    ({"concurrency": 0}, "connections 0"),
  ],
)
def test_settings_out_of_range_are_refused(settings, message):
  with pytest.raises(ValueError, match=message):
    rollout_of("http://127.0.0.1:1", **settings)


@pytest.mark.parametrize("urls", ["", [], "127.0.0.1:8000"])
def test_urls_need_a_scheme(urls):
  with pytest.raises(ValueError, match="want roots of servers"):
    rollout_of(urls)
