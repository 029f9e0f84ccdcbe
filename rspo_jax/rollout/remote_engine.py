"""Completions from an inference engine over HTTP: token ids in; token ids, log-probabilities and routed experts out.

The old log-probabilities and the routing trace of an update come from our own forward, as with our own samplers;
`rspo_jax.objectives.mismatch` corrects for the difference between the engine and that forward.
"""

import dataclasses
import json
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

import jax
import numpy as np
import urllib3

from rspo_jax.rollout.completions import Completion
from rspo_jax.rollout.remote_protocol import Aborted, Answer, PolicyShape, read_completion, request_of
from rspo_jax.rollout.token_sampling import SamplingOptions
from rspo_jax.types import Params, Policy, Program

TRANSIENT = (408, 425, 429, 500, 502, 503, 504)  # HTTP statuses that a retry may cure


class EngineError(RuntimeError):
  """An engine that cannot be reached, refuses, or returns something else than the request asked for."""


class Client:
  """POSTs JSON to an engine and retries where that may help. Thread-safe.

  Args:
    timeout: seconds that an answer may take. retries: attempts after the first.
    backoff: seconds before the second attempt; doubles from then on, up to 16.
  """

  def __init__(self, *, timeout: float = 600.0, retries: int = 4, backoff: float = 1.0, connections: int = 1):
    if not 0 < timeout < float("inf") or retries < 0 or backoff < 0 or connections < 1:
      raise ValueError(
        f"timeout is {timeout}, retries {retries}, backoff {backoff} and connections {connections}; want seconds above "
        "0, 0 or more retries, a backoff of 0 or more and at least one connection."
      )
    self._timeout, self._retries, self._backoff = timeout, retries, backoff
    limits = urllib3.Timeout(connect=min(timeout, 10.0), read=timeout)
    self._pool = urllib3.PoolManager(num_pools=64, maxsize=connections, block=True, timeout=limits, retries=False)

  def post(
    self,
    urls: Sequence[str],
    path: str,
    body: Any,
    *,
    what: str,
    read: Callable[[bytes], Any],
    given_up: threading.Event | None = None,
  ) -> Any:
    """The answer, decoded by `read`.

    Args:
      urls: servers, one after the other. what: the thing requested, for messages. given_up: ends the retries.
    Raises:
      EngineError: no answer in all attempts, or an error that a retry cannot cure.
    """
    data, given_up = json.dumps(body).encode(), given_up or threading.Event()
    for attempt in range(self._retries + 1):
      url = urls[attempt % len(urls)] + path
      if attempt and given_up.wait(min(self._backoff * 2 ** (attempt - 1), 16.0)):
        break
      try:
        answer = self._pool.request("POST", url, body=data, headers={"Content-Type": "application/json"})
        said = answer.data[:500].decode(errors="replace")
        if answer.status == 200:
          return read(answer.data)
        failure = f"HTTP {answer.status}: {said}"
        if answer.status not in TRANSIENT:
          cure = "Is this the server's root, without /v1?" if answer.status == 404 else "The engine's log says more."
          raise EngineError(f"{url} refused {what} with {failure}. {cure}")
      except ValueError as error:
        raise EngineError(f"{url}, {what}: {error}") from error
      except Aborted as error:
        failure = str(error)
      except urllib3.exceptions.ReadTimeoutError:
        failure = f"no answer within {self._timeout:g} s"
      except urllib3.exceptions.HTTPError as error:
        failure = f"{type(error).__name__}: {error}"
    raise EngineError(
      f"{url} failed on {what}, try {attempt + 1} of {self._retries + 1}: {failure}. Is the engine up, and its address "
      "right? If it is only slow, raise the timeout."
    )


