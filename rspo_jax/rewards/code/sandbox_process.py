"""Running sandbox processes: their limits, input, output and end, for one process or several together."""

import contextlib
import dataclasses
import os
import re
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from typing import NamedTuple

from rspo_jax.rewards.code.sandbox_child import NO_CODE, OUT_OF_MEMORY, STARTED

_MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Limits:
  """Resource limits of a program.

  Attributes:
    wall_seconds: from its start to its end, including about 50 ms for the start of Python.
    cpu_seconds: sum over its threads, whole seconds.
    memory_bytes: address space; Python itself takes about 20 MiB.
    processes: processes and threads together. With the filter there is one process, so it bounds threads. It does not
      apply to root: there the filter bounds the processes, and memory_bytes the threads.
    output_bytes: stdout and stderr together.
    file_bytes: size of one file.
    folder_bytes: all files together; not enforced by 'rlimits'.
  Raises:
    ValueError: a limit that is not positive, or not an integer where one is required.
  """

  wall_seconds: float = 10.0
  cpu_seconds: int = 5
  memory_bytes: int = 512 * _MIB
  processes: int = 32
  output_bytes: int = _MIB
  file_bytes: int = _MIB
  folder_bytes: int = 16 * _MIB

  def __post_init__(self):
    for name, value in dataclasses.asdict(self).items():
      integer = name != "wall_seconds"
      if value <= 0 or (integer and not isinstance(value, int)):
        raise ValueError(f"{name} is {value}; want a positive {'integer' if integer else 'number'}.")


class Run(NamedTuple):
  """The result of running a program.

  Attributes:
    status: 'ok' (exit status 0), 'failed' (another one), 'timeout' (wall or CPU), 'memory' (an uncaught MemoryError),
      'output' (more than output_bytes), 'no code' (does not compile) or 'killed' (by a signal). A program can fake
      any of them, so a reward must depend on its output as well.
    stdout, stderr: bytes, together at most output_bytes.
    seconds: wall time.
  """

  status: str
  stdout: bytes
  stderr: bytes
  seconds: float


