"""Runs a function on items in worker processes with a time limit, so that no item can hang or end the caller.

Every worker runs one item at a time; at the item's time limit it is killed (SIGKILL) and replaced. A worker executes
this file as its program and loads the function's file, nothing else: neither the caller's main module nor a package's
`__init__` (ours imports JAX), and nothing is forked.
"""

import contextlib
import importlib.util
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections import deque
from collections.abc import Sequence
from multiprocessing import connection
from typing import Any, Literal, NamedTuple

START_SECONDS = 120.0  # limit of a worker's imports, on a busy machine
START_ATTEMPTS = 3
ORPHAN_SECONDS = 2.0  # after an item's time limit, a worker whose caller has ended terminates itself


class Outcome(NamedTuple):
  """The outcome of an item.

  Attributes:
    status: 'ok'; 'error', it raised; 'timeout', it was killed at the time limit; 'died', it ended its process.
    value: the return value if 'ok', else the reason as text.
  """

  status: Literal["ok", "timeout", "error", "died"]
  value: Any


class _Worker:
  """One process, which starts up or runs the item number `index`; `deadline` is the latest time for its answer."""

  def __init__(self, arguments: Sequence[str]):
    self.connection, worker_end = connection.Pipe()
    with worker_end:
      self._process = subprocess.Popen(
        [sys.executable, "-P", __file__, str(worker_end.fileno()), *arguments],
        stdin=subprocess.DEVNULL,
        pass_fds=[worker_end.fileno()],
      )
    self.ready = False
    self.index: int | None = None
    self.done = 0
    self.deadline = time.monotonic() + START_SECONDS

  @property
  def idle(self) -> bool:
    return self.ready and self.index is None

  def start(self, index: int, item: Any, timeout: float) -> None:
    self.index, self.deadline = index, time.monotonic() + timeout
    with contextlib.suppress(ConnectionError):  # its process has ended; `_receive` will notice
      self.connection.send(item)

  def kill(self) -> int:
    """Kills the process; returns its exit status."""
    self._process.kill()
    self.connection.close()
    return self._process.wait()


