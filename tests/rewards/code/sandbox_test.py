"""Programs in a sandbox: their limits, what they can reach, and what is left of them."""

import ctypes
import functools
import os
import pathlib
import select
import signal
import socket
import subprocess
import sys
import textwrap
import time

import pytest

from rspo_jax.rewards.code import sandbox, sandbox_process
from rspo_jax.rewards.code.sandbox import Sandbox, find_sandbox, sandbox_of
from rspo_jax.rewards.code.sandbox_process import Limits, collect

MIB = 2**20
SMALL = Limits(wall_seconds=20.0, cpu_seconds=2, memory_bytes=256 * MIB, output_bytes=10_000, file_bytes=100_000)
STRONG = ("bubblewrap", "namespaces")


def usable(isolation):
  try:
    return sandbox_of(isolation)
  except RuntimeError as error:
    pytest.skip(str(error)[:300])


@pytest.fixture(scope="module", params=STRONG)
def strong(request):
  found = usable(request.param)
  if found.weak:
    pytest.skip(f"{found} does not bound what root starts; install pyseccomp and libseccomp2")
  return found


@pytest.fixture(scope="module")
def strongest():
  try:
    return find_sandbox(allow_weak=True)
  except RuntimeError as error:
    pytest.skip(str(error)[:300])


@pytest.fixture(scope="module", params=(*STRONG, "rlimits"))
def any_sandbox(request):
  return usable(request.param)


def run(box, program, **changes):
  limits = {name: value for name, value in changes.items() if name in Limits.__dataclass_fields__}
  options = {name: value for name, value in changes.items() if name not in limits}
  settings = {**{name: getattr(SMALL, name) for name in Limits.__dataclass_fields__}, **limits}
  return box.run(textwrap.dedent(program), limits=Limits(**settings), **options)


def words(box, program, **changes):
  result = run(box, program, **changes)
  assert result.status == "ok", result
  return result.stdout.decode().split()


