"""The first code that runs in a sandbox process: it isolates its own process, then runs the program.

`sandbox` sends it there as a code object compiled from its source text, so it may import the standard library only, and
every import costs start-up time. The constants are from Linux's headers and equal on all architectures.
"""

import ctypes
import os
import resource
import struct
import sys

STARTED = b"\x06"  # written before the program's output, once the limits and the filter are in force
OUT_OF_MEMORY, NO_CODE = 86, 87  # exit statuses

_CLONE_NEW = {"ns": 0x20000, "cgroup": 0x2000000, "uts": 0x4000000, "ipc": 0x8000000}
_CLONE_NEW |= {"user": 0x10000000, "pid": 0x20000000, "net": 0x40000000}
_MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE = 0x2, 0x4, 0x1000, 0x4000, 0x40000
_MNT_DETACH = 2
_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE, _ATTR_RDONLY, _ATTR_NOSUID = 442, -100, 0x8000, 1, 2
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 1, 22, 24, 38
_SECCOMP_MODE_FILTER = 2
_CAPABILITY_VERSION = 0x20080522
_DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
_NEW_ROOT = "/proc"  # no bound path is below it
_INSIDE_ID = 1000  # user and group id inside the user namespace


def _libc(name, *arguments):
  """Calls a C function; OSError if it returns a negative number."""
  function = getattr(ctypes.CDLL(None, use_errno=True), name)
  if function(*(ctypes.c_long(value) if isinstance(value, int) else value for value in arguments)) < 0:
    code = ctypes.get_errno()
    raise OSError(code, f"{name}{arguments}: {os.strerror(code)}")


def _die_with(parent):
  """Requests SIGKILL for the death of the parent; exits immediately if the parent is already dead."""
  _libc("prctl", _PR_SET_PDEATHSIG, 9, 0, 0, 0)
  if os.getppid() != parent:
    os._exit(1)


def _mount(source, target, kind, flags, options=None):
  encoded = [None if text is None else text.encode() for text in (source, target, kind)]
  _libc("mount", *encoded, flags, None if options is None else options.encode())


def _read_only(path, *, recursive):
  attributes = struct.pack("=4Q", _ATTR_RDONLY | _ATTR_NOSUID, 0, 0, 0)
  flags = _AT_RECURSIVE if recursive else 0
  _libc("syscall", _MOUNT_SETATTR, _AT_FDCWD, path.encode(), flags, attributes, len(attributes))


def _new_root(binds, folder_bytes):
  """Builds a read-only root of the bound paths, four devices and a small writable /tmp, and pivots to it."""
  _mount("none", "/", None, _MS_REC | _MS_PRIVATE)
  _mount("tmpfs", _NEW_ROOT, "tmpfs", _MS_NOSUID, "size=1m,mode=755")
  os.mkdir(_NEW_ROOT + "/tmp")
  _mount("tmpfs", _NEW_ROOT + "/tmp", "tmpfs", _MS_NOSUID | _MS_NODEV, f"size={folder_bytes},nr_inodes=4k,mode=700")
  for path in (*binds, *_DEVICES):
    target = _NEW_ROOT + path
    if os.path.isdir(path):
      os.makedirs(target, exist_ok=True)
    else:
      os.makedirs(os.path.dirname(target), exist_ok=True)
      open(target, "x").close()
    _mount(path, target, None, _MS_BIND | _MS_REC)
    if path not in _DEVICES:
      _read_only(target, recursive=True)
  _read_only(_NEW_ROOT, recursive=False)
  os.chdir(_NEW_ROOT)
  _libc("pivot_root", b".", b".")
  _libc("umount2", b".", _MNT_DETACH)
  os.chdir("/tmp")


def _drop_capabilities():
  for capability in range(64):
    try:
      _libc("prctl", _PR_CAPBSET_DROP, capability, 0, 0, 0)
    except OSError:
      break  # past the last capability of this kernel
  _libc("capset", (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0), (ctypes.c_uint32 * 6)())
  _libc("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def _follow(child):
  """Waits for a child and exits with its status, 128 + signal if a signal ended it."""
  status = os.waitpid(child, 0)[1]
  os._exit(128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status))


def _enter_namespaces(binds, folder_bytes):
  """Enters new user, process, mount, network, IPC, cgroup and host name namespaces. OSError if that is forbidden."""
  user, group = os.geteuid(), os.getegid()
  _libc("unshare", sum(_CLONE_NEW.values()))
  for name, text in (
    ("setgroups", "deny"),
    ("uid_map", f"{_INSIDE_ID} {user} 1"),
    ("gid_map", f"{_INSIDE_ID} {group} 1"),
  ):
    with open(f"/proc/self/{name}", "w") as file:
      file.write(text)
  _new_root(binds, folder_bytes)
  if child := os.fork():  # the first process of the new namespace
    _follow(child)
  _libc("prctl", _PR_SET_PDEATHSIG, 9, 0, 0, 0)
  _drop_capabilities()


def _set_limits(limits):
  for name, soft, hard in limits:
    number = getattr(resource, name)
    current = resource.getrlimit(number)[1]
    soft, hard = (value if current == resource.RLIM_INFINITY else min(value, current) for value in (soft, hard))
    resource.setrlimit(number, (soft, hard))


def _load_filter(filter_program):
  """Loads a seccomp filter of 8 bytes per instruction."""

  class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p)]

  program = Program(len(filter_program) // 8, filter_program)
  _libc("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
  _libc("prctl", _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0)


def start(program, names, *, parent, namespaces, first, limits, filter_program):
  """Isolates this process and runs a program as __main__.

  Args:
    program: source text or a code object.
    names: initial globals of the program.
    parent: process id of the host, whose death kills this process; None if bubblewrap does that.
    namespaces: (paths to bind, bytes of the private folder) to enter new namespaces here; None for no new ones.
    first: whether this process is then the first one of a process namespace. Its end kills all others there, but most
      signals are not delivered to it, including that of the CPU limit, so the program runs in a forked child.
    limits: (name in `resource`, soft, hard) for each limit.
    filter_program: seccomp filter; b'' for none.
  """
  if parent is not None:
    _die_with(parent)
  if namespaces is not None:
    _enter_namespaces(*namespaces)
  child = os.fork() if first else 0
  _set_limits(limits)
  if filter_program:
    _load_filter(filter_program)
  if child:
    _follow(child)
  os.write(1, STARTED)
  try:
    if isinstance(program, str):
      try:
        program = compile(program, "<program>", "exec", dont_inherit=True)
      except (SyntaxError, ValueError, RecursionError):
        os._exit(NO_CODE)
    main = type(sys)("__main__")
    main.__dict__.update(names)
    sys.modules["__main__"], sys.argv = main, ["program"]
    exec(program, main.__dict__)
  except MemoryError:
    os._exit(OUT_OF_MEMORY)
