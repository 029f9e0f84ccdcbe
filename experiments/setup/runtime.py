"""The process of a run: devices, the compilation cache, and SIGTERM."""

import dataclasses
import os
import signal
from collections.abc import Mapping
from pathlib import Path

import jax
from jax.experimental import multihost_utils

from experiments.setup.allocator import keep_freed_memory
from experiments.setup.ranges import check_at_least


@dataclasses.dataclass(frozen=True)
class RuntimeConfig:
  """Devices and the compilation cache.

  Attributes:
    mesh: size of any of the axes "data", "fsdp", "expert", "tensor" (`rspo_jax.mesh.make_layout`); one size may be -1:
      all remaining devices.
    cpu_devices: number of virtual devices on a CPU; 0 is one per core.
    distributed: call `jax.distributed.initialize()`, for a TPU pod or a cluster.
    compilation_cache: folder of compiled programs; "default" is rspo_jax/xla in the user's cache folder, "" is no
      cache.
  """

  mesh: Mapping[str, int] = dataclasses.field(default_factory=lambda: {"data": -1})
  cpu_devices: int = 0
  distributed: bool = False
  compilation_cache: str = "default"

  def __post_init__(self):
    check_at_least(self, cpu_devices=0)


def start(runtime: RuntimeConfig) -> None:
  """Configures JAX. Call it before any device is used.

  An error of `jax.distributed.initialize` is not caught: a host of a pod must not train alone.
  """
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
  jax.config.update("jax_num_cpu_devices", runtime.cpu_devices or cores)
  start_cache(runtime)
  if runtime.distributed:
    jax.distributed.initialize()
  if jax.default_backend() == "cpu":
    keep_freed_memory()


def start_cache(runtime: RuntimeConfig) -> None:
  """Stores compiled programs in a folder, so that the next start loads them instead of compiling."""
  if not runtime.compilation_cache:
    return
  folder = runtime.compilation_cache
  if folder == "default":
    folder = str(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rspo_jax" / "xla")
  jax.config.update("jax_compilation_cache_dir", folder)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


class Preemption:
  """Notices SIGTERM, so that the run saves and ends after the current step."""

  def __init__(self):
    self._received = False
    # jax.distributed has its own handler, which another one would replace.
    if jax.process_count() == 1:
      signal.signal(signal.SIGTERM, self._on_sigterm)

  def _on_sigterm(self, *_):
    self._received = True

  def requested(self, step: int) -> bool:
    """Whether to stop after `step`; call it at the end of every step. All processes get the same answer."""
    if jax.process_count() > 1:
      return multihost_utils.reached_preemption_sync_point(step)
    return self._received
