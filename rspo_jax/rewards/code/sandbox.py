"""Runs untrusted Python programs in isolation.

Each run is a separate process with limits on time, memory, processes, output and files, no network, a read-only file
system that contains what Python needs, and a private folder that is removed afterwards. The strongest isolation that
works on this machine is selected once:

  bubblewrap  `bwrap`: new user, process, mount, network, IPC and host name namespaces
  namespaces  the same namespaces, entered by `sandbox_child`, where the system allows user namespaces
  rlimits     limits only: a program can read and write the user's files. Used only with allow_weak=True.

Each is combined with a seccomp filter (needs pyseccomp and libseccomp): no new process, exec, socket, signal to other
processes or shared memory outside the memory limit, and no kernel interface that such programs do not need.
"""

import contextlib
import dataclasses
import errno
import functools
import inspect
import logging
import marshal
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Mapping, Sequence
from types import CodeType
from typing import Any

from rspo_jax.rewards.code import sandbox_child
from rspo_jax.rewards.code.sandbox_process import Limits, Process, Run, collect

_ISOLATIONS = ("bubblewrap", "namespaces", "rlimits")
_CURE = (
  "Install bubblewrap (Debian: apt-get install bubblewrap) or allow user namespaces, and pip install pyseccomp; or "
  "pass allow_weak=True to run programs with resource limits only."
)
# Stdin begins with the length of a marshalled tuple (12 digits) and the tuple; the rest is the program's own stdin.
_BOOT = (
  "import marshal, os, sys\n"
  "def read(size):\n"
  "  data = b''\n"
  "  while len(data) < size: data += os.read(0, size - len(data)) or sys.exit('no program')\n"
  "  return data\n"
  "child, program, names, settings = marshal.loads(read(int(read(12))))\n"
  "exec(child)\n"
  "start(program, names, **settings)\n"
)
# Prints whether it runs in a process namespace, cannot see a file of the host, and cannot start a process.
_PROBE = """import os
try:
  may_fork = bool(os.fork() or os._exit(0))
except OSError:
  may_fork = False
print(os.getpid() < 9, not os.path.exists({!r}), not may_fork)
"""
# System calls that the seccomp filter refuses.
_DENIED = (
  "fork vfork execve execveat ptrace process_vm_readv process_vm_writev kcmp pidfd_open pidfd_getfd "
  "pidfd_send_signal kill tkill tgkill rt_sigqueueinfo rt_tgsigqueueinfo setpriority "
  "sched_setaffinity sched_setscheduler sched_setattr socket io_uring_setup io_uring_enter "
  "io_uring_register memfd_create memfd_secret shmget shmat msgget semget mq_open userfaultfd perf_event_open bpf "
  "add_key request_key keyctl mount umount2 pivot_root chroot unshare setns fsopen fsmount fsconfig fspick open_tree "
  "move_mount mount_setattr name_to_handle_at open_by_handle_at fanotify_init inotify_init inotify_init1 syslog acct "
  "quotactl swapon swapoff reboot kexec_load kexec_file_load init_module finit_module delete_module iopl ioperm "
  "modify_ldt settimeofday clock_settime clock_adjtime adjtimex sethostname setdomainname personality"
)
_DENIED_ROOT = "prlimit64 setrlimit"  # outside a user namespace, root could raise its own limits
_CLONE_THREAD = 0x10000


