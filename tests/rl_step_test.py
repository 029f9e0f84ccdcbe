"""The library's RL step: on-policy at first, its two halves apart, and its programs as records."""

import functools

import jax
import numpy as np
import optax
import pytest

from models.policy import build_policy
from rspo_jax import mesh, rl_step
from rspo_jax.data.examples import Example, Split
from rspo_jax.rewards.base import RewardResult
from rspo_jax.rl_programs import rl_programs
from rspo_jax.rl_step import RLOptions, compile_update, make_minibatches, update
from rspo_jax.rollout.collector import Collector, CollectorOptions
from rspo_jax.rollout.samplers import make_sampler
from rspo_jax.rollout.token_sampling import SamplingOptions
from rspo_jax.run.metrics import deterministic, is_known
from rspo_jax.tokenization.basic import CharTokenizer
from rspo_jax.training.loss import UpdateOptions
from rspo_jax.training.state import init_state
from tests.support import tiny

PROMPTS, SAMPLES, TP, NEW = 8, 2, 3, 4
TOKENIZER = CharTokenizer("abcdefghij")
SPLIT = Split(
  "letters", tuple(Example(text, text[0]) for text in ("ab", "bc", "cde", "d", "eac", "bb", "ca", "ij", "f"))
)
OPTIMIZER = optax.adamw(1e-3)


def reward(text, example):
  return RewardResult(float(example.gold in text) + 0.1 * len(text), example.gold in text, True)


@functools.cache
def parts(rows=0, record=False):
  layout = mesh.make_layout({"data": 2}, jax.devices()[:2])
  policy = build_policy(tiny.CONFIG, layout)
  options = SamplingOptions(NEW, SAMPLES, stop_ids=(0,), rows=rows, record_experts=record)
  sampler = make_sampler(policy, options, prompts=PROMPTS, prompt_length=TP, layout=layout)
  replay = "sampler" if record else "none"
  functions = compile_update(
    policy,
    OPTIMIZER,
    RLOptions(minibatches=2),
    update=UpdateOptions(replay=replay),
    samples_per_prompt=SAMPLES,
    layout=layout,
  )
  return layout, policy, sampler, functions


def collector(sampler, layout):
  return Collector(
    sampler,
    SPLIT,
    reward,
    TOKENIZER,
    CollectorOptions(prompts=PROMPTS),
    prompt_length=TP,
    key=jax.random.key(1),
    seed=0,
    layout=layout,
  )


def test_the_first_update_is_on_policy_and_metrics_are_documented():
  layout, policy, sampler, functions = parts()
  state = init_state(policy, OPTIMIZER, 0, layout)
  minibatches = make_minibatches(functions, state.params, collector(sampler, layout).collect(state.params, 0))
  _, metrics = functions.train_step(state, minibatches[0])
  assert metrics["ratio/max"] == metrics["ratio/p1"] == 1 and metrics["shift/gamma_mean"] == 1
  state = init_state(policy, OPTIMIZER, 0, layout)
  state, metrics = rl_step.rl_step(state, 0, collector=collector(sampler, layout), functions=functions)
  assert int(state.step) == 2 and all(map(is_known, metrics))


def test_collect_and_update_apart_are_the_step():
  layout, policy, sampler, functions = parts()
  state = init_state(policy, OPTIMIZER, 0, layout)
  collected = collector(sampler, layout).collect(state.params, 3)
  apart, metrics = update(functions, state, collected)
  state = init_state(policy, OPTIMIZER, 0, layout)
  together, all_metrics = rl_step.rl_step(state, 3, collector=collector(sampler, layout), functions=functions)
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(apart.params), jax.device_get(together.params))
  apart, together = deterministic(metrics | collected.metrics), deterministic(all_metrics)
  assert apart.keys() == together.keys()
  jax.tree.map(np.testing.assert_array_equal, apart, together)


@pytest.mark.parametrize(("rows", "record"), [(0, False), (4, True)])
def test_the_programs_are_what_a_step_runs_and_compile_from_shapes_alone(rows, record):
  layout, policy, sampler, functions = parts(rows, record)
  programs = rl_programs(policy, OPTIMIZER, functions, sampler, rows=PROMPTS * SAMPLES, prompt_length=TP)
  assert len({program.name for program in programs}) == len(programs)
  state = init_state(policy, OPTIMIZER, 0, layout)
  of_collector = collector(sampler, layout)
  for step in range(2):
    state, _ = rl_step.rl_step(state, step, collector=of_collector, functions=functions)
  by_function = {}
  for program in programs:
    by_function.setdefault(id(program.function), (program.function, []))[1].append(program)
  for function, listed in by_function.values():
    # Lowering from the records adds no entry: the step ran these very shapes, and no others.
    before = function._cache_size()
    assert before <= len(listed), [program.name for program in listed]
  step = next(program for program in programs if program.name.startswith("train step"))
  memory = step.lower().compile().memory_analysis()
  assert memory.argument_size_in_bytes > sum(leaf.nbytes for leaf in jax.tree.leaves(state.params)) / 2


def test_impossible_options_are_refused():
  with pytest.raises(ValueError, match="minibatches is 0; want 1 or more"):
    RLOptions(minibatches=0)
