"""What a process does before and around the work: devices, the compilation cache, a polite end on SIGTERM."""

import os
import signal
from pathlib import Path

import jax
from jax.experimental import multihost_utils

from experiments.config import RuntimeConfig
from experiments.setup.allocator import keep_freed_memory


def start(runtime: RuntimeConfig) -> None:
  """Sets JAX up; call it before anything touches a device.

  Raises:
    Whatever `jax.distributed.initialize` raises when `distributed` is asked for and does not come about: hosts that
    train alone must not pass for a pod.
  """
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
  jax.config.update("jax_num_cpu_devices", runtime.cpu_devices or cores)
  start_cache(runtime)
  if runtime.distributed:
    jax.distributed.initialize()
  if jax.default_backend() == "cpu":
    keep_freed_memory()


def start_cache(runtime: RuntimeConfig) -> None:
  """Keeps compiled programs in a folder, so that the next start compiles nothing."""
  if not runtime.compilation_cache:
    return
  folder = runtime.compilation_cache
  if folder == "default":
    folder = str(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rspo_jax" / "xla")
  jax.config.update("jax_compilation_cache_dir", folder)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


class Preemption:
  """Says at a step's end whether the process was asked to stop (SIGTERM), the same answer on all hosts."""

  def __init__(self):
    self._asked = False
    # With jax.distributed its own service takes the signal; a handler of ours would hide it.
    if jax.process_count() == 1:
      signal.signal(signal.SIGTERM, self._note)

  def _note(self, *_):
    self._asked = True

  def requested(self, step: int) -> bool:
    if jax.process_count() > 1:
      return multihost_utils.reached_preemption_sync_point(step)
    return self._asked
