"""CPU time of train steps with other objectives and router strategies, relative to the plain step."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.ours import Setup, make_batch, make_setup, make_step
from benchmarks.timing import Run, clocked
from rspo_jax.objectives.mismatch import MismatchOptions
from rspo_jax.objectives.table import OBJECTIVES
from rspo_jax.router.shift import ShiftOptions
from rspo_jax.training.attribution import make_gradient_noise, make_replay_attribution
from rspo_jax.training.loss import UpdateOptions
from rspo_jax.training.parameters import ROUTER
from rspo_jax.training.train_step import Step
from rspo_jax.types import TrainBatch

# Compared with the plain GRPO step: name -> (objective, router shift, other options of the update).
STRATEGIES: dict[str, tuple[str, ShiftOptions | None, dict[str, Any]]] = {
  "grpo again (control)": ("grpo", None, {}),
  **{name: (name, None, {}) for name in OBJECTIVES if name != "grpo"},
  "grpo + router shift": ("grpo", ShiftOptions(), {}),
  "gmpo + router shift (RSPO)": ("gmpo", ShiftOptions(), {}),
  "grpo + shift, weight, squared, max": (
    "grpo",
    ShiftOptions(placement="weight", deviation="squared", layers="max"),
    {},
  ),
  "grpo + shift, kl over all experts": ("grpo", ShiftOptions(deviation="kl"), {}),
  "grpo + shift, overlap, sequence": ("grpo", ShiftOptions(deviation="overlap", level="sequence"), {}),
  "grpo + replay": ("grpo", None, {"replay": "scoring"}),
  "grpo + replay of gates": ("grpo", None, {"replay": "scoring", "replay_gates": True}),
  "grpo + frozen router": ("grpo", None, {"frozen": (ROUTER,)}),
  "grpo + TIS": ("grpo", None, {"mismatch": MismatchOptions()}),
  "grpo + KL + entropy bonus": ("grpo", None, {"kl_coefficient": 0.01, "entropy_coefficient": 0.01}),
  "grpo without any diagnostics": ("grpo", None, {"metrics": False}),
  "RSPO without any diagnostics": ("gmpo", ShiftOptions(), {"metrics": False}),
  "grpo + balance and z losses": ("grpo", None, {"load_balance_coefficient": 0.01, "router_z_coefficient": 0.01}),
}


def _clocked_step(setup: Setup, step: Step, batch: TrainBatch) -> Callable[[], Run]:
  """A clocked call of the step, which starts from a copy of the initial state and continues from its own."""
  state = jax.tree.map(jnp.copy, setup.state)

  def call() -> Any:
    nonlocal state
    state, metrics = step(state, batch)
    return state, metrics

  return clocked(call)


def shift_cost(rounds: int = 60, devices: int | None = None) -> dict[str, Any]:
  """CPU time of the GMPO step with router shift relative to the same step without it, and a control.

  The control is a second compilation of the step without router shift: the deviation of its ratio from 1 is the error
  of this measurement. The three steps alternate, in rotating order, on the same batch and from the same state.

  Returns:
    {"shift": ratios, "control": ratios}: per round, CPU seconds relative to the step without router shift.
  """
  setup = make_setup(devices)
  batch = make_batch(setup)
  calls = [_clocked_step(setup, make_step(setup, "gmpo", shift), batch) for shift in (ShiftOptions(), None, None)]
  for _ in range(2):
    for call in calls:
      call()
  orders = ((0, 1, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0), (0, 2, 1), (1, 0, 2))
  ratios = []
  for number in range(rounds):
    cpu = {index: calls[index]().cpu for index in orders[number % len(orders)]}
    ratios.append((cpu[0] / cpu[1], cpu[2] / cpu[1]))
  return {"shift": [with_shift for with_shift, _ in ratios], "control": [control for _, control in ratios]}


def strategy_cost(rounds: int = 9, devices: int | None = None) -> dict[str, Any]:
  """CPU and wall time of the step with every strategy, and of the diagnostic probes, relative to plain GRPO.

  All start from the same parameters; every round calls each once, in rotating order.

  Returns:
    {"step": {name: [[cpu ratio, wall ratio], ...]}, "probe": the same for the expensive diagnostics}.
  """
  setup = make_setup(devices)
  batch = make_batch(setup)
  noise = jax.jit(make_gradient_noise(setup.policy, UpdateOptions(), 4))
  replay = jax.jit(make_replay_attribution(setup.policy))
  probes = {
    "gradient noise, 4 pieces": clocked(lambda: noise(setup.state, batch)),
    "replay probe, experts and gates": clocked(lambda: replay(setup.state.params, batch)),
  }
  calls = {"grpo": _clocked_step(setup, make_step(setup, "grpo"), batch)}
  for name, (objective, shift, options) in STRATEGIES.items():
    calls[name] = _clocked_step(setup, make_step(setup, objective, shift, **options), batch)
  calls |= probes
  for call in calls.values():
    call(), call()
  names, ratios = list(calls), {name: [] for name in calls}
  for number in range(rounds):
    order = names[number % len(names) :] + names[: number % len(names)]
    order = order if number % 2 else order[::-1]
    runs = {name: calls[name]() for name in order}
    for name, run in runs.items():
      ratios[name].append((run.cpu / runs["grpo"].cpu, run.wall / runs["grpo"].wall))
  return {"step": {name: ratios[name] for name in STRATEGIES}, "probe": {name: ratios[name] for name in probes}}
