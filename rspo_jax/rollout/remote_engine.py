"""Completions from an inference engine over HTTP: tokens in, tokens, log-probabilities and routed experts out.

The old log-probabilities and routing that an update uses come from our forward afterwards, as with our own sampler; how
far the engine is from it is what `rspo_jax.objectives.mismatch` corrects.
"""

import json
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any

import jax
import numpy as np
import urllib3

from rspo_jax.rollout.remote_protocol import Aborted, Completion, Shape, read_completion, request_of
from rspo_jax.rollout.sampling import SamplingOptions
from rspo_jax.types import Params, Policy, Rollout

TRANSIENT = (408, 425, 429, 500, 502, 503, 504)  # HTTP statuses that another try may cure


class EngineError(RuntimeError):
  """An engine that cannot be reached, refuses, or answers something else than was asked for."""


class Client:
  """POSTs JSON to an engine, again where that may help. Threads may share it.

  Args:
    timeout: seconds that an answer may take. retries: tries after the first.
    backoff: seconds before the second try; doubles from then on, up to 16.
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
    """What `read` makes of the answer.

    Args:
      urls: tried in turn. what: is asked for, for messages. given_up: ends the tries.
    Raises:
      EngineError: no answer in all tries, or one that is not worth another.
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


def seeds_of(key: jax.Array, number: Sequence[int]) -> list[int]:
  """The seeds [B], in [0, 2**31), of completions whose numbers in the whole batch are [B], >= 0."""
  words = np.asarray(jax.random.key_data(key)).tolist()
  return [int(np.random.SeedSequence([*words, int(one)]).generate_state(1)[0]) >> 1 for one in number]


