"""Worker processes: each holds one call to be timed, compiled and warm, and runs it once per request.

Processes, because OpenMP reads its wait policy and JAX its number of CPU devices once per process, because peak memory
is measured per process, and because users run only one of the libraries. Alternating torch and JAX within one process
gave the same times.
"""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from benchmarks.timing import Run, clocked, peak_memory
from experiments.setup.allocator import keep_freed_memory


class Case(NamedTuple):
  """A call to be timed. call: does the whole work once. tokens: per call. facts: values for the report, as in JSON."""

  call: Callable[[], Any]
  tokens: int
  facts: dict[str, Any]


class Worker:
  """A running subprocess with one `Case`. Calling it runs the case once and returns the `Run` measured there.

  Attributes:
    tokens: tokens per call. facts: of the case.
  """

  def __init__(self, target: str, settings: Mapping[str, Any], env: Mapping[str, str] | None = None):
    """Starts `target` and waits until it is ready.

    Args:
      target: "module:function", a function of keyword arguments that returns a `Case`, or for `report` a dict.
      settings: its arguments, as in JSON. env: environment variables in addition to those of this process.
    Raises:
      RuntimeError: the child ended before it was ready; its traceback is on stderr.
    """
    self._name = f"{target} {json.dumps(settings)}"
    command = [sys.executable, "-m", "benchmarks.workers", target, json.dumps(dict(settings))]
    self._child = subprocess.Popen(
      command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **(env or {})}
    )
    ready = self._answer()
    self.tokens: int = ready["tokens"]
    self.facts: dict[str, Any] = ready["facts"]

  def _answer(self) -> dict[str, Any]:
    line = self._child.stdout.readline()
    if not line:
      raise RuntimeError(f"the benchmark worker {self._name} ended with status {self._child.wait()}.")
    return json.loads(line)

  def _ask(self, request: str) -> dict[str, Any]:
    self._child.stdin.write(request + "\n")
    self._child.stdin.flush()
    return self._answer()

  def __call__(self) -> Run:
    return Run(**self._ask("run"))

  def peak_memory(self) -> float:
    """MiB: the largest resident size of the child so far."""
    return self._ask("memory")["mib"]

  def close(self) -> None:
    self._child.stdin.close()
    self._child.wait()
    self._child.stdout.close()

  def __enter__(self) -> "Worker":
    return self

  def __exit__(self, *error: Any) -> None:
    self.close()


def report(target: str, settings: Mapping[str, Any], env: Mapping[str, str] | None = None) -> dict[str, Any]:
  """The dict that a function returns, called in a new process; arguments as for `Worker`.

  Raises:
    RuntimeError: the child failed; its traceback is on stderr.
  """
  with Worker(target, settings, env) as worker:
    return worker.facts


def _serve(target: str, settings: str) -> None:
  # Libraries may print to stdout: keep a copy of it for answers and redirect the rest to stderr.
  answers = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)

  def answer(message: dict[str, Any]) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()

  keep_freed_memory()  # as the training command does; for both sides of every comparison
  module, function = target.split(":")
  case = getattr(importlib.import_module(module), function)(**json.loads(settings))
  if isinstance(case, dict):
    answer({"tokens": 0, "facts": case})
    return
  run = clocked(case.call)
  answer({"tokens": case.tokens, "facts": case.facts})
  for line in sys.stdin:
    answer({"mib": peak_memory()} if line.strip() == "memory" else run()._asdict())


if __name__ == "__main__":
  _serve(*sys.argv[1:])