@pytest.mark.parametrize("size", [3, 300_000])
def test_a_program_reads_what_it_is_given_and_both_outputs_come_back(any_sandbox, size):
  program = "import sys; text = input(); print(len(text), text[:3], X); sys.stderr.write('aside')"
  result = run(any_sandbox, program, stdin=b"abc" * (size // 3) + b"\n", names={"X": (1, 2)})
  assert (result.status, result.stdout, result.stderr) == ("ok", b"%d abc (1, 2)\n" % size, b"aside")
  assert 0 < result.seconds < SMALL.wall_seconds


def test_a_code_object_runs_as_the_main_module(any_sandbox):
  code = compile("import sys, __main__\nprint(__name__, __main__.__name__, sys.argv)", "<it>", "exec")
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
def test_how_a_program_ended_becomes_its_status(any_sandbox, program, status):
  result = run(any_sandbox, program, cpu_seconds=1)
  assert result.status == status, result
  assert len(result.stdout) + len(result.stderr) <= SMALL.output_bytes


def test_a_program_that_sleeps_is_stopped(any_sandbox):
  result = run(any_sandbox, "import time; print('now', flush=True); time.sleep(60)", wall_seconds=1.5)
  assert (result.status, result.stdout) == ("timeout", b"now\n")
  assert 1.5 <= result.seconds < 10


def test_a_program_that_ignores_the_cpu_signal_is_stopped_all_the_same(strongest):
  program = "import signal; signal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass"
  result = run(strongest, program, cpu_seconds=1)
  assert result.status == "killed" and result.seconds < 15


def test_memory_that_runs_out_can_be_survived(any_sandbox):
  program = "try: x = bytearray(10**12)\nexcept MemoryError: print('caught')"
  assert words(any_sandbox, program) == ["caught"]


def test_programs_that_run_together_are_held_to_limits_of_their_own(strongest):
  slow = strongest.start("import time; time.sleep(60)", limits=SMALL)
  loud = strongest.start("while True: print('spam' * 99)", limits=SMALL)
  quick = strongest.start("import time; time.sleep(1)", limits=SMALL)
  began = time.monotonic()
  runs = collect([slow, loud, quick], until=quick)
  assert [result.status for result in runs] == ["timeout", "output", "ok"]
  assert time.monotonic() - began < SMALL.wall_seconds / 2


def test_files_can_be_written_in_a_private_folder_only_and_are_gone_afterwards(strong, tmp_path):
  program = f"""
    import os
    for path in ("note", "/tmp/other"):
      open(path, "w").write("x" * 1000)
    print(os.getcwd(), *os.listdir("."))
    for path in ("/a", "/usr/lib/a", "/dev/a", "/dev/shm/a", "/etc/a", {str(tmp_path / "a")!r}, os.__file__):
      try:
        open(path, "w")
        print("wrote", path)
      except OSError:
        pass
  """
  folder, *names = words(strong, program)
  assert (folder, sorted(names)) == ("/tmp", ["note", "other"])
  assert words(strong, "import os; print(*os.listdir('/tmp'))") == []
  assert not list(tmp_path.iterdir())


def test_the_private_folder_of_plain_limits_is_removed():
  box = usable("rlimits")
  (folder,) = words(box, "import os; open('note', 'w').write('x'); print(os.getcwd())")
  assert "rspo_jax_sandbox_" in folder and not os.path.exists(folder)


def test_files_are_bounded_one_by_one_and_together(strong):
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


def test_nothing_of_the_host_can_be_read(strong, tmp_path, monkeypatch):
  secret = tmp_path / "secret"
  secret.write_text("hunter2")
  monkeypatch.setenv("RSPO_JAX_SECRET", "hunter2")
  here = pathlib.Path(__file__).resolve()
  paths = [
    str(secret),
    str(here),
    str(pathlib.Path.home() / ".bashrc"),
    "/etc/shadow",
    "/etc/passwd",
    "/proc/1/environ",
  ]
  program = f"""
    import os
    print(*[path for path in {paths} if os.path.exists(path)])
    print(*[value for value in os.environ.values() if "hunter" in value])
    print(*os.listdir(os.path.dirname({str(here)!r})) if os.path.exists(os.path.dirname({str(here)!r})) else [])
  """
  assert words(strong, program) == []


def test_no_process_can_be_started_but_threads_can(strong):
  if not strong.filter_program:
    pytest.skip("without a seccomp filter processes are only counted")
  program = """
    import os, subprocess, sys, threading
    def refused(function, *arguments):
      try:
        if function(*arguments) == 0:
          os._exit(0)
        return False
      except PermissionError:
        return True
    print(refused(os.fork), refused(subprocess.Popen, [sys.executable]))
    print(refused(os.posix_spawn, sys.executable, ["python"], {}), refused(os.execv, sys.executable, ["python"]))
    threads = [threading.Thread(target=print, args=("thread",)) for _ in range(3)]
    for thread in threads:
      thread.start()
      thread.join()
  """
  assert words(strong, program) == ["True"] * 4 + ["thread"] * 3


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


@pytest.fixture(params=["filter", "no filter"])
def filtered_or_not(strong, request):
  """Namespaces must hold alone, too."""
  return strong if request.param == "filter" else Sandbox(strong.isolation, b"")


def test_no_network(filtered_or_not):
  with socket.create_server(("127.0.0.1", 0)) as server:
    program = f"""
      import socket
      for family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX):
        try:
          with socket.socket(family) as mine:
            mine.settimeout(1)
            mine.connect(("127.0.0.1", {server.getsockname()[1]}) if family == socket.AF_INET else "/run/x")
          print("reached", family)
        except (OSError, TypeError):
          print("no")
    """
    assert words(filtered_or_not, program) == ["no"] * 3
    server.settimeout(0.2)
    with pytest.raises(TimeoutError):
      server.accept()


def test_no_signal_leaves_the_sandbox(filtered_or_not):
  # Sends nothing unless it is in a process namespace of its own.
  program = """
    import os, signal
    if os.getpid() < 9:
      for process in (os.getppid(), 1, -1):
        try:
          os.kill(process, signal.SIGKILL)
        except OSError:
          pass
      print("alive")
  """
  assert words(filtered_or_not, program) == ["alive"]


def test_kernel_interfaces_that_could_do_harm_are_refused(strong):
  if not strong.filter_program:
    pytest.skip("needs a seccomp filter")
  program = """
    import ctypes, errno
    libc = ctypes.CDLL(None, use_errno=True)
    def refused(name, *arguments):
      return getattr(libc, name)(*arguments) == -1 and ctypes.get_errno() == errno.EPERM
    print(refused("unshare", 0x10000000), refused("mount", b"none", b"/tmp", b"tmpfs", 0, None))
    print(refused("ptrace", 0, 0, 0, 0), refused("shmget", 1, 4096, 0o1600), refused("memfd_create", b"x", 0))
    print(refused("chroot", b"/tmp"), refused("setns", 0, 0))
  """
  assert words(strong, program) == ["True"] * 7


def wait_for_end_of_file(reader, seconds=10.0):
  """Whether all writers of a pipe have gone."""
  return bool(select.select([reader], [], [], seconds)[0]) and os.read(reader, 1) == b""


def test_no_process_is_left(filtered_or_not):
  # Whoever is left holds the pipe open.
  program = """
    import os, threading, time
    try:
      if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
          time.sleep(30)
        os._exit(0)
    except OSError:
      pass
    threading.Thread(target=time.sleep, args=(30,), daemon=True).start()
    print("done")
  """
  reader, writer = os.pipe()
  try:
    assert words(filtered_or_not, program, fds=(writer,)) == ["done"]
    os.close(writer)
    assert wait_for_end_of_file(reader)
  finally:
    os.close(reader)


def test_no_dead_process_is_left_to_the_first_of_the_machine(strong):
  # In containers that is often one that reaps nobody. Here orphans become this process's children.
  def children():
    return {child for path in pathlib.Path("/proc/self/task").glob("*/children") for child in path.read_text().split()}

  subreaper = functools.partial(ctypes.CDLL(None).prctl, 36)
  before = children()
  subreaper(1, 0, 0, 0)
  try:
    assert run(strong, "print('done')").status == "ok"
    assert run(strong, "import time; time.sleep(60)", wall_seconds=1.0).status == "timeout"
    assert run(strong, "while True: print('spam' * 99)").status == "output"
    assert children() <= before
  finally:
    subreaper(0, 0, 0, 0)


@pytest.mark.parametrize("isolation", [*STRONG, "rlimits"])
def test_a_program_ends_with_its_host(isolation, tmp_path):
  usable(isolation)
  reader, writer = os.pipe()
  host = f"""
    from rspo_jax.rewards.code.sandbox import sandbox_of
    sandbox_of({isolation!r}).run("import os, time; os.write({writer}, b'x'); time.sleep(60)", fds=({writer},))
  """
  # The parent packages are stubbed, since their __init__ imports JAX, which takes seconds.
  folder = pathlib.Path(sandbox.__file__).parent
  packages = {"rspo_jax": folder.parents[1], "rspo_jax.rewards": folder.parent, "rspo_jax.rewards.code": folder}
  start = "import sys, types\n"
  for name, path in packages.items():
    start += f"sys.modules[{name!r}] = package = types.ModuleType({name!r}); package.__path__ = [{str(path)!r}]\n"
  command = [sys.executable, "-c", start + textwrap.dedent(host)]
  # The private folder of rlimits survives a host that is killed, so here it lies in a folder of this test's.
  environment = {**os.environ, "TMPDIR": str(tmp_path)}
  process = subprocess.Popen(command, pass_fds=(writer,), start_new_session=True, env=environment)
  os.close(writer)
  try:
    assert select.select([reader], [], [], 30)[0] and os.read(reader, 1) == b"x"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert wait_for_end_of_file(reader)
  finally:
    process.kill()
    process.wait()
    os.close(reader)


def test_a_sandbox_that_cannot_be_set_up_is_an_error_and_no_verdict(any_sandbox):
  broken = Sandbox(any_sandbox.isolation, b"no filter program.")
  with pytest.raises(RuntimeError, match="could not be set up: OSError.*Invalid argument"):
    broken.run("print('hello')")


@pytest.mark.parametrize(("name", "value"), [("wall_seconds", 0), ("memory_bytes", -1), ("cpu_seconds", 1.5)])
def test_impossible_limits_are_refused(name, value):
  with pytest.raises(ValueError, match=f"{name} is {value}"):
    Limits(**{name: value})


def test_return_codes_of_signals_are_read_alike_however_they_come():
  assert sandbox_process._status(-signal.SIGXCPU) == sandbox_process._status(128 + signal.SIGXCPU) == "timeout"
