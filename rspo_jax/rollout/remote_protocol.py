"""Requests to an inference engine over HTTP and the meaning of its answers: OpenAI's /v1/completions on token ids.

docs/remote_engine.md says which engines and versions speak this protocol.
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
  """What answers are checked against: V, L, K, E of the policy; moe_layers: indices of its L layers with experts among
  all num_layers of the model, for engines that return an entry for every layer."""

  vocab_size: int
  num_moe_layers: int
  experts_per_token: int
  num_experts: int
  moe_layers: tuple[int, ...] = ()
  num_layers: int = 0


class Answer(NamedTuple):
  """What an engine returned. tokens, log_probs: C each. experts: [prompt + C - 1, L, K], by position, or None."""

  tokens: list[int]
  log_probs: list[float]
  experts: np.ndarray | None


class Aborted(Exception):
  """The engine gave the completion up, as it does when it is paused; a retry may succeed."""


def request_of(prompt: Sequence[int], options: SamplingOptions, seed: int, model: str = "") -> dict[str, Any]:
  """The JSON of a request for one completion.

  One, although `n` could request all samples of a prompt: engines differ in how they seed several, and SGLang returns
  the experts of the first only. Engines cache prefixes.

  Every sampling parameter is sent, since engines take missing ones from the model's `generation_config.json`.
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
    Aborted: the engine did not finish it.
    ValueError: it does not match the request; says what came, what was wanted and the cure.
  """
  try:
    response = json.loads(answer)
    choices = response["choices"]
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(f"the answer is no completion: {answer[:300]!r}; is this the root of an OpenAI server?") from error
  if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], Mapping):
    found = len(choices) if isinstance(choices, list) else choices
    raise ValueError(f"the answer holds {found} choices; want 1, as the request says with n.")
  (choice,) = choices
  if choice.get("finish_reason") not in ("stop", "length"):
    raise Aborted(f"the engine ended the completion with finish_reason {choice.get('finish_reason')!r}")
  sent = choice.get("prompt_token_ids") or response.get("prompt_token_ids")
  if sent is not None and list(sent) != list(prompt):
    raise ValueError(f"the engine read the prompt as {sent[:20]}, not as {list(prompt)[:20]}; it must not add tokens.")
  log_probs = choice.get("logprobs") or {}
  tokens = _tokens(choice, log_probs)
  given = log_probs.get("token_logprobs") or []
  if len(given) != len(tokens):
    raise ValueError(
      f"{len(given)} log-probabilities came for {len(tokens)} tokens; want one for each. The request asks for them; "
      "does something between here and the engine leave them out?"
    )
  if not all(isinstance(value, int | float) and math.isfinite(value) for value in given):
    raise ValueError(f"log-probabilities are {given[:20]}; want finite numbers. The engine's weights may be broken.")
  _check_tokens(tokens, choice["finish_reason"], options, shape)
  experts = None
  if options.record_experts:
    experts = _experts(response, choice, len(prompt) + len(tokens) - 1, shape)
  return Answer(tokens, [float(value) for value in given], experts)


def _tokens(choice: Mapping[str, Any], log_probs: Mapping[str, Any]) -> list[int]:
  tokens = choice.get("token_ids")
  if tokens is None:
    words = log_probs.get("tokens") or [""]
    found = [_TOKEN_ID.fullmatch(str(word)) for word in words]
    tokens = [int(match[1]) for match in found] if all(found) else None
  if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
    raise ValueError(
      "the answer has no token ids, neither token_ids nor tokens like 'token_id:123'; vLLM gives them from 0.10.2 on, "
      "SGLang since return_token_ids came to /v1/completions (July 2026)."
    )
  return tokens


def _check_tokens(tokens: Sequence[int], reason: str, options: SamplingOptions, shape: PolicyShape) -> None:
  if not 1 <= len(tokens) <= options.max_new_tokens:
    raise ValueError(f"{len(tokens)} tokens came; want 1 to {options.max_new_tokens}, as max_tokens says.")
  if wrong := [token for token in tokens if not 0 <= token < shape.vocab_size]:
    raise ValueError(
      f"token {wrong[0]} came, and the vocabulary has {shape.vocab_size}; does the engine serve another model?"
    )
  if early := [token for token in tokens[:-1] if token in options.stop_ids]:
    raise ValueError(f"the completion goes on after the stop token {early[0]}; does the engine ignore stop_token_ids?")
  if len(tokens) < options.max_new_tokens and tokens[-1] not in options.stop_ids:
    raise ValueError(
      f"the engine ended the completion ({reason}) after {len(tokens)} of {options.max_new_tokens} tokens with "
      f"{tokens[-1]}, which is none of the stop tokens {options.stop_ids}. Let the tokenizer's stop tokens and the "
      "model's generation_config.json agree, and the engine's context hold prompt and completion."
    )


def _experts(response: Mapping[str, Any], choice: Mapping[str, Any], count: int, shape: PolicyShape) -> np.ndarray:
  """[count, L, K] in the smallest unsigned type, by position, from any of the forms that engines send."""
  given = choice.get("routed_experts")
  if given is None:
    given = (response.get("sglext") or {}).get("routed_experts")
  if given is None:
    raise ValueError(
      "the answer names no routed experts, which config.loss.replay='sampler' needs: start the engine with "
      "--enable-return-routed-experts (vLLM from 0.21 on, SGLang)."
    )
  try:
    found = _array(given, response.get("prompt_routed_experts"), count, shape.experts_per_token)
  except (ValueError, TypeError, KeyError, EOFError, binascii.Error) as error:
    raise ValueError(f"the routed experts cannot be read ({error}): {str(given)[:80]}") from error
  if found.ndim == 3 and found.shape[1] == shape.num_layers != shape.num_moe_layers:
    found = found[:, list(shape.moe_layers)]
  # vLLM 0.21 has a row for the last token too, which nothing was drawn from.
  if found.ndim != 3 or found.shape[0] not in (count, count + 1):
    raise ValueError(f"routed experts are {list(found.shape)}; want {count} rows, of all tokens but the last.")
  if found.shape[1:] != (shape.num_moe_layers, shape.experts_per_token) or found.dtype.kind not in "iu":
    raise ValueError(
      f"routed experts are {list(found.shape)} {found.dtype}; want integers for {shape.num_moe_layers} layers, "
      f"{shape.experts_per_token} each. Does the engine serve another model?"
    )
  if found.min() < 0 or found.max() >= shape.num_experts:
    raise ValueError(f"expert {found.min()} or {found.max()} came; want numbers in [0, {shape.num_experts}).")
  return found[:count].astype(index_dtype(shape.num_experts))


def _array(given: Any, of_prompt: Any, count: int, experts_per_token: int) -> np.ndarray:
  if isinstance(given, str):  # vLLM: a .npy file; SGLang: bare int32
    raw = base64.b64decode(given, validate=True)
    if raw.startswith(_NPY):
      return np.load(io.BytesIO(raw), allow_pickle=False)
    return np.frombuffer(raw, "<i4").reshape(count, -1, experts_per_token)
  if isinstance(given, Mapping):  # with its shape beside it
    raw = base64.b64decode(given["data"], validate=True)
    return np.frombuffer(raw, np.dtype(given.get("dtype", "int32"))).reshape(given["shape"])
  return np.asarray([*(of_prompt or []), *given])  # vLLM 0.21: nested lists
