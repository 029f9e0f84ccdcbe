"""An inference engine of our own for tests: OpenAI's /v1/completions over HTTP, answered by a function."""

import base64
import http.server
import io
import json
import threading
from collections.abc import Callable
from typing import Any

import numpy as np


class EngineServer:
  """Listens on a free port of this machine until it is closed.

  Attributes:
    complete: request -> (tokens, log-probs, experts by position [prompt + completion - 1, L, K] or None).
    experts_as: how experts are sent, a key of `EXPERTS`.
    faults: (answer) -> answer, or an HTTP status, or seconds to hang; each is used for one request, in turn.
    requests: (path, body) of all.
    update: called with the body of /update_weights_from_disk.
  """

  def __init__(
    self, complete: Callable[[dict], tuple], *, experts_as: str = "npy", faults=(), update=lambda body: None
  ):
    self.complete, self.experts_as, self.faults, self.update = complete, experts_as, list(faults), update
    self.requests: list[tuple[str, Any]] = []
    self.busy, self.most = 0, 0
    self._lock, self._closing = threading.Lock(), threading.Event()
    handler = type("Handler", (_Handler,), {"engine": self})
    self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    self._server.daemon_threads = True
    self._server.handle_error = lambda request, address: None  # clients that go away are part of the tests
    self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
    threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

  def __enter__(self):
    return self

  def __exit__(self, *error):
    self._closing.set()
    self._server.shutdown()
    self._server.server_close()

  def answer(self, path: str, body: Any) -> tuple[int, Any]:
    with self._lock:
      self.requests.append((path, body))
      fault = self.faults.pop(0) if self.faults and path == "/v1/completions" else None
      self.busy += 1
      self.most = max(self.most, self.busy)
    try:
      if isinstance(fault, int):
        return fault, {"error": {"message": "out of order"}}
      if isinstance(fault, float):
        self._closing.wait(fault)
      if path == "/update_weights_from_disk":
        self.update(body)
        return 200, {"success": True, "message": "Succeeded to update model weights."}
      if path != "/v1/completions":
        return (200, {}) if path.partition("?")[0] in ("/collective_rpc", "/reset_prefix_cache") else (404, {})
      answer = self._completion(body)
      return 200, fault(answer) if callable(fault) else answer
    finally:
      with self._lock:
        self.busy -= 1

  def _completion(self, body: dict) -> dict:
    tokens, log_probs, experts = self.complete(body)
    stopped = tokens[-1] in body["stop_token_ids"]
    choice = {"index": 0, "text": "", "finish_reason": "stop" if stopped else "length", "token_ids": list(tokens)}
    words = [f"token_id:{token}" for token in tokens]
    choice["logprobs"] = {"tokens": words, "token_logprobs": list(log_probs), "top_logprobs": None, "text_offset": []}
    answer = {"id": "cmpl-1", "object": "text_completion", "choices": [choice]}
    if experts is not None:
      EXPERTS[self.experts_as](answer, experts, len(body["prompt"]))
    return answer


def _npy(answer, experts, prompt):
  """vLLM from 0.22 on."""
  held = io.BytesIO()
  np.save(held, experts.astype(np.uint8))
  answer["choices"][0]["routed_experts"] = base64.b64encode(held.getvalue()).decode()


def _nested(answer, experts, prompt):
  """vLLM 0.21; the last token has a row that means nothing."""
  answer["prompt_routed_experts"] = experts[:prompt].tolist()
  answer["choices"][0]["routed_experts"] = [*experts[prompt:].tolist(), experts[0].tolist()]


def _bare(answer, experts, prompt):
  """SGLang."""
  answer["sglext"] = {"routed_experts": base64.b64encode(experts.astype("<i4").tobytes()).decode()}


def _shaped(answer, experts, prompt):
  """Some forks."""
  data = base64.b64encode(experts.astype(np.int32).tobytes()).decode()
  answer["choices"][0]["routed_experts"] = {"data": data, "shape": list(experts.shape), "dtype": "int32"}


EXPERTS = {"npy": _npy, "nested": _nested, "bare": _bare, "shaped": _shaped}


class _Handler(http.server.BaseHTTPRequestHandler):
  engine: EngineServer
  protocol_version = "HTTP/1.1"

  def do_POST(self):
    body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"null")
    status, answer = self.engine.answer(self.path, body)
    data = json.dumps(answer).encode()
    try:
      self.send_response(status)
      self.send_header("Content-Type", "application/json")
      self.send_header("Content-Length", str(len(data)))
      self.end_headers()
      self.wfile.write(data)
    except (BrokenPipeError, ConnectionResetError):  # it did not wait
      self.close_connection = True

  def log_message(self, *arguments):
    pass
