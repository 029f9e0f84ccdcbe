"""How near decoding comes to the limit that memory sets: every step reads the weights in use and the cache once.

The limit is measured beside it, as the rate at which all cores together read arrays that no cache holds.
"""

import dataclasses
import os
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import clocked
from models.config import TransformerConfig
from models.policy import build_policy
from rspo_jax import mesh
from rspo_jax.router.trace import record_experts

# 108 million parameters, 433 MB in float32: what a step reads comes from memory.
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
  """Bytes one decode step must read: grouped-query attention, matrices and the whole cache of `slots` slots.

  Args:
    experts_read: different experts that a layer's rows chose, the mean over layers.
  """
  c, width = config, jnp.dtype(config.dtype).itemsize
  attention = 2 * c.hidden_size * (c.num_attention_heads + c.num_key_value_heads) * c.head_dim
  experts = 3 * c.hidden_size * c.moe_intermediate_size * experts_read
  router = c.hidden_size * c.num_experts * 4
  weights = c.num_hidden_layers * ((attention + experts) * width + router) + c.hidden_size * c.vocab_size * width
  cache = c.num_hidden_layers * rows * slots * 2 * c.num_key_value_heads * c.head_dim
  return weights + cache * jnp.dtype(c.cache_dtype or c.dtype).itemsize


def decode_speed(rounds: int = 5, devices: int | None = None, rows: tuple[int, ...] = (2, 8, 64)) -> dict[str, Any]:
  """Decode steps of the wide model for several numbers of rows, by turns with plain reading.

  Returns:
    {"read": bytes per second of plain reading, "rows": [{"rows", "cache", "tokens_per_second", "bytes" of a step,
    "experts": read per layer, "share": of the limit}]}.
  """
  devices = devices or len(os.sched_getaffinity(0))
  jax.config.update("jax_num_cpu_devices", devices)
  layout = mesh.make_layout({"expert": -1})
  params = None
  cases = []
  for count in rows:
    for cache_dtype in ("", "bfloat16"):
      config = dataclasses.replace(WIDE, cache_dtype=cache_dtype)
      policy = build_policy(config, layout)
      if params is None:
        params = jax.jit(policy.init, out_shardings=mesh.param_shardings(policy, layout))(jax.random.key(0))
      call, experts = _decode(policy, params, count, layout)
      cases.append((config, count, call, experts))
  read = clocked(_reader(devices))
  calls = [clocked(call) for _, _, call, _ in cases]
  for call in (read, *calls):
    call()
  turns = [(read().wall, *(call().wall for call in calls)) for _ in range(rounds)]
  plain, *seconds = (statistics.median(column) for column in zip(*turns, strict=True))
  rate = devices * READ_BYTES / plain
  found = []
  for (config, count, _, experts), spent in zip(cases, seconds, strict=True):
    step = decode_bytes(config, count, SLOTS, experts)
    found.append(
      {
        "rows": count,
        "cache": config.cache_dtype or config.dtype,
        "tokens_per_second": count * STEPS / spent,
        "bytes": step,
        "experts": experts,
        "share": step * STEPS / spent / rate,
      }
    )
  return {"read": rate, "rows": found}


def _decode(policy, params, rows: int, layout) -> tuple[Any, float]:
  """A call that takes STEPS steps with a full cache, and how many experts a layer reads at a step."""
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

  weights = jax.jit(lambda params: policy.for_decode(params, SLOTS))(params)
  (placed,) = mesh.put_batch((tokens,), layout)
  compiled = jax.jit(run)
  return lambda: compiled(weights, placed), float(jnp.mean(compiled(weights, placed)))


def _reader(devices: int) -> Any:
  """A call that reads READ_BYTES on every device at once."""
  total = jax.jit(jnp.sum)
  arrays = [jax.device_put(jnp.ones(READ_BYTES // 4, jnp.float32), device) for device in jax.local_devices()[:devices]]
  return lambda: [total(array) for array in arrays]
