"""The work of `benchmarks.peers` done by this library with its default settings: cases for `benchmarks.workers`."""

import functools
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from benchmarks import flops
from benchmarks.sizes import NEW_TOKENS, PROMPT_TOKENS, PROMPTS, ROW_TOKENS, ROWS, TINY
from benchmarks.timing import matmul_work
from benchmarks.workers import Case
from models.config import TransformerConfig
from models.huggingface.config_json import config_from_hf
from models.policy import build_policy
from rspo_jax import mesh
from rspo_jax.objectives.table import OBJECTIVES
from rspo_jax.rollout.samplers import Sampler, draw_rollout, make_sampler
from rspo_jax.rollout.token_sampling import SamplingOptions
from rspo_jax.router.shift import ShiftOptions
from rspo_jax.training.loss import UpdateOptions
from rspo_jax.training.scoring import score
from rspo_jax.training.state import init_state, state_shardings
from rspo_jax.training.train_step import Step, jit_step, make_train_step
from rspo_jax.types import Array, Layout, Policy, TrainBatch, TrainState

CONFIG = config_from_hf({**TINY, "model_type": "qwen3_moe"})


class Setup(NamedTuple):
  """A model on a mesh with its optimizer and initial state."""

  config: TransformerConfig
  layout: Layout
  policy: Policy
  optimizer: optax.GradientTransformation
  state: TrainState


def start_devices(devices: int | None) -> None:
  """Creates this number of virtual CPU devices; None is one per core, the default of the training command."""
  jax.config.update("jax_num_cpu_devices", devices or len(os.sched_getaffinity(0)))


def make_setup(
  devices: int | None = None, config: TransformerConfig = CONFIG, mesh_shape: Mapping[str, int] | None = None
) -> Setup:
  """mesh_shape: as for `rspo_jax.make_layout`; None is the default mesh."""
  start_devices(devices)
  layout = mesh.make_layout(mesh_shape)
  policy = build_policy(config, layout)
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-4, weight_decay=0.1))
  return Setup(config, layout, policy, optimizer, init_state(policy, optimizer, 0, layout))


def random_rows(setup: Setup, rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
  """tokens [rows, length] int32, uniform over the vocabulary, and valid [rows, length], all True."""
  tokens = np.random.default_rng(0).integers(0, setup.config.vocab_size, (rows, length), dtype=np.int32)
  return tokens, np.ones_like(tokens, bool)


def benchmark_sampler(setup: Setup) -> Sampler:
  options = SamplingOptions(max_new_tokens=NEW_TOKENS)
  return make_sampler(setup.policy, options, prompts=PROMPTS, prompt_length=PROMPT_TOKENS, layout=setup.layout)


def sampling(devices: int | None = None, mesh_shape: Mapping[str, int] | None = None) -> Case:
  """64 prompts of 32 tokens, 64 new tokens each, temperature 1, no truncation, no stop token."""
  setup = make_setup(devices, mesh_shape=mesh_shape)
  tokens, valid = random_rows(setup, PROMPTS, PROMPT_TOKENS)
  sampler = benchmark_sampler(setup)
  sampled = draw_rollout(sampler, setup.state.params, tokens, valid, jax.random.key(0)).action_mask.sum()
  if sampled != PROMPTS * NEW_TOKENS:
    raise RuntimeError(f"sampled {sampled} tokens; want {PROMPTS * NEW_TOKENS}.")
  return Case(
    lambda: draw_rollout(sampler, setup.state.params, tokens, valid, jax.random.key(1)),
    PROMPTS * NEW_TOKENS,
    {"flops": flops.sampling(setup.config, PROMPTS, PROMPT_TOKENS, NEW_TOKENS)},
  )


def scoring(devices: int | None = None) -> Case:
  """Log-probabilities, entropies and the routing trace of 64 rows of 96 tokens."""
  setup = make_setup(devices)
  tokens, valid = mesh.put_batch(random_rows(setup, ROWS, ROW_TOKENS), setup.layout)
  run = jax.jit(functools.partial(score, setup.policy))
  trace = run(setup.state.params, tokens, valid).trace
  entry_bytes = (trace.expert_index.nbytes + trace.log_prob.nbytes) / trace.log_prob.size
  return Case(
    lambda: run(setup.state.params, tokens, valid),
    ROWS * ROW_TOKENS,
    {"flops": flops.forward(setup.config, ROWS, ROW_TOKENS), "trace_bytes_per_entry": entry_bytes},
  )


def make_batch(setup: Setup) -> TrainBatch:
  """64 rows of 96 tokens, the last 64 of them sampled; old values from our own scoring under the same weights."""
  tokens, valid = mesh.put_batch(random_rows(setup, ROWS, ROW_TOKENS), setup.layout)
  run = jax.jit(functools.partial(score, setup.policy, all_experts=True, gates=True))
  scores = run(setup.state.params, tokens, valid)
  actions = np.zeros((ROWS, ROW_TOKENS), bool)
  actions[:, PROMPT_TOKENS:] = True
  advantage = np.random.default_rng(1).standard_normal(ROWS).astype(np.float32)
  actions, advantage = mesh.put_batch((actions, advantage), setup.layout)
  log_probs: dict[str, Array] = {"sampler_log_prob": scores.log_prob, "reference_log_prob": scores.log_prob}
  return TrainBatch(tokens, valid, actions, scores.log_prob, advantage, scores.trace, **log_probs)


def make_step(
  setup: Setup, objective: str, shift: ShiftOptions | None = None, metrics: bool = True, **options: Any
) -> Step:
  """The jitted step. metrics: return the diagnostics; without them XLA removes the computations they need."""
  recipe = OBJECTIVES[objective]
  update = UpdateOptions(recipe.objective, recipe.aggregation, norm_length=NEW_TOKENS, shift=shift, **options)
  step = make_train_step(setup.policy, setup.optimizer, update)
  chosen = step if metrics else lambda state, batch: (step(state, batch)[0], {})
  return jit_step(chosen, setup.layout, state_shardings(setup.policy, setup.optimizer, setup.layout))


def train_step(
  objective: str = "grpo", devices: int | None = None, mesh_shape: Mapping[str, int] | None = None
) -> Case:
  """One update with metrics on 64 rows of 96 tokens. The peer computes the same loss, without our metrics."""
  setup = make_setup(devices, mesh_shape=mesh_shape)
  batch, step, state = make_batch(setup), make_step(setup, objective), setup.state

  def call() -> Any:
    nonlocal state
    state, metrics = step(state, batch)
    return state, metrics

  return Case(call, ROWS * ROW_TOKENS, {"flops": flops.train_step(setup.config, ROWS, ROW_TOKENS)})


def matmul(devices: int | None = None) -> Case:
  """Float32 matrix products on all cores: the peak that shares are relative to."""
  start_devices(devices)
  call, work = matmul_work()
  return Case(call, 0, {"flops": work})
