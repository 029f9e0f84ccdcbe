"""Completions from an engine over HTTP, which is our own sampler behind a small server that can be made to fail."""

import functools
import math
import socket
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rspo_jax.rollout.remote_engine import (
  Client,
  EngineError,
  RemoteEngine,
  seeds_of,
  update_sglang,
  update_vllm,
  when_changed,
)
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
  """What our own sampler draws of these prompts."""
  policy, params = tiny.policy_and_params()
  run = jax.jit(functools.partial(sample, policy, options=OPTIONS))
  return jax.device_get(run(params, *tiny.prompts(), KEY, first_row=FIRST))


@functools.cache
def table():
  """seed -> (prompt, tokens, log-probs, experts by position) of every completion of `direct`."""
  found, rows = {}, len(direct().tokens)
  for row, seed in enumerate(seeds_of(KEY, FIRST + np.arange(rows))):
    drawn = direct().action_mask[row]
    inside = direct().valid[row]
    prompt = direct().tokens[row][inside & ~drawn].tolist()
    experts = direct().expert_index[row][inside][1:]  # slot t is of position t - 1
    found[seed] = prompt, direct().tokens[row][drawn].tolist(), direct().log_prob[row][drawn].tolist(), experts
  assert len(found) == rows
  return found


def complete(body):
  prompt, tokens, log_probs, experts = table()[body["seed"]]
  assert body["prompt"] == prompt
  return tokens, log_probs, experts if body.get("return_routed_experts") else None


def server(**settings):
  table()  # before threads ask for it
  return EngineServer(complete, **settings)


def drawn(urls, options=OPTIONS, tokens=None, first_row=FIRST, **settings):
  engine = RemoteEngine(tiny.policy_and_params()[0], options, urls, **(QUICK | settings))
  given, valid = tiny.prompts()
  return draw_rollout(engine, None, np.asarray(given), np.asarray(valid), KEY, first_row=first_row)


def assert_same(found, wanted):
  for name in ("tokens", "valid", "action_mask", "finished", "log_prob", "sampler_log_prob"):
    got, want = getattr(found, name), getattr(wanted, name)
    np.testing.assert_array_equal(got, want, err_msg=name)
    assert got.dtype == want.dtype, name
  # The position before a prompt's first token is padding, and what routes it means nothing.
  mask = wanted.valid & np.pad(wanted.valid, ((0, 0), (1, 0)))[:, :-1]
  np.testing.assert_array_equal(found.expert_index[mask], wanted.expert_index[mask])
  assert found.expert_index.dtype == wanted.expert_index.dtype


# What is drawn


@pytest.mark.parametrize("experts_as", EXPERTS)
def test_a_rollout_is_that_of_the_sampler_behind_the_engine_experts_too(experts_as):
  with server(experts_as=experts_as) as engine:
    assert_same(drawn(engine.url), direct())
    assert {path for path, _ in engine.requests} == {"/v1/completions"}


def test_without_experts_none_are_asked_for_or_kept():
  with server() as engine:
    found = drawn(engine.url, SamplingOptions(NEW, SAMPLES, stop_ids=(0, 1, 2)))
    assert found.expert_index is None
    assert not any("return_routed_experts" in body for _, body in engine.requests)
  np.testing.assert_array_equal(found.tokens, direct().tokens)


def test_experts_of_all_layers_are_taken_for_those_that_have_some():
  def padded(body):
    tokens, log_probs, experts = complete(body)
    wide = np.zeros((len(experts), 3, experts.shape[2]), experts.dtype)
    wide[:, [0, 2]] = experts  # layer 1 of the tiny model has none
    return tokens, log_probs, wide

  for experts_as in EXPERTS:
    with EngineServer(padded, experts_as=experts_as) as engine:
      assert_same(drawn(engine.url, moe_layers=(0, 2), num_layers=3), direct())
      with pytest.raises(EngineError, match=r"want integers for 2 layers, 2 each"):
        drawn(engine.url)