class RemoteEngine:
  """Draws completions with an engine that serves the policy. Called as `continuous.ContinuousSampler` is.

  Every completion is a request of its own, with a seed made of key and number: its draw depends neither on the batch
  nor on the others, as far as the engine is deterministic. The samples of a prompt go to one server, which caches it.

  Args:
    policy: what the engine serves, for its sizes. options: as for `sampling.sample`.
    urls: roots of one or several servers of the same weights, as "http://127.0.0.1:8000"; prompts go round.
    model: name in the requests; '' leaves it out.
    moe_layers, num_layers: numbers of the layers with experts and how many layers there are, for an engine that tells
      the experts of all layers, those without any too.
    publish: called with the parameters before every batch, see `when_changed`; None: the engine's weights are its own.
    concurrency: requests under way at once. timeout, retries, backoff: see `Client`.
  Raises:
    ValueError: a setting out of range.
  """

  def __init__(
    self,
    policy: Policy,
    options: SamplingOptions,
    urls: str | Sequence[str],
    *,
    model: str = "",
    moe_layers: Sequence[int] = (),
    num_layers: int = 0,
    publish: Callable[[Params], None] | None = None,
    concurrency: int = 64,
    timeout: float = 600.0,
    retries: int = 4,
    backoff: float = 1.0,
  ):
    self._urls = [url.strip().rstrip("/") for url in ([urls] if isinstance(urls, str) else urls)]
    if not self._urls or not all(url.startswith(("http://", "https://")) for url in self._urls):
      raise ValueError(f"urls are {urls!r}; want roots of servers, as 'http://127.0.0.1:8000'.")
    sizes = (policy.vocab_size, policy.num_moe_layers, policy.experts_per_token, policy.num_experts)
    self._shape = Shape(*sizes, tuple(moe_layers), num_layers)
    self._options, self._model, self._publish, self._concurrency = options, model, publish, concurrency
    self._client = Client(timeout=timeout, retries=retries, backoff=backoff, connections=concurrency)

  def __call__(
    self, params: Params | None, tokens: np.ndarray, valid: np.ndarray, key: jax.Array, *, first_row: int = 0
  ) -> Rollout:
    """As `sampling.sample`, for any number of prompts [P, Tp]; the arrays of the result are numpy's.

    An engine gives one log-probability a token, so `sampler_log_prob` and `log_prob` are the same array: of what the
    token was drawn from and at temperature 1 where these are one, at temperature 1 without truncation; else whichever
    of the two the engine gives.

    Raises:
      EngineError: names the server, the completion's number and the cure; what is under way then is left to end.
    """
    if self._publish is not None and params is not None:
      self._publish(params)
    tokens, valid = np.asarray(tokens), np.asarray(valid)
    samples = self._options.samples_per_prompt
    prompts = [row[here].tolist() for row, here in zip(tokens, valid, strict=True)]
    numbers = range(first_row, first_row + len(prompts) * samples)
    pool, given_up = ThreadPoolExecutor(self._concurrency), threading.Event()
    try:
      asked = [
        pool.submit(self._complete, prompts[row // samples], row // samples, number, seed, given_up)
        for row, (number, seed) in enumerate(zip(numbers, seeds_of(key, numbers), strict=True))
      ]
      wait(asked, return_when=FIRST_EXCEPTION)
      for done in asked:
        if done.done() and not done.cancelled() and done.exception():
          raise done.exception()
    finally:
      given_up.set()
      pool.shutdown(wait=False, cancel_futures=True)
    return self._rollout(tokens, valid, [done.result() for done in asked])

  def _complete(
    self, prompt: Sequence[int], source: int, number: int, seed: int, given_up: threading.Event
  ) -> Completion:
    first = source % len(self._urls)
    return self._client.post(
      self._urls[first:] + self._urls[:first],
      "/v1/completions",
      request_of(prompt, self._options, seed, self._model),
      what=f"completion {number} (prompt of {len(prompt)} tokens)",
      read=lambda answer: read_completion(answer, prompt, self._options, self._shape),
      given_up=given_up,
    )

  def _rollout(self, tokens: np.ndarray, valid: np.ndarray, completions: Sequence[Completion]) -> Rollout:
    samples, new, start = self._options.samples_per_prompt, self._options.max_new_tokens, tokens.shape[1]
    shape = (len(completions), start + new)
    filled = np.zeros(shape, np.int32)
    filled[:, :start] = np.repeat(tokens, samples, axis=0)
    mask, log_prob = np.zeros(shape, bool), np.zeros(shape, np.float32)
    experts = None
    if self._options.record_experts:
      first = completions[0].experts
      experts = np.zeros((*shape, *first.shape[1:]), first.dtype)
    for row, (drawn, log_probs, routed) in enumerate(completions):
      end = start + len(drawn)
      filled[row, start:end], log_prob[row, start:end], mask[row, start:end] = drawn, log_probs, True
      if experts is not None:  # position t routes the token of slot t + 1
        experts[row, end - len(routed) : end] = routed
    before = np.concatenate([np.repeat(valid, samples, axis=0), mask[:, start:]], axis=1)
    finished = np.array([drawn[-1] in self._options.stop_ids for drawn, *_ in completions], bool)
    return Rollout(filled, before, mask, log_prob, log_prob.copy(), finished, experts)


def when_changed(publish: Callable[[Params], None]) -> Callable[[Params], None]:
  """The same, but only for parameters other than those of the last call that went well; holds no reference to them."""
  last: list[weakref.ref] = []

  def changed(params: Params) -> None:
    leaves = jax.tree.leaves(params)
    if len(leaves) == len(last) and all(ref() is leaf for ref, leaf in zip(last, leaves, strict=True)):
      return
    last.clear()
    publish(params)
    last.extend(map(weakref.ref, leaves))

  return changed


def update_sglang(urls: Sequence[str], folder: str, client: Client | None = None) -> None:
  """Has every server load the weights of a Hugging Face folder, which it sees under this path, and forget its cache.

  Raises:
    EngineError: a server cannot be reached, or says that it did not.
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
  """Has every server load its weights anew, from the folder that it was started with, and forget its cache.

  Needs servers started with VLLM_SERVER_DEV_MODE=1. folder: is theirs, for messages.

  Raises:
    EngineError: a server cannot be reached or refuses.
  """
  for url in urls:
    post, what = (client or Client()).post, f"new weights, from {folder}"
    post([url], "/collective_rpc", {"method": "reload_weights"}, what=what, read=bytes)
    post([url], "/reset_prefix_cache?reset_running_requests=true", {}, what="an empty prefix cache", read=bytes)
