"""Settings of malloc. Does not import JAX: benchmarks apply it to the libraries they compare with, too."""

import ctypes
import sys


def keep_freed_memory() -> None:
  """Makes glibc keep freed memory instead of returning it to the system. Does nothing with another C library.

  XLA allocates its buffers with malloc and frees them after every program. By default glibc returns large buffers to
  the system each time, and the system zeroes every new page: a third of the time of the demo's train step.
  """
  mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
  if mallopt is None:
    return
  trim_threshold, mmap_max, arena_max = -1, -4, -8  # M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX in malloc.h
  for option, value in ((arena_max, 1), (mmap_max, 0), (trim_threshold, 2**31 - 1)):
    mallopt(option, value)
