"""The warm start: supervised updates on demonstrations before RL, which teach the format of an answer."""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.setup.build import Components
from rspo_jax import mesh
from rspo_jax.data.examples import Example, batches
from rspo_jax.rollout.completions import Completion, new_completion, to_rollout
from rspo_jax.training.state import abstract_state, state_shardings
from rspo_jax.training.train_step import jit_step, make_supervised_step
from rspo_jax.types import Program, TrainBatch, TrainState


class WarmStart(NamedTuple):
  """The supervised phase.

  Attributes:
    step: (state, number of the step, from 0) -> (state, metrics); the state is donated.
    programs: what it compiles; () if `config.warm_start.steps` is 0.
  """

  step: Callable[[TrainState, int], tuple[TrainState, dict]]
  programs: tuple[Program, ...]


def build_warm_start(
  components: Components, optimizer: optax.GradientTransformation, schedule: optax.Schedule
) -> WarmStart:
  """Builds the supervised phase of `config.warm_start`.

  Raises:
    ValueError: there are steps, but an example has no demonstration, or a longer one than a completion may be.
  """
  config = components.config
  if config.warm_start.steps:
    _check_demonstrations(components)
  update = jit_step(
    make_supervised_step(components.policy, optimizer, logits_chunk=config.loss.logits_chunk),
    components.layout,
    state_shardings(components.policy, optimizer, components.layout),
  )
  examples = batches(components.splits["train"], config.warm_start.batch_size, config.seed)

  def step(state: TrainState, number: int) -> tuple[TrainState, dict]:
    start = time.perf_counter()
    batch = _make_batch(components, examples.at(number), number)
    state, metrics = update(state, mesh.put_batch(batch, components.layout))
    metrics = jax.device_get(metrics)
    seconds = time.perf_counter() - start
    return state, metrics | {
      "optimizer/learning_rate": schedule(number),
      "speed/train_tokens_per_second": batch.valid.sum() / seconds,
      "seconds/step": seconds,
    }

  return WarmStart(step, (_program(components, optimizer, update),) if config.warm_start.steps else ())


def _check_demonstrations(components: Components) -> None:
  config, train = components.config, components.splits["train"]
  if not all(example.demonstration for example in train.examples):
    raise ValueError(
      f"config.warm_start.steps is {config.warm_start.steps}, but {train.name} has examples without a demonstration. "
      "Set config.warm_start.steps=0, or give every example one."
    )
  longest = max(len(components.tokenizer.encode(example.demonstration)) + 1 for example in train.examples)
  if longest > config.sampling.max_new_tokens:
    raise ValueError(
      f"the longest demonstration of {train.name} has {longest} tokens with its end token, but "
      f"config.sampling.max_new_tokens is {config.sampling.max_new_tokens}; raise it."
    )


def _make_batch(components: Components, examples: Sequence[Example], step: int) -> TrainBatch:
  """The demonstrations of a step's examples, on the host."""
  completions = [_demonstration(components, example, step, row) for row, example in enumerate(examples)]
  rollout = to_rollout(completions, components.prompt_length, components.config.sampling.max_new_tokens)
  return TrainBatch(
    tokens=rollout.tokens,
    valid=rollout.valid,
    action_mask=rollout.action_mask,
    old_log_prob=rollout.log_prob,
    advantage=np.zeros(len(completions), np.float32),
  )


def _demonstration(components: Components, example: Example, step: int, row: int) -> Completion:
  """A demonstration as a completion, incorrect with probability `wrong_fraction`. Its log-probs are not read."""
  config, tokenizer = components.config, components.tokenizer
  limit = config.sampling.max_new_tokens
  incorrect = np.random.default_rng((config.seed, step, row)).random() < config.warm_start.wrong_fraction
  text = example.wrong_demonstration if incorrect else example.demonstration
  tokens = [*tokenizer.encode(text), tokenizer.eos_id][:limit]
  zeros = np.zeros(len(tokens), np.float32)
  return new_completion(row, np.array(tokenizer.encode(example.prompt), np.int32), limit)._replace(
    tokens=np.array(tokens, np.int32), sampler_log_prob=zeros, log_prob=zeros, version=np.zeros(len(tokens), int)
  )


def _program(components: Components, optimizer: optax.GradientTransformation, update: Callable) -> Program:
  rows = components.config.warm_start.batch_size
  slots = components.prompt_length + components.config.sampling.max_new_tokens
  dtypes = {"tokens": jnp.int32, "valid": bool, "action_mask": bool, "old_log_prob": jnp.float32}
  batch = TrainBatch(
    **{name: jax.ShapeDtypeStruct((rows, slots), dtype) for name, dtype in dtypes.items()},
    advantage=jax.ShapeDtypeStruct((rows,), jnp.float32),
  )
  state = abstract_state(components.policy, optimizer, components.layout)
  return Program(
    f"supervised step on {rows} rows of {slots} tokens", update, (state, mesh.abstract_batch(batch, components.layout))
  )
