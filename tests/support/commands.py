"""Commands of `experiments` in processes of their own, forked from a process that has already imported the command."""

import multiprocessing
import os
import pathlib
import runpy
import sys
from collections.abc import Mapping, Sequence

_CONTEXT = multiprocessing.get_context("forkserver")


class Command:
  """A running command.

  Imports take seconds, so they happen once, in the server that `multiprocessing` forks children from. JAX is
  initialised in the child: its devices and flags are the child's own.

  Args:
    module: its name, as after `python -m`. arguments: of the command line.
    environment: variables to set; all others are inherited.
    log: file for stdout and stderr.
  """

  def __init__(self, module: str, arguments: Sequence[str], environment: Mapping[str, str], log: pathlib.Path):
    _CONTEXT.set_forkserver_preload([module])
    self._log = log
    self.process = _CONTEXT.Process(target=_run, args=(module, [*arguments], {**environment}, str(log)), daemon=True)
    self.process.start()

  def finish(self, timeout: float) -> tuple[int, str]:
    """Waits until the command ends; returns its exit status (-n if signal n ended it) and its output."""
    self.process.join(timeout)
    assert not self.process.is_alive(), f"still running after {timeout} s:\n{self._log.read_text()}"
    return self.process.exitcode, self._log.read_text()


def _run(module: str, arguments: list[str], environment: dict[str, str], log: str) -> None:
  file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
  os.dup2(file, 1)
  os.dup2(file, 2)
  os.environ |= environment
  sys.argv = [module, *arguments]
  sys.modules.pop(module)  # it runs again, as __main__
  runpy.run_module(module, run_name="__main__", alter_sys=True)
