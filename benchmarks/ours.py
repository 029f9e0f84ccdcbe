"""The work of benchmarks.peers done by this library: the functions that a benchmark worker (or a report) calls."""

import functools
import os
import tempfile
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import flops
from benchmarks.sizes import NEW_TOKENS, PROMPT_TOKENS, PROMPTS, ROW_TOKENS, ROWS, TINY
from benchmarks.timing import clocked, matmul_work, peak_memory
from benchmarks.workers import Case
from models.huggingface.config_json import config_from_hf
from models.policy import build_policy
from rspo_jax import mesh
from rspo_jax.objectives.mismatch import MismatchOptions
from rspo_jax.objectives.table import OBJECTIVES
from rspo_jax.rollout.sampling import SamplingOptions, sample
from rspo_jax.router.shift import ShiftOptions
from rspo_jax.training.attribution import make_gradient_noise, make_replay_attribution
from rspo_jax.training.loss import UpdateOptions
from rspo_jax.training.parameters import ROUTER
from rspo_jax.training.scoring import score
from rspo_jax.training.state import init_state, state_shardings
from rspo_jax.training.train_step import jit_step, make_train_step
from rspo_jax.types import Layout, Policy, TrainBatch, TrainState

CONFIG = config_from_hf({**TINY, "model_type": "qwen3_moe"}, scan_layers=False)


def _start(devices: int | None) -> None:
  """One virtual CPU device per core (as the main job does), or as many as asked for."""
  jax.config.update("jax_num_cpu_devices", devices or len(os.sched_getaffinity(0)))


class Setup(NamedTuple):
  layout: Layout
  policy: Policy
  optimizer: optax.GradientTransformation
  shardings: TrainState
  state: TrainState


def make_setup(devices: int | None, split: str = "data") -> Setup:
  """All devices on one axis of the mesh: "data" splits the rows only, "expert" the experts of every layer as well."""
  _start(devices)
  layout = mesh.make_layout({split: -1})
  policy = build_policy(CONFIG, layout)
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-4, weight_decay=0.1))
  shardings = state_shardings(policy, optimizer, layout)
  return Setup(layout, policy, optimizer, shardings, init_state(policy, optimizer, 0, layout))


def _rows(layout: Layout, length: int) -> Any:
  tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (PROMPTS, length), dtype=np.int32)
  return mesh.put_batch((tokens, np.ones_like(tokens, bool)), layout)


def _sampler(setup: Setup) -> Any:
  options = SamplingOptions(max_new_tokens=NEW_TOKENS, cache_sizes=4)
  return jax.jit(functools.partial(sample, setup.policy, options=options))


def sampling(devices: int | None = None) -> Case:
  """64 prompts of 32 tokens, 64 new tokens each, temperature 1, no truncation, no stop token.

  The experts are split over the devices: a few rows a step otherwise make every device read every expert.
  """
  setup = make_setup(devices, split="expert")
  tokens, valid = _rows(setup.layout, PROMPT_TOKENS)
  draw = _sampler(setup)
  rollout = draw(setup.state.params, tokens, valid, jax.random.key(0))
  if int(rollout.action_mask.sum()) != PROMPTS * NEW_TOKENS:
    raise RuntimeError(f"sampled {int(rollout.action_mask.sum())} tokens; want {PROMPTS * NEW_TOKENS}.")
  return Case(
    lambda: draw(setup.state.params, tokens, valid, jax.random.key(1)),
    PROMPTS * NEW_TOKENS,
    {"flops": flops.sampling(CONFIG, PROMPTS, PROMPT_TOKENS, NEW_TOKENS)},
  )


def scoring(devices: int | None = None) -> Case:
  """Log-probabilities, entropies and the routing trace of 64 rows of 96 tokens."""
  setup = make_setup(devices)
  tokens, valid = _rows(setup.layout, ROW_TOKENS)
  run = jax.jit(functools.partial(score, setup.policy))
  trace = run(setup.state.params, tokens, valid).trace
  entry_bytes = (trace.expert_index.nbytes + trace.log_prob.nbytes) / trace.log_prob.size
  return Case(
    lambda: run(setup.state.params, tokens, valid),
    ROWS * ROW_TOKENS,
    {"flops": flops.forward(CONFIG, ROWS, ROW_TOKENS), "trace_bytes_per_entry": entry_bytes},
  )


def _batch(setup: Setup) -> TrainBatch:
  """64 rows of 96 tokens, the last 64 of them drawn; old values from our own scoring of the same weights."""
  tokens, valid = _rows(setup.layout, ROW_TOKENS)
  scoring = functools.partial(score, setup.policy, all_experts=True, gates=True)
  scores = jax.jit(scoring)(setup.state.params, tokens, valid)
  actions = np.zeros((ROWS, ROW_TOKENS), bool)
  actions[:, PROMPT_TOKENS:] = True
  advantage = np.random.default_rng(1).standard_normal(ROWS).astype(np.float32)
  actions, advantage = mesh.put_batch((actions, advantage), setup.layout)
  others = {"sampler_log_prob": scores.log_prob, "reference_log_prob": scores.log_prob}
  return TrainBatch(tokens, valid, actions, scores.log_prob, advantage, scores.trace, **others)


def _step(setup: Setup, objective: str, shift: ShiftOptions | None, metrics: bool = True, **options: Any) -> Any:
  """metrics: hand out the step's diagnostics; else XLA drops all that only they need."""
  named = OBJECTIVES[objective]
  update = UpdateOptions(named.objective, named.aggregation, norm_length=NEW_TOKENS, shift=shift, **options)
  step = make_train_step(setup.policy, setup.optimizer, update)
  chosen = step if metrics else lambda state, batch: (step(state, batch)[0], {})
  return jit_step(chosen, setup.layout, setup.shardings)