def seeds_of(key: jax.Array, numbers: Sequence[int], lengths: Sequence[int] | None = None) -> list[int]:
  """Seeds [B], in [0, 2**31), of completions.

  Args:
    numbers: [B], >= 0, in the whole batch. lengths: [B], tokens that partial completions have already; None: 0.
  """
  words = np.asarray(jax.random.key_data(key)).tolist()
  lengths = [0] * len(numbers) if lengths is None else lengths
  return [
    int(np.random.SeedSequence([*words, int(number), *([int(length)] if length else [])]).generate_state(1)[0]) >> 1
    for number, length in zip(numbers, lengths, strict=True)
  ]


class RemoteEngine:
  """Samples completions with an engine that serves the policy (`rspo_jax.rollout.samplers.Sampler`).

  Every completion is one request, with a seed made of key and number: as far as the engine is deterministic, it depends
  neither on the batch nor on the other completions. The samples of a prompt go to one server, which caches the prompt.

  Args:
    policy: what the engine serves, for its sizes. options: as for `rspo_jax.rollout.sampling.sample`.
    urls: roots of one or several servers of the same weights, as "http://127.0.0.1:8000"; prompts are distributed
      round-robin.
    model: name in the requests; '' leaves it out.
    moe_layers, num_layers: indices of the layers with experts and the number of all layers, for an engine that returns
      experts of all layers, those without any included.
    sync_weights: called with the parameters before sampling, see `when_changed`; None: the engine has its own weights.
    concurrency: requests in flight. timeout, retries, backoff: see `Client`.
  Raises:
    ValueError: a setting out of range.
  """

  programs: tuple[Program, ...] = ()
  prompts_per_call = 1

  def __init__(
    self,
    policy: Policy,
    options: SamplingOptions,
    urls: str | Sequence[str],
    *,
    model: str = "",
    moe_layers: Sequence[int] = (),
    num_layers: int = 0,
    sync_weights: Callable[[Params], None] | None = None,
    concurrency: int = 64,
    timeout: float = 600.0,
    retries: int = 4,
    backoff: float = 1.0,
  ):
    self._urls = [url.strip().rstrip("/") for url in ([urls] if isinstance(urls, str) else urls)]
    if not self._urls or not all(url.startswith(("http://", "https://")) for url in self._urls):
      raise ValueError(f"urls are {urls!r}; want roots of servers, as 'http://127.0.0.1:8000'.")
    sizes = (policy.vocab_size, policy.num_moe_layers, policy.experts_per_token, policy.num_experts)
    self._shape = PolicyShape(*sizes, tuple(moe_layers), num_layers)
    self.options, self._model, self._sync_weights, self._concurrency = options, model, sync_weights, concurrency
    self._client = Client(timeout=timeout, retries=retries, backoff=backoff, connections=concurrency)

  def draw(
    self,
    params: Params | None,
    queue: Iterable[Completion],
    key: jax.Array,
    *,
    version: int = 0,
    on_finished: Callable[[list[Completion]], Sequence[Completion] | None] | None = None,
  ) -> list[Completion]:
    """See `rspo_jax.rollout.samplers.Sampler.draw`. After a stop, requests in flight are abandoned.

    An engine returns one log-probability per token, so `sampler_log_prob` and `log_prob` are equal: of the distribution
    that was sampled from, which is that of temperature 1 without truncation if the options say so; otherwise whichever
    of the two the engine returns.

    Raises:
      EngineError: names the server, the completion's number and the cure; requests in flight are abandoned.
    """
    if self._sync_weights is not None and params is not None:
      self._sync_weights(params)
    known: dict[int, Completion] = {}
    servers: dict[bytes, int] = {}  # by prompt
    requests: dict[Future, int] = {}
    pool, given_up = ThreadPoolExecutor(self._concurrency), threading.Event()

    def submit(completions: Iterable[Completion]) -> list[Completion]:
      """Requests those that are not done; returns the others."""
      completions = list(completions)
      known.update({completion.number: completion for completion in completions})
      open_ones = [completion for completion in completions if not completion.done]
      numbers, lengths = [c.number for c in open_ones], [len(c.tokens) for c in open_ones]
      for completion, seed in zip(open_ones, seeds_of(key, numbers, lengths), strict=True):
        server = servers.setdefault(completion.prompt.tobytes(), len(servers))
        requests[pool.submit(self._complete, completion, server, seed, given_up)] = completion.number
      return [completion for completion in completions if completion.done]

    try:
      finished = submit(queue)
      while True:
        if on_finished is not None:
          more = on_finished(finished)
          if more is None:
            break
          submit(more)
        if not requests:
          break
        answered, _ = wait(requests, return_when=FIRST_COMPLETED)
        finished = []
        for number, future in sorted((requests.pop(future), future) for future in answered):
          finished.append(_extend(known[number], future.result(), self.options, version))
          known[number] = finished[-1]
    finally:
      given_up.set()
      pool.shutdown(wait=False, cancel_futures=True)
    return [known[number] for number in sorted(known)]

  def _complete(self, completion: Completion, server: int, seed: int, given_up: threading.Event) -> Answer:
    first = server % len(self._urls)
    prompt = completion.context.tolist()
    options = dataclasses.replace(self.options, max_new_tokens=completion.limit - len(completion.tokens))
    return self._client.post(
      self._urls[first:] + self._urls[:first],
      "/v1/completions",
      request_of(prompt, options, seed, self._model),
      what=f"completion {completion.number} (prompt of {len(prompt)} tokens)",
      read=lambda answer: read_completion(answer, prompt, options, self._shape),
      given_up=given_up,
    )