class Process:
  """A program that runs in a sandbox. `collect` writes its stdin, reads its output, ends it and returns its `Run`."""

  def __init__(self, popen: subprocess.Popen, payload: bytes, limits: Limits, folder: str | None):
    """folder: the private folder of a program without namespaces, removed at the end; else None."""
    self._popen, self._unsent, self._folder = popen, memoryview(payload), folder
    self._start_time = time.monotonic()
    self._deadline = self._start_time + limits.wall_seconds
    self._bytes_left = limits.output_bytes + len(STARTED)
    self._output = {popen.stdout: bytearray(), popen.stderr: bytearray()}
    self._stop_reason = ""
    self.run: Run | None = None
    for pipe in (popen.stdin, *self._output):
      os.set_blocking(pipe.fileno(), False)

  def stop(self, reason: str) -> None:
    """Kills the program; the first reason becomes its status. No effect after `close`."""
    self._stop_reason = self._stop_reason or reason
    if self._folder is not None or not self._stop_namespace():
      with contextlib.suppress(ProcessLookupError):
        os.killpg(self._popen.pid, signal.SIGKILL)

  def _stop_namespace(self) -> bool:
    """Kills the children of the started process: the namespace's first process, whose end kills all others in it.

    The started process then reaps its children and exits. If it were killed instead, they would be inherited by the
    machine's first process, which in a container may not reap them. It is suspended (SIGSTOP) while its children are
    listed and killed, so that no process id is reused in between.
    Returns whether there was a child to kill.
    """
    pid = self._popen.pid
    with contextlib.suppress(OSError):
      os.kill(pid, signal.SIGSTOP)
      with open(f"/proc/{pid}/task/{pid}/children") as file:
        children = [int(child) for child in file.read().split()]
      for child in children:
        os.kill(child, signal.SIGKILL)
      os.kill(pid, signal.SIGCONT)
      return bool(children)
    return False

  def shorten_deadline(self, seconds: float) -> None:
    """Lets the program run for at most `seconds` from now."""
    self._deadline = min(self._deadline, time.monotonic() + seconds)

  def register(self, poll: select.poll) -> float:
    """Registers the open pipes; returns the longest time to wait for them, seconds."""
    if not self._popen.stdin.closed:
      poll.register(self._popen.stdin, select.POLLOUT)
    reading = [pipe for pipe in self._output if not pipe.closed]
    for pipe in reading:
      poll.register(pipe, select.POLLIN)
    # A program that has closed its output is usually about to exit.
    return min(0.02 if reading else 0.001, max(0.0, self._deadline - time.monotonic()))

  def step(self) -> bool:
    """Reads and writes without blocking; returns whether the program has ended, and sets `run` if so.

    Raises:
      RuntimeError: the sandbox could not be set up.
    """
    # Checked before reading, so that all output of an ended program is in the pipes. WNOWAIT does not reap it, so that
    # the id of its process group is not reused.
    ended = os.waitid(os.P_PID, self._popen.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    self._send()
    for pipe in self._output:
      self._receive(pipe)
    if ended:
      stop_reason = self._stop_reason
      self.close()
      self.run = self._result(stop_reason)
    elif time.monotonic() > self._deadline:
      self.stop("timeout")
    return ended

  def close(self) -> None:
    """Kills the program and its descendants, closes its pipes and removes its private folder."""
    while self._popen.returncode is None:
      self.stop("killed")
      with contextlib.suppress(subprocess.TimeoutExpired):
        self._popen.wait(1.0)
    for pipe in (self._popen.stdin, *self._output):
      pipe.close()
    if self._folder is not None:
      shutil.rmtree(self._folder, ignore_errors=True)

  def _send(self) -> None:
    try:
      while self._unsent:
        self._unsent = self._unsent[os.write(self._popen.stdin.fileno(), self._unsent) :]
    except BlockingIOError:
      return
    except BrokenPipeError:
      pass
    self._popen.stdin.close()

  def _receive(self, pipe) -> None:
    while not pipe.closed:
      try:
        data = os.read(pipe.fileno(), 65536)
      except BlockingIOError:
        return
      self._output[pipe] += data[: self._bytes_left]
      if len(data) > self._bytes_left:
        self.stop("output")
      self._bytes_left = max(0, self._bytes_left - len(data))
      if not data:
        pipe.close()

  def _result(self, stop_reason: str) -> Run:
    code = self._popen.returncode
    stdout, stderr = (bytes(output) for output in self._output.values())
    if not stop_reason and not stdout.startswith(STARTED):
      # Two processes may raise at the same time, and the end of one truncates the traceback of the other.
      lines = stderr.decode(errors="replace").strip().splitlines() or [""]
      reason = next((line for line in reversed(lines) if re.match(r"\w*Error\b", line)), lines[-1])
      raise RuntimeError(
        f"A sandbox could not be set up: {reason} (exit status {code}). If earlier ones worked, the machine is short "
        "of memory or processes: run fewer programs at a time."
      )
    stdout = stdout.removeprefix(STARTED)
    return Run(stop_reason or _status(code), stdout, stderr, time.monotonic() - self._start_time)


def _status(code: int) -> str:
  """Status for a return code: -signal, as subprocess reports it, or 128 + signal, as bubblewrap and the child exit."""
  code = 128 - code if code < 0 else code
  statuses = {0: "ok", OUT_OF_MEMORY: "memory", NO_CODE: "no code", 128 + signal.SIGXCPU: "timeout"}
  return statuses.get(code, "killed" if code > 128 else "failed")


def collect(processes: Sequence[Process], until: Process | None = None) -> list[Run]:
  """Writes stdin, reads output and enforces the limits of processes until all have ended.

  Args:
    processes: of one sandbox or several.
    until: one of them; after it has ended, the others are given half a second to end.
  Returns:
    The result of each process, in order.
  Raises:
    RuntimeError: a sandbox could not be set up.
  """
  running = list(processes)
  try:
    while running:
      poll = select.poll()
      poll.poll(1000 * min([process.register(poll) for process in running]))
      for process in list(running):
        if process.step():
          running.remove(process)
      if until is not None and until not in running:
        for process in running:
          process.shorten_deadline(0.5)
        until = None
  finally:
    for process in running:
      process.close()
  return [process.run for process in processes]
