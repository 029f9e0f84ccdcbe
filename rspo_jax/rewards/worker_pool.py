"""A function run on items in worker processes that can be killed, so that no item can hang or end the caller.

Every worker runs one item at a time and is killed (SIGKILL) when that item is over its time; another takes its place.
A worker runs this file as its program and the function's file, nothing else: neither the caller's main module nor a
package's `__init__` (ours imports JAX) is loaded, and nothing is forked.
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

START_SECONDS = 120.0  # to import what the function needs, on a busy machine
START_ATTEMPTS = 3
ORPHAN_SECONDS = 2.0  # after the time of an item: its worker then ends by itself, should the caller be gone


class Outcome(NamedTuple):
  """What became of an item.

  Attributes:
    status: 'ok'; 'error', it raised; 'timeout', it was killed for its time; 'died', it ended its process.
    value: what the function returned if 'ok', else why as text.
  """

  status: Literal["ok", "timeout", "error", "died"]
  value: Any


class _Worker:
  """One process. `deadline` is when it must have answered: it starts up, or runs the item number `index`."""

  def __init__(self, arguments: Sequence[str]):
    self.connection, theirs = connection.Pipe()
    with theirs:
      self._process = subprocess.Popen(
        [sys.executable, "-P", __file__, str(theirs.fileno()), *arguments],
        stdin=subprocess.DEVNULL,
        pass_fds=[theirs.fileno()],
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
    with contextlib.suppress(ConnectionError):  # it has ended, as listening to it will show
      self.connection.send(item)

  def kill(self) -> int:
    """Ends the process at once; its exit status."""
    self._process.kill()
    self.connection.close()
    return self._process.wait()


class WorkerPool:
  """A function run on batches of items by processes that can be killed.

  A context manager; without it the workers end with the process that made the pool, even if that is killed. Not to be
  used from several threads at once.
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
    """Starts the workers, which load the function meanwhile.

    Args:
      function_path: "package.module:function" of one argument. Its module is loaded by its file, alone: it must not
        import its own package. Items and what it returns are pickled.
      workers: processes, 1 or more.
      timeout: seconds that an item may take, by the clock.
      recycle: items after which a worker is replaced, so that caches and leaks stay small.
      memory_mib: address space of a worker, where the system can limit it; beyond it an item raises MemoryError.
      argument: if given, the function is called with it once, while the worker starts, and returns what items are
        given to.
    Raises:
      ValueError: a setting out of range, or a function that is not there.
    """
    for name, value in (("workers", workers), ("recycle", recycle), ("memory_mib", memory_mib)):
      if value < 1:
        raise ValueError(f"{name} is {value}; want 1 or more.")
    if not 0 < timeout < float("inf"):
      raise ValueError(f"timeout is {timeout}; want seconds, above 0 and finite.")
    self._arguments = (*_find(function_path), str(timeout + ORPHAN_SECONDS), str(memory_mib << 20), argument)
    self._function_path, self._timeout, self._recycle = function_path, timeout, recycle
    self._failed_starts = 0
    self._workers = [_Worker(self._arguments) for _ in range(workers)]

  def __enter__(self) -> "WorkerPool":
    return self

  def __exit__(self, *error: Any) -> None:
    self.close()

  def close(self) -> None:
    """Kills the workers; the pool is of no use afterwards."""
    while self._workers:
      self._workers.pop().kill()

  def map(self, items: Sequence[Any]) -> list[Outcome]:
    """Runs the function on every item; outcomes in the order of the items.

    Neighbours go to the same worker, in order, so that what they share can be cached; who has no more takes from the
    end of the longest row.

    Raises:
      RuntimeError: the pool is closed, or workers end before they have loaded the function.
    """
    if not self._workers:
      raise RuntimeError("The worker pool is closed; make a new one.")
    outcomes: list[Outcome | None] = [None] * len(items)
    share = -(-len(items) // len(self._workers))
    waiting = [deque(range(len(items))[place * share :][:share]) for place in range(len(self._workers))]
    for place, worker in enumerate(self._workers):
      if worker.idle and worker.connection.poll():  # it has nothing to say, so it was killed from outside
        self._replace(place)
    try:
      while any(waiting) or any(worker.index is not None for worker in self._workers):
        for place, worker in enumerate(self._workers):
          if any(waiting) and worker.idle:
            index = waiting[place].popleft() if waiting[place] else max(waiting, key=len).pop()
            worker.start(index, items[index], self._timeout)
        self._listen(outcomes)
    except BaseException:
      for place, worker in enumerate(self._workers):
        if worker.index is not None:  # or the next call would take this one's answer for its own
          self._replace(place)
      raise
    return outcomes

  def _listen(self, outcomes: list[Outcome | None]) -> None:
    """Waits for the next answer or deadline and takes in all that came."""
    busy = [worker for worker in self._workers if not worker.idle]
    left = min(worker.deadline for worker in busy) - time.monotonic()
    answered = connection.wait([worker.connection for worker in busy], max(left, 0))
    for place, worker in enumerate(self._workers):
      if worker.connection in answered:
        try:
          message = worker.connection.recv()
        except (EOFError, OSError):
          self._lose(place, outcomes)
          continue
        if worker.ready:
          outcomes[worker.index] = Outcome(*message)
          worker.index, worker.done = None, worker.done + 1
          if worker.done >= self._recycle:
            self._replace(place)
        else:
          worker.ready, self._failed_starts = True, 0
      elif not worker.idle and worker.deadline <= time.monotonic() and not worker.connection.poll():
        self._lose(place, outcomes)

  def _lose(self, place: int, outcomes: list[Outcome | None]) -> None:
    """Replaces a worker that has ended or is over its time, and says so of its item."""
    worker = self._workers[place]
    late = worker.deadline <= time.monotonic()
    status = self._replace(place)
    if worker.index is not None:
      took = f"over {self._timeout:g} s"
      outcomes[worker.index] = Outcome("timeout", took) if late else Outcome("died", f"exit status {status}")
      return
    self._failed_starts += 1
    if self._failed_starts >= START_ATTEMPTS:
      raise RuntimeError(
        f"Workers for {self._function_path} fail to start (exit status {status}); the cause is on stderr. Its module "
        "must load by itself, within memory_mib, and not import its own package."
      )

  def _replace(self, place: int) -> int:
    status = self._workers[place].kill()
    self._workers[place] = _Worker(self._arguments)
    return status


def _find(function_path: str) -> tuple[str, str, str]:
  """Module name, file and function of a path. ValueError where there is no such file."""
  module, _, function = function_path.partition(":")
  try:
    found = importlib.util.find_spec(module)
  except (ImportError, ValueError):
    found = None
  if found is None or not found.origin or not os.path.isfile(found.origin) or not function.isidentifier():
    raise ValueError(f"function_path is {function_path!r}; want 'package.module:function' of an importable module.")
  return module, found.origin, function


def _serve(descriptor: str, module: str, file: str, function: str, seconds: str, memory: str, argument: str) -> None:
  """The worker's loop: an item in, an `Outcome` out, until the other end is closed."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the caller's to handle
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
      # The system ends this process when the alarm rings, whatever it is doing, even if nobody is left to kill it.
      signal.setitimer(signal.ITIMER_REAL, float(seconds))
      try:
        answer = pickle.dumps(("ok", run(item)))
      except BaseException as error:
        answer = pickle.dumps(("error", traceback.format_exception_only(error)[-1].strip()))
      caller.send_bytes(answer)
      signal.setitimer(signal.ITIMER_REAL, 0)


if __name__ == "__main__":
  _serve(*sys.argv[1:])
