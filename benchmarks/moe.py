"""Speed of the expert layer with every backend, relative to the matrix-product peak of the machine.

  python -m benchmarks.moe [--devices 2] [--repeats 9]

Every figure is the median of repeats in which all backends alternate. GFLOP/s and the share of peak are per CPU second,
so they are valid on a machine with other load; tokens per second are per wall-clock second. FLOPs counted: 6 D F per
token-expert pair in the forward pass, three times that with gradients (padding and recomputation are overhead).
"""

import argparse
import os
import time
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from benchmarks.timing import Timing, clocked, matmul_work
from models.layers.experts import run_experts


class Size(NamedTuple):
  tokens: int
  width: int
  hidden: int
  experts: int
  k: int
  layers: int  # one after the other, each with its own weights, so that weights are read as in a model
  gradients: bool

  @property
  def flops(self):
    passes = 3 if self.gradients else 1
    return 6 * self.width * self.hidden * self.tokens * self.k * self.layers * passes


SIZES = {
  **{f"decode: {n} tokens, 512 wide, 32 experts of 256, top 8": Size(n, 512, 256, 32, 8, 4, False) for n in (1, 4, 16)},
  "decode: 64 tokens, 256 wide, 16 experts of 128, top 4": Size(64, 256, 128, 16, 4, 4, False),
  "train: 6144 tokens, same layer, with gradients": Size(6144, 256, 128, 16, 4, 1, True),
  "wide: 1536 tokens, 512 wide, 32 experts of 256, top 8": Size(1536, 512, 256, 32, 8, 1, False),
  "wide, with gradients": Size(1536, 512, 256, 32, 8, 1, True),
}
RAGGED_TOKENS_ON_CPU = 256  # XLA runs ragged_dot as a masked dense product on CPUs: minutes and GiBs beyond this
GATHERED_TOKENS = 64  # copies the weights of K experts per token


def make_arrays(size, seed=0):
  """x, expert_index, gate, layers of weights; K distinct experts per token, uniform."""
  rng = np.random.default_rng(seed)
  e, d, f = size.experts, size.width, size.hidden

  def normal(*shape):
    return jnp.asarray(rng.normal(size=shape) / shape[-2] ** 0.5, jnp.float32)

  index = np.argsort(rng.random((size.tokens, e)), axis=1)[:, : size.k]
  gate = jnp.full((size.tokens, size.k), 1 / size.k)
  layers = [(normal(e, d, f), normal(e, d, f), normal(e, f, d)) for _ in range(size.layers)]
  return normal(size.tokens, d), jnp.asarray(index, jnp.int32), gate, layers


def stack(x, expert_index, gate, layers, run):
  for weights in layers:
    x = x + run(x, expert_index, gate, weights)
  return x


def split_tokens(x, expert_index, gate, weights):
  """Runs under shard_map, all arrays but the weights split over "device"."""
  return run_experts(x, expert_index, gate, weights)


def split_experts(x, expert_index, gate, weights):
  """Runs under shard_map, all arrays split over "device": tokens are gathered, outputs reduce-scattered."""
  x, expert_index, gate = jax.lax.all_gather((x, expert_index, gate), "device", tiled=True)
  first = jax.lax.axis_index("device") * weights[0].shape[0]
  return jax.lax.psum_scatter(run_experts(x, expert_index - first, gate, weights), "device", tiled=True)


def functions(size):
  """Name -> function of the arrays of `make_arrays`."""
  platform = jax.default_backend()
  backends = ["dense", "ragged", "blocks", "gathered"]
  if platform == "cpu" and size.tokens > RAGGED_TOKENS_ON_CPU:
    backends.remove("ragged")
  if size.tokens > GATHERED_TOKENS:
    backends.remove("gathered")
  by_name = {name: partial(stack, run=partial(run_experts, backend=name)) for name in backends}
  if size.gradients:
    return {name: jax.value_and_grad(partial(project, run=run), argnums=(0, 2, 3)) for name, run in by_name.items()}
  if jax.device_count() > 1 and size.tokens % jax.device_count() == 0:
    mesh = Mesh(np.array(jax.devices()), ("device",))
    rows = PartitionSpec("device")
    for run, weights in ((split_tokens, PartitionSpec()), (split_experts, rows)):
      by_name[f"auto, {run.__name__.replace('_', ' ')}"] = jax.shard_map(
        partial(stack, run=run), mesh=mesh, in_specs=(rows, rows, rows, weights), out_specs=rows, check_vma=False
      )
  return by_name


def project(*arrays, run):
  return jnp.sum(run(*arrays) ** 2)


def report(title, size, repeats, peak):
  arrays = make_arrays(size)
  calls, compile_seconds = {}, {}
  for name, function in functions(size).items():
    start = time.perf_counter()
    run = jax.jit(function).lower(*arrays).compile()
    compile_seconds[name] = time.perf_counter() - start
    # Arrays are put on the mesh once, before the timing.
    placed = jax.device_put(arrays, run.input_shardings[0])
    calls[name] = clocked(partial(run, *placed))
  for call in calls.values():
    call()
  rounds = [{name: call() for name, call in calls.items()} for _ in range(repeats)]
  print(f"\n{title}")
  print(
    f"  {'backend':24s} {'tokens/s':>10s} {'ms':>9s} {'CPU ms':>9s} {'GFLOP/s':>8s} {'of peak':>8s} {'compile s':>9s}"
  )
  for name in calls:
    timing = Timing(tuple(runs[name] for runs in rounds))
    wall, cpu = timing.median("wall"), timing.median("cpu")
    rate = size.flops / cpu / 1e9
    print(
      f"  {name:24s} {size.tokens * size.layers / wall:10.0f} {wall / size.layers * 1e3:9.3f}"
      f" {cpu / size.layers * 1e3:9.3f} {rate:8.1f} {rate / peak:7.0%} {compile_seconds[name]:9.2f}",
      flush=True,
    )


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--devices", type=int, default=os.cpu_count(), help="virtual CPU devices")
  parser.add_argument("--repeats", type=int, default=9)
  options = parser.parse_args()
  jax.config.update("jax_num_cpu_devices", options.devices)
  call, work = matmul_work()
  measured = clocked(call)
  measured()
  peak = work / min(measured().cpu for _ in range(7)) / 1e9
  print(f"{jax.device_count()} x {jax.devices()[0].device_kind}, JAX {jax.__version__}, float32")
  print(f"matrix-product peak {peak:.0f} GFLOP per CPU second. Times and tokens/s are per layer.")
  for title, size in SIZES.items():
    report(title, size, options.repeats, peak)


if __name__ == "__main__":
  main()
