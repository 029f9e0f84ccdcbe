"""Compile times of sampling and of the train step, without and with a persistent cache."""

import tempfile
import time
from typing import Any

import jax
import numpy as np

from benchmarks.ours import benchmark_sampler, make_batch, make_setup, make_step, random_rows
from benchmarks.sizes import PROMPT_TOKENS, PROMPTS
from benchmarks.timing import peak_memory
from benchmarks.workers import report
from rspo_jax import mesh
from rspo_jax.router.shift import ShiftOptions


def compile_seconds(case: str, cache: str, devices: int | None = None) -> dict[str, Any]:
  """Seconds until the first result of "sampling" or "train_step", with the persistent cache in the folder `cache`.

  Returns:
    {"compile": seconds to trace, lower and compile that program; "ready": seconds from the imported library to the
    first result, including all small programs; "compiled": programs that were not in the cache; "peak_mib": peak
    memory}.
  """
  jax.config.update("jax_compilation_cache_dir", cache)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
  misses = 0

  def count(event: str, **_: Any) -> None:
    nonlocal misses
    misses += event == "/jax/compilation_cache/cache_misses"

  jax.monitoring.register_event_listener(count)
  start = time.perf_counter()
  setup = make_setup(devices)
  keywords = {}
  if case == "sampling":
    (program,) = benchmark_sampler(setup).programs
    function = program.function
    batch = (*random_rows(setup, PROMPTS, PROMPT_TOKENS), np.arange(PROMPTS, dtype=np.int32))
    tokens, valid, keywords["numbers"] = mesh.put_batch(batch, setup.layout)
    arguments = (setup.state.params, tokens, valid, jax.random.key(0))
  else:
    function, arguments = make_step(setup, "gmpo", ShiftOptions()), (setup.state, make_batch(setup))
  jax.block_until_ready((arguments, keywords))
  before = time.perf_counter()
  compiled = function.lower(*arguments, **keywords).compile()
  seconds = time.perf_counter() - before
  jax.block_until_ready(compiled(*arguments, **keywords))
  ready = time.perf_counter() - start
  return {"compile": seconds, "ready": ready, "compiled": misses, "peak_mib": peak_memory()}


def cold_and_warm(case: str) -> tuple[dict[str, Any], dict[str, Any]]:
  """`compile_seconds` in two processes that share a new cache."""
  with tempfile.TemporaryDirectory() as cache:
    settings = {"case": case, "cache": cache}
    cold, warm = (report("benchmarks.compilation:compile_seconds", settings) for _ in range(2))
    return cold, warm