def _extend(old: Completion, answer: Answer, options: SamplingOptions, version: int) -> Completion:
  """A completion with the tokens of an answer to the request for its remainder."""
  log_prob = np.concatenate([old.log_prob, np.array(answer.log_probs, np.float32)])
  experts = None
  if answer.experts is not None:
    # Position t routes the token of slot t + 1; no position routes the first token of the prompt.
    by_slot = np.concatenate([np.zeros_like(answer.experts[:1]), answer.experts])
    experts = by_slot if old.experts is None else np.concatenate([old.experts, by_slot[len(old.experts) :]])
  return old._replace(
    tokens=np.concatenate([old.tokens, np.array(answer.tokens, np.int32)]),
    sampler_log_prob=np.concatenate([old.sampler_log_prob, log_prob[len(old.tokens) :]]),
    log_prob=log_prob,
    version=np.concatenate([old.version, np.full(len(answer.tokens), version, np.int32)]),
    finished=answer.tokens[-1] in options.stop_ids,
    experts=experts,
  )


def when_changed(sync_weights: Callable[[Params], None]) -> Callable[[Params], None]:
  """The same function, skipped for the parameters of its last successful call; holds no reference to them."""
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
  """Makes every server load the weights of a Hugging Face folder, which it sees under this path, and clear its cache.

  Raises:
    EngineError: a server cannot be reached, or reports a failure.
  """
  for url in urls:
    body = {"model_path": folder, "flush_cache": True}
    (client or Client()).post(
      [url], "/update_weights_from_disk", body, what=f"the weights in {folder}", read=_succeeded
    )


def _succeeded(answer: bytes) -> None:
  said = json.loads(answer or b"{}")
  if not said.get("success", True):
    raise ValueError(f"the engine did not load the weights: {said.get('message', said)}")


def update_vllm(urls: Sequence[str], folder: str, client: Client | None = None) -> None:
  """Makes every server reload its weights from the folder that it was started with, and clear its cache.

  Needs servers started with VLLM_SERVER_DEV_MODE=1. folder: the servers' own, for messages.

  Raises:
    EngineError: a server cannot be reached or refuses.
  """
  for url in urls:
    post, what = (client or Client()).post, f"new weights, from {folder}"
    post([url], "/collective_rpc", {"method": "reload_weights"}, what=what, read=bytes)
    post([url], "/reset_prefix_cache?reset_running_requests=true", {}, what="an empty prefix cache", read=bytes)
