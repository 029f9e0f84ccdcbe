"""Completions from an inference engine over HTTP: token ids in; token ids, log-probabilities and routed experts out.

The old log-probabilities and the routing trace of an update come from our own forward, as with our own samplers;
`rspo_jax.objectives.mismatch` corrects for the difference between the engine and that forward.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

import jax
import numpy as np

from rspo_jax.rollout.completions import Completion, OnFinished
from rspo_jax.rollout.remote_client import Client
from rspo_jax.rollout.remote_protocol import Answer, PolicyShape, read_completion, request_of
from rspo_jax.rollout.token_sampling import SamplingOptions
from rspo_jax.types import Params, Policy, Program


def seeds_of(key: jax.Array, numbers: Sequence[int], lengths: Sequence[int] | None = None) -> list[int]:
  """Seeds of completions: B integers in [0, 2**31).

  Args:
    numbers: B numbers of completions, >= 0. lengths: B counts of the tokens that they have already; None: all 0.
  """
  words = np.asarray(jax.random.key_data(key)).tolist()
  lengths = [0] * len(numbers) if lengths is None else lengths
  return [
    int(np.random.SeedSequence([*words, int(number), *([int(length)] if length else [])]).generate_state(1)[0]) >> 1
    for number, length in zip(numbers, lengths, strict=True)
  ]


class RemoteEngine:
  """Samples completions with an engine that serves the policy (`rspo_jax.rollout.samplers.Sampler`).

  Every completion is one request, whose seed depends on the key, the completion's number and the tokens it has already:
  if the engine is deterministic, a completion depends neither on the batch nor on the other completions. The samples of
  a prompt go to one server, which caches the prompt.

  Args:
    policy: the policy that the engine serves; answers are checked against its sizes.
    options: as for `rspo_jax.rollout.sampling.sample`.
    urls: roots of one or several servers of the same weights, as "http://127.0.0.1:8000"; prompts are distributed
      round-robin.
    model: name in the requests; '' omits it.
    moe_layers, num_layers: indices of the layers with experts, and the number of all layers: for an engine that returns
      an entry for every layer, including those without experts.
    sync_weights: called with the parameters before sampling, see `rspo_jax.rollout.remote_weights.when_changed`; None:
      the engine loads its weights without us.
    concurrency: requests in flight. timeout (seconds), retries, backoff (seconds): see
      `rspo_jax.rollout.remote_client.Client`.
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
    settings = {"timeout": timeout, "retries": retries, "backoff": backoff, "connections": concurrency}
    self._make_client = functools.partial(Client, **settings)
    self._make_client()  # raises for a setting out of range

  def draw(
    self,
    params: Params | None,
    queue: Iterable[Completion],
    key: jax.Array,
    *,
    version: int = 0,
    on_finished: OnFinished | None = None,
  ) -> list[Completion]:
    """See `rspo_jax.rollout.samplers.Sampler.draw`; params may be None if there is no `sync_weights`.

    After a stop or an error, requests in flight are abandoned: their connections are closed.

    An engine returns one log-probability per token, so `sampler_log_prob` and `log_prob` are equal. If the options set
    temperature 1 and no truncation, this is the log-probability of both; otherwise it is the one that the engine
    returns.

    Raises:
      EngineError: names the server, the completion's number and the cure.
    """
    if self._sync_weights is not None and params is not None:
      self._sync_weights(params)
    known: dict[int, Completion] = {}
    servers: dict[bytes, int] = {}  # by prompt
    requests: dict[Future, int] = {}
    client, pool = self._make_client(), ThreadPoolExecutor(self._concurrency)

    def submit(completions: Iterable[Completion]) -> list[Completion]:
      """Requests those that are not done; returns the others."""
      completions = list(completions)
      known.update({completion.number: completion for completion in completions})
      unfinished = [completion for completion in completions if not completion.done]
      numbers, lengths = [c.number for c in unfinished], [len(c.tokens) for c in unfinished]
      for completion, seed in zip(unfinished, seeds_of(key, numbers, lengths), strict=True):
        server = servers.setdefault(completion.prompt.tobytes(), len(servers))
        requests[pool.submit(self._complete, client, completion, server, seed)] = completion.number
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
      pool.shutdown(wait=False, cancel_futures=True)
      client.close()
    return [known[number] for number in sorted(known)]

  def _complete(self, client: Client, completion: Completion, server: int, seed: int) -> Answer:
    """Requests the remainder of a completion; runs on a thread."""
    first = server % len(self._urls)
    prompt = completion.context.tolist()
    options = dataclasses.replace(self.options, max_new_tokens=completion.limit - len(completion.tokens))
    return client.post(
      self._urls[first:] + self._urls[:first],
      "/v1/completions",
      request_of(prompt, options, seed, self._model),
      what=f"completion {completion.number} (prompt of {len(prompt)} tokens)",
      read=lambda answer: read_completion(answer, prompt, options, self._shape),
    )


def _extend(old: Completion, answer: Answer, options: SamplingOptions, version: int) -> Completion:
  """The completion with the tokens of the answer appended; the request's prompt was its prompt and tokens so far."""
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
