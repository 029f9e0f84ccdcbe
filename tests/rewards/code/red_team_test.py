"""Adversarial programs: none obtains an undeserved verdict, and none harms the host."""

import contextlib
import os
import select
import socket
import textwrap
import time

import pytest

from rspo_jax.rewards.code.reward import CodeTask
from rspo_jax.rewards.code.sandbox import Sandbox
from tests.support.code_attacks import RED_TEAM, SECRET
from tests.support.code_cases import verdict

# The reason of these verdicts is part of the contract; of the others it may differ by isolation.
REASONS = {
  "memory bomb": "memory",
  "endless output": "output",
  "endless answer": "output",
  "endless loop": "timeout",
  "exits with 0": "error",
}


def attack_verdict(box, name, task, traps=None):
  """The verdict for an attack. traps: {placeholder in the program: its value}."""
  program = textwrap.dedent(RED_TEAM[name])
  for word, value in (traps or {}).items():
    program = program.replace(word, value)
  return verdict(box, program, task)


class PipeHolder:
  """A sandbox whose processes inherit the writing end of a pipe, so that the pipe shows when the last one has ended."""

  def __init__(self, box, writer):
    self._box, self._writer = box, writer

  def start(self, program, *, fds, **options):
    return self._box.start(program, fds=(*fds, self._writer), **options)


@pytest.fixture
def harm_check(tmp_path, monkeypatch):
  """Yields traps and the writing end of a pipe; afterwards checks that no process, connection or file change exists."""
  secret, harm = tmp_path / "kept" / "secret", tmp_path / "harm"
  secret.parent.mkdir()
  secret.write_text("hunter2 expected-")
  monkeypatch.setenv("RSPO_JAX_SECRET", "hunter2")
  reader, writer = os.pipe()
  try:
    with socket.create_server(("127.0.0.1", 0)) as server:
      traps = {"SECRET": str(secret), "HARM": str(harm), "PORT": str(server.getsockname()[1])}
      yield traps, writer
      os.close(writer)
      while select.select([reader], [], [], 10)[0] and os.read(reader, 4096):
        pass  # some attacks write to every open descriptor
      assert select.select([reader], [], [], 0)[0], "a process is still running"
      server.settimeout(0.05)
      with pytest.raises(TimeoutError):
        server.accept()
    assert secret.read_text() == "hunter2 expected-"
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
  finally:
    with contextlib.suppress(OSError):
      os.close(writer)
    os.close(reader)


@pytest.mark.parametrize("attack", RED_TEAM)
def test_no_attack_succeeds_or_does_harm(box, attack, harm_check):
  traps, writer = harm_check
  result = attack_verdict(PipeHolder(box, writer), attack, SECRET, traps)
  assert not result.success and result.reason != "right", result
  assert result.reason == REASONS.get(attack, result.reason)
  assert "hunter2" not in result.detail
  if "found" in RED_TEAM[attack]:
    assert "found" not in result.detail


def test_a_program_that_returns_the_secret_passes(box):
  assert verdict(box, "def secret(x): return f'expected-{4697 + x}'", SECRET).reason == "right"


def test_namespaces_suffice_without_a_filter(box, harm_check):
  # The case of a machine without libseccomp.
  traps, writer = harm_check
  for attack in ("fork bomb", "leaves a daemon", "kills its parents", "network"):
    assert not attack_verdict(PipeHolder(Sandbox(box.isolation, b""), writer), attack, SECRET, traps).success
  time.sleep(1.2)  # longer than the daemon waits before it writes


@pytest.mark.parametrize(
  "test",
  [
    "assert all(map(candidate, [1, 2]))",
    "for _ in map(candidate, [1]): return\n  assert False",
    "try: candidate(1)\n  except: pass",
    "try: candidate(1)\n  except Exception: pass\n  try: candidate(2)\n  except BaseException: pass",
    "assert candidate(1) or True",
    "pass",
  ],
)
def test_exiting_and_ending_loops_fail_even_if_the_tests_catch_all_errors(box, test):
  task = CodeTask(test=f"def check(candidate):\n  {test}\n", entry_point="f")
  for body in ("raise StopIteration", "import os; os._exit(0)", "raise SystemExit"):
    caught = "except" in test and body == "raise StopIteration"  # received as a RuntimeError
    assert verdict(box, f"def f(x): {body}", task).success == caught


def test_an_answer_that_exhausts_the_checkers_memory_gives_the_reason_memory(box):
  task = {"test_list": ["assert list(f(1)) == [1]"]}
  assert verdict(box, "def f(x): return range(10**12)", task).reason == "memory"


def test_a_program_on_stdin_cannot_read_the_expected_output(box, harm_check):
  program = textwrap.dedent(RED_TEAM["looks for the answer in files and processes"])
  program = program.replace("SECRET", harm_check[0]["SECRET"]) + "\nprint(secret(0))"
  result = verdict(box, program, {"cases": [["", "expected-4711"]]})
  assert (result.success, result.reason) == (False, "wrong answer") and "None" in result.detail