@dataclasses.dataclass(frozen=True)
class Sandbox:
  """Runs programs with one kind of isolation; `find_sandbox` returns the strongest available one.

  Attributes:
    isolation: 'bubblewrap', 'namespaces' or 'rlimits'.
    filter_program: seccomp filter as BPF instructions; b'' for none.
  """

  isolation: str
  filter_program: bytes

  @property
  def weak(self) -> bool:
    """Whether a program can modify the user's files or start an unlimited number of processes."""
    return self.isolation == "rlimits" or (not self.filter_program and os.geteuid() == 0)

  def __str__(self) -> str:
    return f"{self.isolation} {'with' if self.filter_program else 'without'} a seccomp filter"

  def start(
    self,
    program: str | CodeType,
    *,
    names: Mapping[str, Any] | None = None,
    stdin: bytes = b"",
    limits: Limits | None = None,
    fds: Sequence[int] = (),
  ) -> Process:
    """Starts a program; pass the result to `collect`.

    Args:
      program: source text, or a code object compiled by this Python version.
      names: initial globals of the program; values that `marshal` supports.
      stdin: its standard input.
      limits: its resource limits; `Limits()` if None.
      fds: file descriptors that it inherits, under the same numbers.
    Raises:
      OSError: no process could be started, for example because `bwrap` is missing.
    """
    limits = limits or Limits()
    settings = {
      "parent": None if self.isolation == "bubblewrap" else os.getpid(),
      "namespaces": (_bound_paths(), limits.folder_bytes) if self.isolation == "namespaces" else None,
      "first": self.isolation != "rlimits",
      "limits": _rlimits(limits),
      "filter_program": self.filter_program,
    }
    payload = marshal.dumps((_child_code(), program, dict(names or {}), settings))
    command, folder, home = [os.path.realpath(sys.executable), "-PsSB", "-c", _BOOT], None, "/tmp"
    if self.isolation == "bubblewrap":
      command = _bubblewrap(limits) + command
    elif self.isolation == "rlimits":
      home = folder = tempfile.mkdtemp(prefix="rspo_jax_sandbox_")
    environment = {"PATH": "/usr/bin:/bin", "HOME": home, "TMPDIR": home, "LANG": "C.UTF-8"}
    environment["PYTHONHASHSEED"] = "0"  # the same set order in every run, so that verdicts are reproducible
    environment["MALLOC_ARENA_MAX"] = "2"  # by default every thread reserves 64 MiB of address space
    try:
      popen = subprocess.Popen(
        command,
        bufsize=0,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=folder or "/",
        env=environment,
        pass_fds=fds,
        start_new_session=True,
      )
    except OSError:
      if folder is not None:
        shutil.rmtree(folder)
      raise
    return Process(popen, b"%12d" % len(payload) + payload + stdin, limits, folder)

  def run(self, program: str | CodeType, **options: Any) -> Run:
    """Runs a program until it ends or reaches a limit; options as for `start`."""
    return collect([self.start(program, **options)])[0]


@functools.cache
def _child_code() -> CodeType:
  return compile(inspect.getsource(sandbox_child), "<sandbox>", "exec")


@functools.cache
def _bound_paths() -> tuple[str, ...]:
  """The paths that Python needs: its own files and the shared libraries. None is below another one."""
  python = os.path.realpath(sys.executable)
  roots = ("", "/usr", "/usr/local", sys.base_prefix, sys.base_exec_prefix)
  candidates = [f"{root}/{name}" for root in roots for name in ("lib", "lib64")]
  candidates += [sysconfig.get_path("stdlib"), python, "/etc/ld.so.cache"]
  existing = [path for path in dict.fromkeys(candidates) if os.path.exists(path)]
  return tuple(path for path in existing if not any(path.startswith(f"{parent}/") for parent in existing))


