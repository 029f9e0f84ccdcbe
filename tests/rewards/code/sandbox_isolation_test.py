"""Isolation of sandboxed programs: files, processes, network and signals, and no process or file left behind."""

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

import pytest

from tests.support.code_cases import STRONG, run, sandbox_or_skip, words
from tests.support.processes import skip_package_code


def test_only_the_private_folder_is_writable_and_its_files_are_removed(strong, tmp_path):
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


def test_the_private_folder_of_rlimits_is_removed():
  box = sandbox_or_skip("rlimits")
  (folder,) = words(box, "import os; open('note', 'w').write('x'); print(os.getcwd())")
  assert "rspo_jax_sandbox_" in folder and not os.path.exists(folder)


def test_files_and_environment_of_the_host_are_not_readable(strong, tmp_path, monkeypatch):
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


def test_processes_are_refused_and_threads_are_allowed(strong):
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


def test_network_is_unreachable(filtered_or_not):
  with socket.create_server(("127.0.0.1", 0)) as server:
    program = f"""
      import socket
      for family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX):
        try:
          with socket.socket(family) as client:
            client.settimeout(1)
            client.connect(("127.0.0.1", {server.getsockname()[1]}) if family == socket.AF_INET else "/run/x")
          print("reached", family)
        except (OSError, TypeError):
          print("no")
    """
    assert words(filtered_or_not, program) == ["no"] * 3
    server.settimeout(0.2)
    with pytest.raises(TimeoutError):
      server.accept()


def test_signals_do_not_leave_the_sandbox(filtered_or_not):
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


def test_dangerous_kernel_interfaces_are_refused(strong):
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
  """Whether all writers of a pipe have closed it."""
  return bool(select.select([reader], [], [], seconds)[0]) and os.read(reader, 1) == b""


def test_no_descendant_outlives_a_program(filtered_or_not):
  # A remaining process would keep the pipe open.
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


def test_every_process_of_a_run_is_reaped(strong):
  # Orphans become children of this process (PR_SET_CHILD_SUBREAPER) instead of the machine's first process, which in
  # a container may not reap them.
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
def test_a_program_ends_when_its_host_is_killed(isolation, tmp_path):
  sandbox_or_skip(isolation)
  reader, writer = os.pipe()
  host = f"""
    from rspo_jax.rewards.code.sandbox import make_sandbox
    make_sandbox({isolation!r}).run("import os, time; os.write({writer}, b'x'); time.sleep(60)", fds=({writer},))
  """
  stubs = skip_package_code("rspo_jax", "rspo_jax.rewards", "rspo_jax.rewards.code")
  command = [sys.executable, "-c", stubs + textwrap.dedent(host)]
  # The private folder of rlimits is not removed if the host is killed, so it is created in tmp_path.
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
