"""POSTs to an inference engine: retries, time limits, and requests that can be abandoned."""

import contextlib
import json
import socket
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import urllib3

from rspo_jax.rollout.remote_protocol import Aborted

TRANSIENT = (408, 425, 429, 500, 502, 503, 504)  # HTTP statuses that a retry may cure


class EngineError(RuntimeError):
  """An engine cannot be reached, refuses a request, or returns something else than the request asked for."""


class Client:
  """POSTs JSON to an engine and retries where that may help. Thread-safe.

  Args:
    timeout: seconds to wait for an answer. retries: attempts after the first.
    backoff: seconds before the second attempt; doubles with every further attempt, up to 16.
    connections: kept open per server: the number of threads that post.
  Raises:
    ValueError: a setting out of range.
  """

  def __init__(self, *, timeout: float = 600.0, retries: int = 4, backoff: float = 1.0, connections: int = 1):
    if not 0 < timeout < float("inf") or retries < 0 or backoff < 0 or connections < 1:
      raise ValueError(
        f"timeout is {timeout}, retries {retries}, backoff {backoff} and connections {connections}; want seconds above "
        "0, 0 or more retries, a backoff of 0 or more and at least one connection."
      )
    self._timeout, self._retries, self._backoff = timeout, retries, backoff
    limits = urllib3.Timeout(connect=min(timeout, 10.0), read=timeout)
    self._pool = urllib3.PoolManager(num_pools=64, maxsize=connections, timeout=limits, retries=False)
    self._closed, self._lock, self._connections = threading.Event(), threading.Lock(), weakref.WeakSet()
    self._pool.pool_classes_by_scheme = {
      scheme: _recorded(pool, self._record) for scheme, pool in self._pool.pool_classes_by_scheme.items()
    }

  def post(self, urls: Sequence[str], path: str, body: Any, *, what: str, read: Callable[[bytes], Any]) -> Any:
    """The answer, decoded by `read`.

    Args:
      urls: servers; each attempt goes to the next one. what: the requested object, for messages.
      read: raises `ValueError` for an incorrect answer, `Aborted` for one that a retry may cure.
    Raises:
      EngineError: no answer in all attempts, an error that a retry cannot cure, or the client was closed.
    """
    data, failure = json.dumps(body).encode(), "the client is closed"
    for attempt in range(self._retries + 1):
      url = urls[attempt % len(urls)] + path
      if self._closed.wait(min(self._backoff * 2 ** (attempt - 1), 16.0) if attempt else 0):
        break
      try:
        answer = self._pool.request("POST", url, body=data, headers={"Content-Type": "application/json"})
        if answer.status == 200:
          return read(answer.data)
        failure = f"HTTP {answer.status}: {answer.data[:500].decode(errors='replace')}"
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
      "correct? If it is only slow, raise the timeout."
    )

  def close(self) -> None:
    """Abandons the requests in flight: their connections are closed, on which an engine can stop decoding them."""
    self._closed.set()
    with self._lock:
      connections = list(self._connections)
    for connection in connections:
      _shut_down(connection)
    self._pool.clear()

  def _record(self, connection: Any) -> None:
    with self._lock:
      self._connections.add(connection)
    if self._closed.is_set():  # connected while `close` ran
      _shut_down(connection)


def _recorded(pool: type, record: Callable[[Any], None]) -> type:
  """The same class of connection pool; `record` is called with each of its connections once it is connected."""

  class Connection(pool.ConnectionCls):
    def connect(self):
      super().connect()
      record(self)

  return type(pool.__name__, (pool,), {"ConnectionCls": Connection})


def _shut_down(connection: Any) -> None:
  """Ends a connection that another thread may be reading; that thread gets an error."""
  if connection.sock is not None:
    with contextlib.suppress(OSError, AttributeError):  # closed in the meantime
      connection.sock.shutdown(socket.SHUT_RDWR)