def test_the_request_says_every_sampling_parameter_and_no_seed_comes_twice():
  options = SamplingOptions(NEW, SAMPLES, temperature=0.7, top_k=5, top_p=0.9, stop_ids=(0, 1, 2))
  with server() as engine:
    drawn(engine.url, options, model="tiny")
    bodies = [body for _, body in engine.requests]
  body = bodies[0]
  wanted = {"n": 1, "max_tokens": NEW, "temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.0, "model": "tiny"}
  wanted |= {"repetition_penalty": 1.0, "stop_token_ids": [0, 1, 2], "return_token_ids": True, "logprobs": 1}
  assert {key: body[key] for key in wanted} == wanted
  assert len({body["seed"] for body in bodies}) == len(bodies) == len(direct().tokens)
  assert all(0 <= body["seed"] < 2**31 for body in bodies)


def test_seeds_depend_on_key_and_number_alone():
  numbers = np.arange(100)
  assert seeds_of(KEY, numbers)[40:] == seeds_of(KEY, numbers[40:])
  assert len(set(seeds_of(KEY, numbers)) | set(seeds_of(jax.random.key(8), numbers))) == 200


def test_several_servers_share_the_prompts_and_stand_in_for_each_other():
  with server() as one, server(faults=[503] * 3) as other:
    assert_same(drawn([one.url, other.url]), direct())
    prompts_of = [{tuple(body["prompt"]) for _, body in engine.requests} for engine in (one, other)]
    assert prompts_of[0] and prompts_of[1]
    assert len(one.requests) == len(direct().tokens) // 2 + 3


def test_no_more_requests_are_under_way_than_allowed():
  def slowly(body):
    time.sleep(0.02)
    return complete(body)

  with EngineServer(slowly) as engine:
    drawn(engine.url, concurrency=2)
    assert engine.most == 2


# What goes wrong


@pytest.mark.parametrize("fault", [500, 429, 503])
def test_a_passing_fault_is_tried_again(fault):
  with server(faults=[fault]) as engine:
    assert_same(drawn(engine.url), direct())
    assert len(engine.requests) == len(direct().tokens) + 1


def aborted(answer):
  answer["choices"][0]["finish_reason"] = "abort"
  return answer


def test_an_aborted_completion_and_a_hanging_request_are_asked_for_again():
  with server(faults=[aborted, 5.0]) as engine:
    assert_same(drawn(engine.url, timeout=1.5), direct())
    assert len(engine.requests) == len(direct().tokens) + 2


def test_an_engine_that_stays_out_of_order_is_named_with_what_it_said():
  with server(faults=[500] * 99) as engine:
    with pytest.raises(
      EngineError, match=rf"{engine.url}/v1/completions failed on completion \d+ .*try 3 of 3: HTTP 500: .*out of order"
    ):
      drawn(engine.url, concurrency=1)
    assert len(engine.requests) < len(direct().tokens)  # the others are not asked for any more


def test_an_engine_that_always_hangs_is_an_error_in_bounded_time():
  with server(faults=[2.0] * 99) as engine:
    begin = time.monotonic()
    with pytest.raises(EngineError, match=r"no answer within 0.2 s.*raise the timeout"):
      drawn(engine.url, timeout=0.2, retries=1)
    assert time.monotonic() - begin < 10


def test_nobody_there_is_an_error_that_says_so():
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(EngineError, match=rf"{url}/v1/completions failed .*refused.*Is the engine up"):
      drawn(url)


@pytest.mark.parametrize(("status", "cure"), [(400, "log says more"), (404, "root, without /v1"), (422, "log says")])
def test_a_refusal_is_not_tried_again(status, cure):
  with server(faults=[status] * 99) as engine:
    with pytest.raises(EngineError, match=rf"refused completion .*HTTP {status}: .*out of order.*{cure}"):
      drawn(engine.url, concurrency=1)
    assert len(engine.requests) < len(direct().tokens)


def choice(**changed):
  """A fault: the choice with these entries."""

  def fault(answer):
    answer["choices"][0] |= changed
    return answer

  return fault


def log_probs(change):
  def fault(answer):
    found = answer["choices"][0]["logprobs"]
    found["token_logprobs"] = change(found["token_logprobs"])
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
      "goes on after the stop token 0",
    ),
    (choice(prompt_token_ids=[1, 2, 3]), "read the prompt as"),
    (choice(routed_experts=None), "names no routed experts.*--enable-return-routed-experts"),
    (choice(routed_experts="%%%"), "experts cannot be read"),
    (choice(routed_experts="AAAA"), "experts cannot be read"),
    (choice(routed_experts=[[[0, 1], [0, 1]]] * 2), r"routed experts are \[2, 2, 2\]; want \d+ rows"),
    (choice(routed_experts={"data": "AAAA"}), "experts cannot be read"),
  ],
)
def test_an_answer_that_is_not_what_was_asked_for_is_refused_with_the_cure(fault, message):
  with server(faults=[fault] * 99) as engine, pytest.raises(EngineError, match=rf"{engine.url}/.*{message}"):
    drawn(engine.url, concurrency=1)