class WorkerPool:
  """Runs a function on batches of items in processes with a time limit.

  A context manager; workers also end with the process that started them, even if that is killed. Not thread-safe.
  """

  def __init__(
    self,
    function_path: str,
    *,
    workers: int,
    timeout: float,
    recycle: int = 10_000,
    memory_mib: int = 4096,
    argument: str = "",
  ):
    """Starts the workers, which load the function in the background.

    Args:
      function_path: "package.module:function" of one argument. Its module is loaded from its file, without its
        package, which it must not import. Items and return values are pickled.
      workers: number of processes, >= 1.
      timeout: wall-clock seconds per item.
      recycle: number of items after which a worker is replaced, which bounds caches and leaks.
      memory_mib: address space of a worker in MiB, if the system can limit it; beyond it an item raises MemoryError.
      argument: if given, the function is called once with it when the worker starts, and returns the function that
        runs on items.
    Raises:
      ValueError: a setting out of range, or no such module.
    """
    for name, value in (("workers", workers), ("recycle", recycle), ("memory_mib", memory_mib)):
      if value < 1:
        raise ValueError(f"{name} is {value}; want 1 or more.")
    if not 0 < timeout < float("inf"):
      raise ValueError(f"timeout is {timeout}; want seconds, above 0 and finite.")
    self._arguments = (*_locate(function_path), str(timeout + ORPHAN_SECONDS), str(memory_mib << 20), argument)
    self._function_path, self._timeout, self._recycle = function_path, timeout, recycle
    self._failed_starts = 0
    self._workers = [_Worker(self._arguments) for _ in range(workers)]

  def __enter__(self) -> "WorkerPool":
    return self

  def __exit__(self, *error: Any) -> None:
    self.close()

  def close(self) -> None:
    """Kills the workers; the pool cannot be used afterwards."""
    while self._workers:
      self._workers.pop().kill()

  def map(self, items: Sequence[Any]) -> list[Outcome]:
    """Runs the function on every item; outcomes in the order of the items.

    Every worker has a queue of consecutive items, so that it can cache what they share; a worker whose queue is empty
    takes the last item of the longest queue.

    Raises:
      RuntimeError: the pool is closed, or workers end before they have loaded the function.
    """
    if not self._workers:
      raise RuntimeError("The worker pool is closed; start a new one.")
    outcomes: list[Outcome | None] = [None] * len(items)
    share = -(-len(items) // len(self._workers))
    queues = [deque(range(len(items))[number * share :][:share]) for number in range(len(self._workers))]
    for number, worker in enumerate(self._workers):
      if worker.idle and worker.connection.poll():  # idle workers send nothing: its process has been killed
        self._replace(number)
    try:
      while any(queues) or any(worker.index is not None for worker in self._workers):
        for number, worker in enumerate(self._workers):
          if any(queues) and worker.idle:
            index = queues[number].popleft() if queues[number] else max(queues, key=len).pop()
            worker.start(index, items[index], self._timeout)
        self._receive(outcomes)
    except BaseException:
      for number, worker in enumerate(self._workers):
        if worker.index is not None:  # its answer must not reach the next call
          self._replace(number)
      raise
    return outcomes

  def _receive(self, outcomes: list[Outcome | None]) -> None:
    """Waits for the next answer or deadline, then handles all answers and deadlines."""
    busy = [worker for worker in self._workers if not worker.idle]
    remaining = min(worker.deadline for worker in busy) - time.monotonic()
    answered = connection.wait([worker.connection for worker in busy], max(remaining, 0))
    for number, worker in enumerate(self._workers):
      if worker.connection in answered:
        try:
          message = worker.connection.recv()
        except (EOFError, OSError):
          self._lose(number, outcomes)
          continue
        if worker.ready:
          outcomes[worker.index] = Outcome(*message)
          worker.index, worker.done = None, worker.done + 1
          if worker.done >= self._recycle:
            self._replace(number)
        else:
          worker.ready, self._failed_starts = True, 0
      elif not worker.idle and worker.deadline <= time.monotonic() and not worker.connection.poll():
        self._lose(number, outcomes)

  def _lose(self, number: int, outcomes: list[Outcome | None]) -> None:
    """Replaces a worker that has ended or passed its deadline, and records the outcome of its item."""
    worker = self._workers[number]
    late = worker.deadline <= time.monotonic()
    status = self._replace(number)
    if worker.index is not None:
      late_outcome = Outcome("timeout", f"over {self._timeout:g} s")
      outcomes[worker.index] = late_outcome if late else Outcome("died", f"exit status {status}")
      return
    self._failed_starts += 1
    if self._failed_starts >= START_ATTEMPTS:
      raise RuntimeError(
        f"Workers for {self._function_path} fail to start (exit status {status}); the cause is on stderr. Its module "
        "must load without its package, within memory_mib."
      )

  def _replace(self, number: int) -> int:
    status = self._workers[number].kill()
    self._workers[number] = _Worker(self._arguments)
    return status


def _locate(function_path: str) -> tuple[str, str, str]:
  """Module name, file and function of a path. ValueError if there is no such file."""
  module, _, function = function_path.partition(":")
  try:
    spec = importlib.util.find_spec(module)
  except (ImportError, ValueError):
    spec = None
  if spec is None or not spec.origin or not os.path.isfile(spec.origin) or not function.isidentifier():
    raise ValueError(f"function_path is {function_path!r}; want 'package.module:function' of an importable module.")
  return module, spec.origin, function


def _serve(descriptor: str, module: str, file: str, function: str, seconds: str, memory: str, argument: str) -> None:
  """The worker's loop: receives an item and sends an `Outcome`, until the caller closes the connection."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # the caller handles Ctrl-C
  signal.signal(signal.SIGALRM, signal.SIG_DFL)
  with contextlib.suppress(ValueError, OSError):  # macOS has no such limit
    resource.setrlimit(resource.RLIMIT_AS, (int(memory), int(memory)))
  spec = importlib.util.spec_from_file_location(module, file)
  sys.modules[module] = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(sys.modules[module])
  run = getattr(sys.modules[module], function)
  if argument:
    run = run(argument)
  with connection.Connection(int(descriptor)) as caller, contextlib.suppress(EOFError, OSError):
    caller.send("ready")
    while True:
      item = caller.recv()
      # The alarm's default action ends this process, even if the caller no longer exists to kill it.
      signal.setitimer(signal.ITIMER_REAL, float(seconds))
      try:
        answer = pickle.dumps(("ok", run(item)))
      except BaseException as error:
        answer = pickle.dumps(("error", traceback.format_exception_only(error)[-1].strip()))
      caller.send_bytes(answer)
      signal.setitimer(signal.ITIMER_REAL, 0)


if __name__ == "__main__":
  _serve(*sys.argv[1:])
