"""Decoding relative to the memory bandwidth: every step reads the weights in use and the key/value cache once.

The bandwidth is measured in the same run, as the rate at which all cores together read arrays larger than the caches.
"""

import dataclasses
import itertools
import os
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import clocked
from models.config import TransformerConfig
from models.policy import build_policy
from rspo_jax import mesh
from rspo_jax.router.trace import record_experts
from rspo_jax.types import Layout

# 108 million parameters, 433 MB in float32: more than the processor's caches hold.
WIDE = TransformerConfig(
  vocab_size=512,
  hidden_size=512,
  num_hidden_layers=8,
  num_attention_heads=8,
  num_key_value_heads=4,
  head_dim=64,
  num_experts=32,
  num_experts_per_tok=8,
  moe_intermediate_size=256,
)
SLOTS, STEPS = 128, 16
READ_BYTES = 256 << 20  # per core


def decode_bytes(config: TransformerConfig, rows: int, slots: int, experts_read: float) -> float:
  """Bytes that one decode step must read: weights in use and the whole cache of `slots` slots.

  Args:
    experts_read: number of different experts selected by the rows of a layer, the mean over layers.
  """
  c, width = config, jnp.dtype(config.dtype).itemsize
  attention = 2 * c.hidden_size * (c.num_attention_heads + c.num_key_value_heads) * c.head_dim
  experts = 3 * c.hidden_size * c.moe_intermediate_size * experts_read
  router = c.hidden_size * c.num_experts * 4
  weights = c.num_hidden_layers * ((attention + experts) * width + router) + c.hidden_size * c.vocab_size * width
  cache = c.num_hidden_layers * rows * slots * 2 * c.num_key_value_heads * c.head_dim
  return weights + cache * jnp.dtype(c.cache_dtype or c.dtype).itemsize


def decode_speed(rounds: int = 5, devices: int | None = None, rows: tuple[int, ...] = (2, 8, 64)) -> dict[str, Any]:
  """Decode steps of the wide model, alternating with plain reading of memory.

  Args:
    rows: numbers of rows, each on the default mesh, with a float32 and a bfloat16 cache, and with the experts split
      over the devices.
  Returns:
    {"read": bytes per second of plain reading, "rows": [{"rows", "mesh", "cache", "tokens_per_second", "bytes" of a
    step, "experts": read per layer, "share": of the limit}]}.
  """
  devices = devices or len(os.sched_getaffinity(0))
  jax.config.update("jax_num_cpu_devices", devices)
  cases = []
  for name, shape, cache_dtypes in (("default", None, ("", "bfloat16")), ("expert", {"expert": -1}, ("",))):
    layout = mesh.make_layout(shape)
    weights = _weights(layout)
    for cache_dtype, count in itertools.product(cache_dtypes, rows):
      config = dataclasses.replace(WIDE, cache_dtype=cache_dtype)
      cases.append((name, config, count, *_decode(config, weights, count, layout)))
  read = clocked(_reader(devices))
  calls = [clocked(call) for *_, call, _ in cases]
  for call in (read, *calls):
    call()
  seconds = [(read().wall, *(call().wall for call in calls)) for _ in range(rounds)]
  plain, *medians = (statistics.median(column) for column in zip(*seconds, strict=True))
  rate = devices * READ_BYTES / plain
  results = []
  for (name, config, count, _, experts), median in zip(cases, medians, strict=True):
    step = decode_bytes(config, count, SLOTS, experts)
    results.append(
      {
        "rows": count,
        "mesh": name,
        "cache": config.cache_dtype or config.dtype,
        "tokens_per_second": count * STEPS / median,
        "bytes": step,
        "experts": experts,
        "share": step * STEPS / median / rate,
      }
    )
  return {"read": rate, "rows": results}


def _weights(layout: Layout) -> Any:
  """The weights of the wide model as `Policy.decode` takes them; they do not depend on the dtype of the cache."""
  policy = build_policy(WIDE, layout)
  params = jax.jit(policy.init, out_shardings=mesh.param_shardings(policy, layout))(jax.random.key(0))
  return jax.jit(lambda params: policy.for_decode(params, SLOTS))(params)


def _decode(config: TransformerConfig, weights: Any, rows: int, layout: Layout) -> tuple[Callable[[], Any], float]:
  """A call that takes STEPS decode steps with a full cache, and the number of experts that a layer reads per step."""
  policy = build_policy(config, layout)
  tokens = np.random.default_rng(0).integers(0, policy.vocab_size, (rows, 1)).astype(np.int32)

  def run(weights, tokens):
    cache = policy.init_cache(rows, SLOTS)

    def step(carry, _):
      token, cache = carry
      hidden, experts, cache = policy.decode(
        weights, token, jnp.ones(rows, bool), cache, probe=lambda router, inputs: record_experts(router, inputs)
      )
      token = jnp.argmax(policy.unembed(weights, hidden), axis=-1).astype(jnp.int32)
      used = jnp.any(experts[..., None] == jnp.arange(policy.num_experts), axis=(1, 2))
      return (token, cache), jnp.mean(jnp.sum(used, axis=-1))

    return jax.lax.scan(step, (tokens[:, 0], cache), length=STEPS)[1]

  (tokens,) = mesh.put_batch((tokens,), layout)
  compiled = jax.jit(run)
  return lambda: compiled(weights, tokens), float(jnp.mean(compiled(weights, tokens)))


def _reader(devices: int) -> Callable[[], Any]:
  """A call that reads READ_BYTES on every device at the same time."""
  total = jax.jit(jnp.sum)
  arrays = [jax.device_put(jnp.ones(READ_BYTES // 4, jnp.float32), device) for device in jax.local_devices()[:devices]]
  return lambda: [total(array) for array in arrays]
