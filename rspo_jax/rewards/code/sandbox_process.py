"""A program that runs in a sandbox: fed, read and held to its limits, as one of several or alone."""

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
  """What a program may use.

  Attributes:
    wall_seconds: from its start to its end; Python's own start, some 50 ms, counts.
    cpu_seconds: of all its threads together, whole seconds.
    memory_bytes: address space; Python itself takes about 20 MiB.
    processes: with threads. With the filter the one process has threads only. Root is not bound by this number: there
      the filter bounds processes, and memory the threads.
    output_bytes: stdout and stderr together.
    file_bytes: the largest file.
    folder_bytes: all files together (not bounded by 'rlimits').
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
      whole = name != "wall_seconds"
      if value <= 0 or (whole and not isinstance(value, int)):
        raise ValueError(f"{name} is {value}; want a positive {'whole ' if whole else ''}number.")


class Run(NamedTuple):
  """What became of a program.

  Attributes:
    status: 'ok' (exit status 0), 'failed' (another one), 'timeout' (wall or CPU), 'memory' (an uncaught MemoryError),
      'output' (wrote more than it may), 'no code' (does not compile) or 'killed' (by a signal). A program can feign
      any of them: judge by what it wrote.
    stdout, stderr: bytes, within output_bytes.
    seconds: wall time.
  """

  status: str
  stdout: bytes
  stderr: bytes
  seconds: float


class Process:
  """A program that runs in a sandbox. `collect` feeds it, reads it, ends it and gives its `Run`."""

  def __init__(self, popen: subprocess.Popen, payload: bytes, limits: Limits, folder: str | None):
    """folder: of a program in no namespace; removed at the end."""
    self._popen, self._unsent, self._folder = popen, memoryview(payload), folder
    self._began = time.monotonic()
    self._deadline = self._began + limits.wall_seconds
    self._room = limits.output_bytes + len(STARTED)
    self._written = {popen.stdout: bytearray(), popen.stderr: bytearray()}
    self._stopped = ""
    self.run: Run | None = None
    for pipe in (popen.stdin, *self._written):
      os.set_blocking(pipe.fileno(), False)

  def stop(self, reason: str) -> None:
    """Kills it; why becomes the status if it is the first reason. Nothing happens once it is closed."""
    self._stopped = self._stopped or reason
    if self._folder is not None or not self._stop_namespace():
      with contextlib.suppress(ProcessLookupError):
        os.killpg(self._popen.pid, signal.SIGKILL)

  def _stop_namespace(self) -> bool:
    """Kills the children of the process that was started: a namespace's first, with which all others there end.

    The process itself then reaps them and ends. Had it been killed, they would be left to the machine's first process,
    and in containers that may be one that reaps nobody. Held meanwhile, it reaps nobody: the numbers stay theirs.
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

  def hurry(self, seconds: float) -> None:
    """Gives it that long at most from now on."""
    self._deadline = min(self._deadline, time.monotonic() + seconds)

  def watch(self, poll: select.poll) -> float:
    """Registers the pipes that are open; returns for how many seconds to wait at most."""
    if not self._popen.stdin.closed:
      poll.register(self._popen.stdin, select.POLLOUT)
    reading = [pipe for pipe in self._written if not pipe.closed]
    for pipe in reading:
      poll.register(pipe, select.POLLIN)
    # One that has closed its pipes is about to end, as a rule.
    return min(0.02 if reading else 0.001, max(0.0, self._deadline - time.monotonic()))

  def step(self) -> bool:
    """Moves what can be moved without waiting; whether it is over. RuntimeError if its sandbox could not be set up."""
    # Asked before reading, for then what it wrote last is in the pipes; not reaped, so that its group keeps its number.
    ended = os.waitid(os.P_PID, self._popen.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    self._send()
    for pipe in self._written:
      self._receive(pipe)
    if ended:
      stopped = self._stopped
      self.close()
      self.run = self._result(stopped)
    elif time.monotonic() > self._deadline:
      self.stop("timeout")
    return ended

  def close(self) -> None:
    """Ends it and all that it has started, and removes what it left."""
    while self._popen.returncode is None:
      self.stop("killed")
      with contextlib.suppress(subprocess.TimeoutExpired):
        self._popen.wait(1.0)
    for pipe in (self._popen.stdin, *self._written):
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
      self._written[pipe] += data[: self._room]
      if len(data) > self._room:
        self.stop("output")
      self._room = max(0, self._room - len(data))
      if not data:
        pipe.close()

  def _result(self, stopped: str) -> Run:
    code = self._popen.returncode
    stdout, stderr = (bytes(written) for written in self._written.values())
    if not stopped and not stdout.startswith(STARTED):
      # Two processes may have raised at once, and the end of one cuts the other's trace off.
      lines = stderr.decode(errors="replace").strip().splitlines() or [""]
      reason = next((line for line in reversed(lines) if re.match(r"\w*Error\b", line)), lines[-1])
      raise RuntimeError(
        f"A sandbox could not be set up: {reason} (exit status {code}). If others could before, the machine is short "
        "of memory or processes: run fewer programs at a time."
      )
    stdout = stdout.removeprefix(STARTED)
    return Run(stopped or _status(code), stdout, stderr, time.monotonic() - self._began)


def _status(code: int) -> str:
  """The status for a return code: of subprocess, or 128 + signal as bubblewrap and the guest have it."""
  code = 128 - code if code < 0 else code
  known = {0: "ok", OUT_OF_MEMORY: "memory", NO_CODE: "no code"}
  return (known | {128 + signal.SIGXCPU: "timeout"}).get(code, "killed" if code > 128 else "failed")


def collect(processes: Sequence[Process], until: Process | None = None) -> list[Run]:
  """Feeds programs, reads them, holds them to their limits and waits until all have ended.

  Args:
    processes: of one sandbox or several.
    until: once this one has ended, the others get half a second to see that and end.
  Raises:
    RuntimeError: a sandbox could not be set up.
  """
  running = list(processes)
  try:
    while running:
      poll = select.poll()
      poll.poll(1000 * min([process.watch(poll) for process in running]))
      for process in list(running):
        if process.step():
          running.remove(process)
      if until is not None and until not in running:
        for process in running:
          process.hurry(0.5)
        until = None
  finally:
    for process in running:
      process.close()
  return [process.run for process in processes]
