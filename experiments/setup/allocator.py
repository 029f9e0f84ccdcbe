"""How the process keeps its memory. Free of JAX, so that what is compared with us can do the same."""

import ctypes
import sys


def keep_freed_memory() -> None:
  """Lets glibc keep what is freed, where that can be asked for.

  XLA takes its buffers from malloc and frees them after every program. By default the large ones go back to the system
  each time, and every new page is zeroed again: a third of the demo's train step.
  """
  mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
  if mallopt is None:
    return
  trim_threshold, mmap_max, arena_max = -1, -4, -8  # from malloc.h
  for option, value in ((arena_max, 1), (mmap_max, 0), (trim_threshold, 2**31 - 1)):
    mallopt(option, value)
