"""Set-up of a process: devices, the compilation cache, and SIGTERM."""

import dataclasses
import os
import signal
from collections.abc import Mapping
from pathlib import Path

import jax
from jax.experimental import multihost_utils

from experiments.setup.allocator import keep_freed_memory


@dataclasses.dataclass(frozen=True)
class RuntimeConfig:
  """Where it runs.

  Attributes:
    mesh: sizes of 'data', 'fsdp', 'expert', 'tensor'; one may be -1 for the devices that are left.
    cpu_devices: virtual devices on a CPU; 0 is one per core.
    distributed: call `jax.distributed.initialize()` (a TPU pod or a cluster); an error there ends the run.
    compilation_cache: folder of compiled programs; 'default' is in the user's cache folder, '' is off.
  """

  mesh: Mapping[str, int] = dataclasses.field(default_factory=lambda: {"data": -1})
  cpu_devices: int = 0
  distributed: bool = False
  compilation_cache: str = "default"


def start(runtime: RuntimeConfig) -> None:
  """Configures JAX; to be called before any device is used.

  Raises:
    The error of `jax.distributed.initialize` if `distributed` is set: a host that trains alone must not pass for a pod.
  """
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
  jax.config.update("jax_num_cpu_devices", runtime.cpu_devices or cores)
  start_cache(runtime)
  if runtime.distributed:
    jax.distributed.initialize()
  if jax.default_backend() == "cpu":
    keep_freed_memory()


def start_cache(runtime: RuntimeConfig) -> None:
  """Keeps compiled programs in a folder, so that the next start need not compile them."""
  if not runtime.compilation_cache:
    return
  folder = runtime.compilation_cache
  if folder == "default":
    folder = str(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rspo_jax" / "xla")
  jax.config.update("jax_compilation_cache_dir", folder)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


class Preemption:
  """Whether SIGTERM was received, asked at the end of a step; all hosts get the same answer."""

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