def train_step(objective: str = "grpo", devices: int | None = None) -> Case:
  """One update with metrics on 64 rows of 96 tokens. The defaults are the peer's loss, and our own metrics on top."""
  setup = make_setup(devices)
  batch, step, state = _batch(setup), _step(setup, objective, None), setup.state

  def call() -> Any:
    nonlocal state
    state, metrics = step(state, batch)
    return state, metrics

  return Case(call, ROWS * ROW_TOKENS, {"flops": flops.train_step(CONFIG, ROWS, ROW_TOKENS)})


def matmul(devices: int | None = None) -> Case:
  """Nothing but float32 matrix products on all cores: the peak that the shares are shares of."""
  _start(devices)
  call, work = matmul_work()
  return Case(call, 0, {"flops": work})


def shift_cost(rounds: int = 60, devices: int | None = None) -> dict[str, Any]:
  """CPU time of the GMPO step with router shift against the same without it, beside a control.

  The control is the step without it compiled a second time: what its ratio differs from 1 is what this measurement
  cannot resolve. The three take turns, in a new order each round, on the same batch and from the same state.

  Returns:
    {"shift": ratios, "control": ratios}: per round, CPU seconds over those of the step without router shift.
  """
  setup = make_setup(devices)
  batch = _batch(setup)
  states = [jax.tree.map(jnp.copy, setup.state) for _ in range(3)]
  steps = [_step(setup, "gmpo", shift) for shift in (ShiftOptions(), None, None)]

  def turn(which: int) -> float:
    def call():
      states[which], metrics = steps[which](states[which], batch)
      return states[which], metrics

    return clocked(call)().cpu

  orders = ((0, 1, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0), (0, 2, 1), (1, 0, 2))
  for _ in range(2):
    for which in orders[0]:
      turn(which)
  found = []
  for number in range(rounds):
    spent = {which: turn(which) for which in orders[number % len(orders)]}
    found.append((spent[0] / spent[1], spent[2] / spent[1]))
  return {"shift": [r[0] for r in found], "control": [r[1] for r in found]}


# What is put beside the plain GRPO step: name -> (objective, router shift, other options of the update).
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


def strategy_cost(rounds: int = 9, devices: int | None = None) -> dict[str, Any]:
  """CPU and wall time of the step under every strategy over those of plain GRPO, round by round, and of the probes.

  All start every call from the same parameters; a round runs each once, in an order that rotates.

  Returns:
    {"step": {name: [[cpu ratio, wall ratio], ...]}, "probe": the same for the costly diagnostics}.
  """
  setup = make_setup(devices)
  batch = _batch(setup)
  calls = {}

  def of_step(objective, shift, options):
    step, state = _step(setup, objective, shift, **options), jax.tree.map(jnp.copy, setup.state)

    def call():
      nonlocal state
      state, metrics = step(state, batch)
      return state, metrics

    return clocked(call)

  calls["grpo"] = of_step("grpo", None, {})
  for name, strategy in STRATEGIES.items():
    calls[name] = of_step(*strategy)
  noise = jax.jit(make_gradient_noise(setup.policy, UpdateOptions(), 4))
  replay = jax.jit(make_replay_attribution(setup.policy))
  probes = {
    "gradient noise, 4 pieces": clocked(lambda: noise(setup.state, batch)),
    "replay probe, experts and gates": clocked(lambda: replay(setup.state.params, batch)),
  }
  calls |= probes
  for call in calls.values():
    call(), call()
  names, found = list(calls), {name: [] for name in calls}
  for number in range(rounds):
    order = names[number % len(names) :] + names[: number % len(names)]
    order = order if number % 2 else order[::-1]
    spent = {name: calls[name]() for name in order}
    for name, run in spent.items():
      found[name].append((run.cpu / spent["grpo"].cpu, run.wall / spent["grpo"].wall))
  return {"step": {name: found[name] for name in STRATEGIES}, "probe": {name: found[name] for name in probes}}


def compile_seconds(case: str, cache: str, devices: int | None = None) -> dict[str, Any]:
  """Seconds from nothing to the first result of "sampling" or "train_step", with a persistent cache in `cache`.

  Returns:
    {"compile": seconds to trace, lower and compile that one program; "ready": seconds from an imported library to its
    first result, with every small program on the way; "compiled": programs that were not in the cache;
    "peak_mib": peak memory}.
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
  if case == "sampling":
    program = _sampler(setup)
    arguments = (setup.state.params, *_rows(setup.layout, PROMPT_TOKENS), jax.random.key(0))
  else:
    program, arguments = _step(setup, "gmpo", ShiftOptions()), (setup.state, _batch(setup))
  jax.block_until_ready(arguments)
  before = time.perf_counter()
  compiled = program.lower(*arguments).compile()
  spent = time.perf_counter() - before
  jax.block_until_ready(compiled(*arguments))
  ready = time.perf_counter() - start
  return {"compile": spent, "ready": ready, "compiled": misses, "peak_mib": peak_memory()}


def cold_and_warm(report: Any, case: str) -> tuple[dict[str, Any], dict[str, Any]]:
  """`compile_seconds` in two processes that share a fresh cache. report: `workers.report`."""
  with tempfile.TemporaryDirectory() as cache:
    settings = {"case": case, "cache": cache}
    return tuple(report("benchmarks.ours:compile_seconds", settings) for _ in range(2))
