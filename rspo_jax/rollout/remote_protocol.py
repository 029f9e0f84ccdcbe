"""Requests to an inference engine over HTTP and the meaning of its answers: OpenAI's /v1/completions on token ids.

docs/remote_engine.md lists the engines and versions that use this protocol.
"""

import base64
import binascii
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rspo_jax.rollout.token_sampling import SamplingOptions
from rspo_jax.router.trace import index_dtype

_TOKEN_ID = re.compile(r"token_id:(\d+)")
_NPY = b"\x93NUMPY"


class PolicyShape(NamedTuple):
  """Sizes of the policy that answers are checked against.

  Attributes:
    vocab_size, num_moe_layers, experts_per_token, num_experts: V, L, K, E.
    moe_layers: indices of the L layers with experts among all num_layers, for engines that return an entry for every
      layer.
  """

  vocab_size: int
  num_moe_layers: int
  experts_per_token: int
  num_experts: int
  moe_layers: tuple[int, ...] = ()
  num_layers: int = 0


class Answer(NamedTuple):
  """A completion as the engine returned it.

  Attributes:
    tokens: C token ids. log_probs: C log-probabilities, nats.
    experts: [prompt + C - 1, L, K] unsigned, by position; None unless they were requested.
  """

  tokens: list[int]
  log_probs: list[float]
  experts: np.ndarray | None


class Aborted(Exception):
  """The engine aborted the completion, as it does when it is paused; a retry may succeed."""


def request_of(prompt: Sequence[int], options: SamplingOptions, seed: int, model: str = "") -> dict[str, Any]:
  """The JSON of a request for one completion.

  Only one, although `n` could request all samples of a prompt: engines seed several samples in different ways, and
  SGLang returns the experts of the first one only. Engines cache the prompt.

  Every sampling parameter is sent, because engines take missing ones from the model's `generation_config.json`.
  """
  body = {
    "prompt": list(map(int, prompt)),
    "n": 1,
    "max_tokens": options.max_new_tokens,
    "temperature": options.temperature,
    "top_p": options.top_p,
    "top_k": options.top_k or -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "seed": int(seed),
    "stop_token_ids": list(options.stop_ids),
    "logprobs": 1,
    "return_token_ids": True,
    "return_tokens_as_token_ids": True,
    "skip_special_tokens": False,
    "stream": False,
  }
  if model:
    body["model"] = model
  if options.record_experts:
    body["return_routed_experts"] = True
  return body


def read_completion(answer: bytes, prompt: Sequence[int], options: SamplingOptions, shape: PolicyShape) -> Answer:
  """Reads the answer to `request_of`.

  Raises:
    Aborted: the engine did not finish the completion.
    ValueError: the answer does not match the request; names the difference and the cure.
  """
  try:
    response = json.loads(answer)
    choices = response["choices"]
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(f"the answer is no completion: {answer[:300]!r}; is this the root of an OpenAI server?") from error
  if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], Mapping):
    count = len(choices) if isinstance(choices, list) else choices
    raise ValueError(f"the answer holds {count} choices; want 1, the n of the request.")
  (choice,) = choices
  if choice.get("finish_reason") not in ("stop", "length"):
    raise Aborted(f"the engine ended the completion with finish_reason {choice.get('finish_reason')!r}")
  sent = choice.get("prompt_token_ids") or response.get("prompt_token_ids")
  if sent is not None and list(sent) != list(prompt):
    raise ValueError(f"the engine read the prompt as {sent[:20]}, not as {list(prompt)[:20]}; it must not add tokens.")
  log_probs = choice.get("logprobs") or {}
  tokens = _tokens(choice, log_probs)
  values = log_probs.get("token_logprobs") or []
  if len(values) != len(tokens):
    raise ValueError(
      f"{len(values)} log-probabilities came for {len(tokens)} tokens; want one for each. The request asks for them; "
      "does a proxy in front of the engine remove them?"
    )
  if not all(isinstance(value, int | float) and math.isfinite(value) for value in values):
    raise ValueError(f"log-probabilities are {values[:20]}; want finite numbers. The engine's weights may be broken.")
  _check_tokens(tokens, choice["finish_reason"], options, shape)
  experts = None
  if options.record_experts:
    experts = _experts(response, choice, len(prompt) + len(tokens) - 1, shape)
  return Answer(tokens, [float(value) for value in values], experts)


