"""Programs that want a verdict they have not earned, or harm: none gets it, and nothing happens."""

import contextlib
import os
import select
import socket
import textwrap
import time

import pytest

from rspo_jax.rewards.code.reward import CodeTask
from rspo_jax.rewards.code.sandbox import Sandbox, find_sandbox
from tests.support.code_attacks import RED_TEAM, SECRET
from tests.support.code_cases import verdict


@pytest.fixture(scope="module")
def box():
  try:
    return find_sandbox()
  except RuntimeError as error:
    pytest.skip(str(error)[:300])


def attack_on(box, name, task, traps=None):
  """The verdict on one of the red team, its words in capitals replaced."""
  program = textwrap.dedent(RED_TEAM[name])
  for word, value in (traps or {}).items():
    program = program.replace(word, value)
  return verdict(box, program, task)


class Watched:
  """A sandbox whose processes all hold one pipe open: who is left at the end can be seen there."""

  def __init__(self, box, writer):
    self._box, self._writer = box, writer

  def start(self, program, *, fds, **options):
    return self._box.start(program, fds=(*fds, self._writer), **options)


@pytest.fixture
def witness(tmp_path, monkeypatch):
  """Puts a case's traps up; afterwards nothing may have happened."""
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
        pass  # some attacks write to whatever is open
      assert select.select([reader], [], [], 0)[0], "a process is left"
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
def test_no_attack_succeeds_or_does_harm(box, attack, witness):
  traps, writer = witness
  found = attack_on(Watched(box, writer), attack, SECRET, traps)
  assert not found.success and found.reason != "right", found
  assert "hunter2" not in found.detail
  if "found" in RED_TEAM[attack]:
    assert "found" not in found.detail


def test_the_red_team_would_pass_if_it_knew_the_answer(box):
  assert verdict(box, "def secret(x): return f'expected-{4697 + x}'", SECRET).reason == "right"


def test_namespaces_alone_hold_without_a_filter(box, witness):
  # As where libseccomp is missing. Six forks are 64 processes.
  traps, writer = witness
  for attack in ("fork bomb", "leaves a daemon", "kills its parents", "network"):
    assert not attack_on(Watched(Sandbox(box.isolation, b""), writer), attack, SECRET, traps).success
  time.sleep(1.2)  # the daemon would have written by now


@pytest.mark.parametrize(
  ("attack", "reason"),
  [
    ("memory bomb", "memory"),
    ("endless output", "output"),
    ("endless answer", "output"),
    ("endless loop", "timeout"),
    ("exits with 0", "error"),
  ],
)
def test_an_attack_is_called_by_its_name(box, attack, reason):
  assert attack_on(box, attack, SECRET).reason == reason


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
def test_tests_that_swallow_errors_do_not_excuse_a_candidate_that_leaves_or_stops_loops(box, test):
  task = CodeTask(test=f"def check(candidate):\n  {test}\n", entry_point="f")
  for body in ("raise StopIteration", "import os; os._exit(0)", "raise SystemExit"):
    swallowed = "except" in test and body == "raise StopIteration"  # an error like any other
    assert verdict(box, f"def f(x): {body}", task).success == swallowed


def test_an_answer_that_grows_in_the_tests_hands_harms_only_them(box):
  task = {"test_list": ["assert list(f(1)) == [1]"]}
  assert verdict(box, "def f(x): return range(10**12)", task).reason == "memory"


def test_a_program_on_stdin_cannot_read_what_is_expected(box, witness):
  program = textwrap.dedent(RED_TEAM["looks for the answer in files and processes"])
  program = program.replace("SECRET", witness[0]["SECRET"]) + "\nprint(secret(0))"
  found = verdict(box, program, {"cases": [["", "expected-4711"]]})
  assert (found.success, found.reason) == (False, "wrong answer") and "None" in found.detail