def test_experts_that_do_not_exist_are_refused():
  def wrong(body):
    tokens, log_probs, experts = complete(body)
    return tokens, log_probs, experts + 4

  with EngineServer(wrong) as engine, pytest.raises(EngineError, match=r"want numbers in \[0, 4\)"):
    drawn(engine.url)


def test_token_ids_are_read_from_words_where_there_are_no_numbers():
  with server(faults=[choice(token_ids=None)] * 99) as engine:
    assert_same(drawn(engine.url), direct())


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"timeout": 0.0}, "timeout is 0"),
    ({"retries": -1}, "retries -1"),
    ({"concurrency": 0}, "connections 0"),
  ],
)
def test_impossible_settings_are_refused(settings, message):
  with pytest.raises(ValueError, match=message):
    drawn("http://127.0.0.1:1", **settings)


@pytest.mark.parametrize("urls", ["", [], "127.0.0.1:8000"])
def test_an_address_is_a_root_with_its_scheme(urls):
  with pytest.raises(ValueError, match="want roots of servers"):
    drawn(urls)


# New weights


def test_parameters_are_published_when_they_are_others_and_again_after_a_failure():
  seen, fail = [], [False]

  def publish(params):
    seen.append(params)
    if fail[0]:
      raise EngineError("no")

  changed = when_changed(publish)
  one, same = {"a": jnp.zeros(2), "b": jnp.ones(2)}, None
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


def test_weights_are_published_before_the_completions_that_they_draw():
  with server() as engine:
    client = Client(**QUICK)
    sync_weights = when_changed(lambda params: update_sglang([engine.url], "/weights", client))
    made = RemoteEngine(tiny.policy_and_params()[0], OPTIONS, engine.url, sync_weights=sync_weights, **QUICK)
    for _ in range(2):
      draw_rollout(made, tiny.policy_and_params()[1], *map(np.asarray, tiny.prompts()), KEY, first_row=FIRST)
    updates = [row for row, (path, _) in enumerate(engine.requests) if path == "/update_weights_from_disk"]
    assert updates == [0]
    assert engine.requests[0][1] == {"model_path": "/weights", "flush_cache": True}


def test_weights_that_are_not_taken_are_an_error():
  def refuse(body):
    raise OSError("no such folder")

  with server(update=refuse) as engine, pytest.raises(EngineError, match="failed on the weights in /weights"):
    update_sglang([engine.url], "/weights", Client(**QUICK))
  with server() as engine:
    engine.answer = lambda path, body: (200, {"success": False, "message": "shapes differ"})
    with pytest.raises(EngineError, match="did not load the weights: shapes differ"):
      update_sglang([engine.url], "/weights", Client(**QUICK))


def test_vllm_reloads_from_its_own_folder_and_forgets_its_cache():
  with server() as engine:
    update_vllm([engine.url], "/weights", Client(**QUICK))
    assert engine.requests == [
      ("/collective_rpc", {"method": "reload_weights"}),
      ("/reset_prefix_cache?reset_running_requests=true", {}),
    ]
