"""Programs in a sandbox: input and output, status and limits."""

import signal
import time

import pytest

from rspo_jax.rewards.code import sandbox_process
from rspo_jax.rewards.code.sandbox import Sandbox
from rspo_jax.rewards.code.sandbox_process import Limits, collect
from tests.support.code_cases import MIB, SMALL, run, words


@pytest.mark.parametrize("size", [3, 300_000])
def test_a_program_receives_stdin_and_names_and_returns_both_outputs(any_sandbox, size):
  program = "import sys; text = input(); print(len(text), text[:3], X); sys.stderr.write('aside')"
  result = run(any_sandbox, program, stdin=b"abc" * (size // 3) + b"\n", names={"X": (1, 2)})
  assert (result.status, result.stdout, result.stderr) == ("ok", b"%d abc (1, 2)\n" % size, b"aside")
  assert 0 < result.seconds < SMALL.wall_seconds


def test_a_code_object_runs_as_the_main_module(any_sandbox):
  code = compile("import sys, __main__\nprint(__name__, __main__.__name__, sys.argv)", "<program>", "exec")
  assert any_sandbox.run(code).stdout == b"__main__ __main__ ['program']\n"


@pytest.mark.parametrize(
  ("program", "status"),
  [
    ("print('done')", "ok"),
    ("raise SystemExit", "ok"),
    ("raise SystemExit(3)", "failed"),
    ("1 / 0", "failed"),
    ("def (", "no code"),
    ("x = '\\0'\0", "no code"),
    ("import ctypes; ctypes.string_at(0)", "killed"),
    ("x = bytearray(10**12)", "memory"),
    ("x = [0]\nwhile True: x += x", "memory"),
    ("while True: pass", "timeout"),
    ("while True: print('spam' * 99)", "output"),
    ("import sys\nwhile True: sys.stderr.write('spam' * 99)", "output"),
  ],
)
def test_status_reports_how_a_program_ended(any_sandbox, program, status):
  result = run(any_sandbox, program, cpu_seconds=1)
  assert result.status == status, result
  assert len(result.stdout) + len(result.stderr) <= SMALL.output_bytes


def test_both_return_codes_of_a_signal_give_the_same_status():
  assert sandbox_process._status(-signal.SIGXCPU) == sandbox_process._status(128 + signal.SIGXCPU) == "timeout"


def test_a_sleeping_program_is_stopped_at_the_wall_limit(any_sandbox):
  result = run(any_sandbox, "import time; print('now', flush=True); time.sleep(60)", wall_seconds=1.5)
  assert (result.status, result.stdout) == ("timeout", b"now\n")
  assert 1.5 <= result.seconds < 10


def test_a_program_that_ignores_the_cpu_signal_is_killed(strongest):
  program = "import signal; signal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass"
  result = run(strongest, program, cpu_seconds=1)
  assert result.status == "killed" and result.seconds < 15


def test_a_program_can_catch_a_memory_error(any_sandbox):
  program = "try: x = bytearray(10**12)\nexcept MemoryError: print('caught')"
  assert words(any_sandbox, program) == ["caught"]


def test_file_size_and_total_size_of_files_are_bounded(strong):
  program = """
    import os
    try:
      open("big", "w").write("x" * 200_000)
    except OSError as error:
      print(error.errno, os.path.getsize("big"))
    total = 0
    try:
      for number in range(50):
        total += open(f"{number}", "w").write("x" * 100_000)
    except OSError as error:
      print(error.errno, total < 1_000_000)
  """
  assert words(strong, program, folder_bytes=MIB) == ["27", "100000", "28", "True"]  # EFBIG, ENOSPC


def test_threads_are_bounded(strong):
  program = """
    import threading
    stop, count = threading.Event(), 0
    try:
      while count < 2000:
        threading.Thread(target=stop.wait).start()
        count += 1
    except RuntimeError:
      print(count < 100)
    stop.set()
  """
  assert words(strong, program) == ["True"]


def test_limits_apply_to_each_of_several_programs_separately(strongest):
  slow = strongest.start("import time; time.sleep(60)", limits=SMALL)
  loud = strongest.start("while True: print('spam' * 99)", limits=SMALL)
  quick = strongest.start("import time; time.sleep(1)", limits=SMALL)
  start = time.monotonic()
  runs = collect([slow, loud, quick], until=quick)
  assert [result.status for result in runs] == ["timeout", "output", "ok"]
  assert time.monotonic() - start < SMALL.wall_seconds / 2


def test_a_sandbox_that_cannot_be_set_up_raises(any_sandbox):
  broken = Sandbox(any_sandbox.isolation, b"no filter program.")
  with pytest.raises(RuntimeError, match="could not be set up: OSError.*Invalid argument"):
    broken.run("print('hello')")


@pytest.mark.parametrize(("name", "value"), [("wall_seconds", 0), ("memory_bytes", -1), ("cpu_seconds", 1.5)])
def test_invalid_limits_are_refused(name, value):
  with pytest.raises(ValueError, match=f"{name} is {value}"):
    Limits(**{name: value})