def _bubblewrap(limits: Limits) -> list[str]:
  program = shutil.which("bwrap")
  if program is None:
    raise FileNotFoundError("there is no bwrap on the PATH.")
  command = [program, "--unshare-user", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts"]
  command += ["--unshare-cgroup-try", "--uid", "1000", "--gid", "1000", "--die-with-parent", "--as-pid-1"]
  command += ["--cap-drop", "ALL", "--dev", "/dev", "--size", str(limits.folder_bytes), "--tmpfs", "/tmp"]
  for path in _bound_paths():
    command += ["--ro-bind", path, path]
  return [*command, "--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/tmp", "--"]


def _rlimits(limits: Limits) -> tuple[tuple[str, int, int], ...]:
  soft = {"AS": limits.memory_bytes, "NPROC": limits.processes, "FSIZE": limits.file_bytes, "NOFILE": 64, "CORE": 0}
  cpu = ("RLIMIT_CPU", limits.cpu_seconds, limits.cpu_seconds + 1)  # SIGXCPU first, to tell a timeout from other kills
  return (cpu, *((f"RLIMIT_{name}", value, value) for name, value in soft.items()))


@functools.cache
def _filter_program(denied_names: str) -> bytes:
  """A seccomp filter as BPF instructions; b'' if pyseccomp or libseccomp is missing."""
  try:
    import pyseccomp  # RuntimeError without libseccomp
  except (ImportError, OSError, RuntimeError) as error:
    logging.warning("No seccomp filter (%s). pip install pyseccomp; libseccomp is Debian's libseccomp2.", error)
    return b""
  filter_ = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
  for name in denied_names.split():
    with contextlib.suppress(ValueError, OSError, RuntimeError):  # unknown to this libseccomp or architecture
      filter_.add_rule(pyseccomp.ERRNO(errno.EPERM), name)
  thread = pyseccomp.Arg(0, pyseccomp.MASKED_EQ, _CLONE_THREAD, 0)
  filter_.add_rule(pyseccomp.ERRNO(errno.EPERM), "clone", thread)
  # The flags of clone3 are in memory, which a filter cannot read. With ENOSYS, libraries fall back to clone.
  filter_.add_rule(pyseccomp.ERRNO(errno.ENOSYS), "clone3")
  with tempfile.TemporaryFile() as file:
    filter_.export_bpf(file)
    file.seek(0)
    return file.read()


def make_sandbox(isolation: str) -> Sandbox:
  """Creates a sandbox with the given isolation and checks with a probe program that it isolates.

  Raises:
    ValueError: unknown isolation.
    RuntimeError: it does not work on this machine; the message gives the reason.
  """
  if isolation not in _ISOLATIONS:
    raise ValueError(f"isolation is {isolation!r}; want one of {', '.join(_ISOLATIONS)}.")
  if sys.platform != "linux":
    raise RuntimeError(f"{isolation} needs Linux; this is {sys.platform}.")
  sandbox = Sandbox(isolation, _filter_program(f"{_DENIED} {_DENIED_ROOT}" if isolation == "rlimits" else _DENIED))
  with tempfile.NamedTemporaryFile() as file:
    program = _PROBE.format(file.name)
    try:
      run = sandbox.run(program, limits=Limits(wall_seconds=30.0))
    except (OSError, RuntimeError) as error:
      raise RuntimeError(f"{isolation} does not work here: {error}") from error
  expected = [isolation != "rlimits"] * 2 + [bool(sandbox.filter_program)]
  if run.status != "ok" or run.stdout.decode().split() != [str(isolated) for isolated in expected]:
    raise RuntimeError(f"{isolation} does not isolate here: {run}.")
  return sandbox


@functools.cache
def _strongest() -> Sandbox:
  reasons = []
  for isolation in _ISOLATIONS:
    try:
      sandbox = make_sandbox(isolation)
    except RuntimeError as error:
      reasons.append(str(error))
      continue
    logging.info("Programs run in this sandbox: %s.%s", sandbox, "".join(f" {reason}" for reason in reasons))
    return sandbox
  raise RuntimeError(f"Programs cannot be run here: {' '.join(reasons)} {_CURE}")


_SELECTION_LOCK = threading.Lock()


def find_sandbox(*, allow_weak: bool = False) -> Sandbox:
  """The strongest sandbox that works on this machine; selected, probed and logged at the first call.

  Args:
    allow_weak: also accept a sandbox that does not contain a program (see `Sandbox.weak`).
  Raises:
    RuntimeError: no sandbox works, or only a weak one, without allow_weak; the message says how to get a stronger one.
  """
  with _SELECTION_LOCK:
    sandbox = _strongest()
  if sandbox.weak and not allow_weak:
    raise RuntimeError(f"The best sandbox here is {sandbox}, which does not contain a program. {_CURE}")
  return sandbox
