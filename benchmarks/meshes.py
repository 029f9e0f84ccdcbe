"""The mesh axis for the devices of a CPU: rows split over "data", or rows and experts split over "expert"."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import ours
from benchmarks.timing import by_turns, clocked
from experiments.configs.countdown_tiny import get_config
from experiments.setup.build import build, build_collector, build_update, optimizers
from experiments.setup.config_flags import read_config
from rspo_jax.rl_step import update
from rspo_jax.training.state import init_state

AXES = ("data", "expert")


def mesh_speed(rounds: int = 9, attempts: int = 27, devices: int | None = None) -> dict[str, Any]:
  """Sampling and training on a mesh with all devices on "expert" relative to one with all devices on "data".

  Two sizes: the benchmark model, and the demo (`experiments/configs/countdown_tiny.py`): the sampling and scoring of
  512 completions, and the update of an RL step on them (four minibatches are scored, then trained on). Both meshes
  alternate in one process.

  Returns:
    {case: [[`Run` on "data", `Run` on "expert"], ...]}, runs as dicts.
  """
  cases = {
    "sampling": [_case(ours.sampling, devices, axis) for axis in AXES],
    "train step": [_case(ours.train_step, devices, axis) for axis in AXES],
  }
  demo = [_demo(axis) for axis in AXES]
  cases |= {f"demo, {name}": [calls[name] for calls in demo] for name in demo[0]}
  return {name: _compare(calls, rounds, attempts) for name, calls in cases.items()}


def _case(case: Callable[..., Any], devices: int | None, axis: str) -> Callable[[], Any]:
  return case(devices=devices, mesh_shape={axis: -1}).call


def _demo(axis: str) -> dict[str, Callable[[], Any]]:
  """The two halves of the demo's RL step on this mesh, from its initial parameters."""
  given = get_config()
  given.runtime.mesh = {axis: -1}
  config = read_config(given)
  components = build(config)
  optimizer, _ = optimizers(config)["rl"]
  functions, collector = build_update(components, optimizer), build_collector(components)
  state = init_state(components.policy, optimizer, config.seed, components.layout)
  collected = collector.collect(state.params, 0)

  def take_updates() -> Any:
    nonlocal state
    state, metrics = update(functions, state, collected)
    return metrics

  sampled_from = jax.tree.map(jnp.copy, state.params)  # the update donates the state
  return {"sampling": lambda: collector.collect(sampled_from, 0), "update": take_updates}


def _compare(calls: list[Callable[[], Any]], rounds: int, attempts: int) -> list[list[dict[str, float]]]:
  timings = by_turns([clocked(call) for call in calls], warmup=2, repeats=rounds, attempts=attempts)
  return [[run._asdict() for run in runs] for runs in zip(*(timing.runs for timing in timings), strict=True)]