def _tokens(choice: Mapping[str, Any], log_probs: Mapping[str, Any]) -> list[int]:
  tokens = choice.get("token_ids")
  if tokens is None:
    words = log_probs.get("tokens") or [""]
    matches = [_TOKEN_ID.fullmatch(str(word)) for word in words]
    tokens = [int(match[1]) for match in matches] if all(matches) else None
  if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
    raise ValueError(
      "the answer has no token ids, neither token_ids nor tokens like 'token_id:123'; vLLM returns them from 0.10.2 "
      "on, SGLang since /v1/completions knows return_token_ids (July 2026)."
    )
  return tokens


def _check_tokens(tokens: Sequence[int], reason: str, options: SamplingOptions, shape: PolicyShape) -> None:
  if not 1 <= len(tokens) <= options.max_new_tokens:
    raise ValueError(f"{len(tokens)} tokens came; want 1 to {options.max_new_tokens}, the max_tokens of the request.")
  if unknown := [token for token in tokens if not 0 <= token < shape.vocab_size]:
    raise ValueError(
      f"token {unknown[0]} came, and the vocabulary has {shape.vocab_size}; does the engine serve another model?"
    )
  if early := [token for token in tokens[:-1] if token in options.stop_ids]:
    raise ValueError(
      f"the completion continues after the stop token {early[0]}; does the engine ignore stop_token_ids?"
    )
  if len(tokens) < options.max_new_tokens and tokens[-1] not in options.stop_ids:
    raise ValueError(
      f"the engine ended the completion ({reason}) after {len(tokens)} of {options.max_new_tokens} tokens with "
      f"{tokens[-1]}, which is none of the stop tokens {options.stop_ids}. The tokenizer's stop tokens and the model's "
      "generation_config.json must agree, and the engine's context must hold prompt and completion."
    )


def _experts(response: Mapping[str, Any], choice: Mapping[str, Any], count: int, shape: PolicyShape) -> np.ndarray:
  """[count, L, K] in the smallest unsigned type, by position, from any of the formats that engines send."""
  sent = choice.get("routed_experts")
  if sent is None:
    sent = (response.get("sglext") or {}).get("routed_experts")
  if sent is None:
    raise ValueError(
      "the answer has no routed experts, which config.loss.replay='sampler' needs: start the engine with "
      "--enable-return-routed-experts (vLLM from 0.21 on, SGLang)."
    )
  try:
    experts = _array(sent, response.get("prompt_routed_experts"), count, shape.experts_per_token)
  except (ValueError, TypeError, KeyError, EOFError, binascii.Error) as error:
    raise ValueError(f"the routed experts cannot be read ({error}): {str(sent)[:80]}") from error
  if experts.ndim == 3 and experts.shape[1] == shape.num_layers != shape.num_moe_layers:
    experts = experts[:, list(shape.moe_layers)]
  # vLLM 0.21 also returns a row for the last token, from which no token was sampled.
  if experts.ndim != 3 or experts.shape[0] not in (count, count + 1):
    raise ValueError(f"routed experts are {list(experts.shape)}; want {count} rows, of all tokens but the last.")
  if experts.shape[1:] != (shape.num_moe_layers, shape.experts_per_token) or experts.dtype.kind not in "iu":
    raise ValueError(
      f"routed experts are {list(experts.shape)} {experts.dtype}; want integers for {shape.num_moe_layers} layers, "
      f"{shape.experts_per_token} each. Does the engine serve another model?"
    )
  if experts.min() < 0 or experts.max() >= shape.num_experts:
    raise ValueError(
      f"experts {experts.min()} to {experts.max()} came; want numbers in [0, {shape.num_experts}). Does the engine "
      "serve another model?"
    )
  return experts[:count].astype(index_dtype(shape.num_experts))


def _array(sent: Any, of_prompt: Any, count: int, experts_per_token: int) -> np.ndarray:
  if isinstance(sent, str):  # vLLM: a .npy file; SGLang: bare int32
    raw = base64.b64decode(sent, validate=True)
    if raw.startswith(_NPY):
      return np.load(io.BytesIO(raw), allow_pickle=False)
    return np.frombuffer(raw, "<i4").reshape(count, -1, experts_per_token)
  if isinstance(sent, Mapping):  # some forks: with shape and dtype
    raw = base64.b64decode(sent["data"], validate=True)
    return np.frombuffer(raw, np.dtype(sent.get("dtype", "int32"))).reshape(sent["shape"])
  return np.asarray([*(of_prompt or []), *sent])  # vLLM 0.21: nested lists
