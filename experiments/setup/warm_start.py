"""Supervised steps on demonstrations, so that RL begins with a policy that knows the format of an answer."""

import time
from collections.abc import Callable
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
  """step: (state, number of the step) -> (state, metrics). programs: what it compiles; () without steps."""

  step: Callable[[TrainState, int], tuple[TrainState, dict]]
  programs: tuple[Program, ...]


def build_warm_start(
  components: Components, optimizer: optax.GradientTransformation, schedule: optax.Schedule
) -> WarmStart:
  """The supervised phase of `config.warm_start`.

  Raises:
    ValueError: the data set has no demonstrations, or one that is longer than a completion may be.
  """
  config, tokenizer = components.config, components.tokenizer
  train = components.splits["train"]
  if config.warm_start.steps and not all(example.demonstration for example in train.examples):
    raise ValueError(
      f"config.warm_start.steps is {config.warm_start.steps}, but {train.name} has examples without demonstration."
    )
  longest = max(len(tokenizer.encode(example.demonstration)) + 1 for example in train.examples)
  if config.warm_start.steps and longest > config.sampling.max_new_tokens:
    raise ValueError(
      f"the longest demonstration of {train.name} has {longest} tokens with its end token, but "
      f"config.sampling.max_new_tokens is {config.sampling.max_new_tokens}; raise it."
    )
  update = jit_step(
    make_supervised_step(components.policy, optimizer, logits_chunk=config.loss.logits_chunk),
    components.layout,
    state_shardings(components.policy, optimizer, components.layout),
  )
  index_stream = batches(train, config.warm_start.batch_size, config.seed)

  def demonstration(example: Example, step: int, row: int) -> Completion:
    rng = np.random.default_rng((config.seed, step, row))
    wrong = rng.random() < config.warm_start.wrong_fraction
    text = example.wrong_demonstration if wrong else example.demonstration
    prompt = np.array(tokenizer.encode(example.prompt), np.int32)
    tokens = [*tokenizer.encode(text), tokenizer.eos_id][: config.sampling.max_new_tokens]
    unknown = np.zeros(len(tokens), np.float32)
    return new_completion(row, prompt, config.sampling.max_new_tokens)._replace(
      tokens=np.array(tokens, np.int32), sampler_log_prob=unknown, log_prob=unknown, version=np.zeros(len(tokens), int)
    )

  def batch_of(step: int) -> TrainBatch:
    completions = [demonstration(example, step, row) for row, example in enumerate(index_stream.at(step))]
    rollout = to_rollout(completions, components.prompt_length, config.sampling.max_new_tokens)
    return TrainBatch(
      tokens=rollout.tokens,
      valid=rollout.valid,
      action_mask=rollout.action_mask,
      old_log_prob=rollout.log_prob,
      advantage=np.zeros(len(completions), np.float32),
    )

  def step(state: TrainState, number: int) -> tuple[TrainState, dict]:
    start = time.perf_counter()
    batch = batch_of(number)
    state, metrics = update(state, mesh.put_batch(batch, components.layout))
    metrics = jax.device_get(metrics)
    seconds = time.perf_counter() - start
    return state, metrics | {
      "optimizer/learning_rate": schedule(number),
      "speed/train_tokens_per_second": batch.valid.sum() / seconds,
      "seconds/step": seconds,
    }

  return WarmStart(step, (_program(components, optimizer, update),) if config.warm_start.steps else ())


def _program(components: Components, optimizer: optax.GradientTransformation, update: Callable) -> Program:
  rows = components.config.warm_start.batch_size
  slots = components.prompt_length + components.config.sampling.max_new_tokens
  kinds = {"tokens": jnp.int32, "valid": bool, "action_mask": bool, "old_log_prob": jnp.float32}
  batch = TrainBatch(
    **{name: jax.ShapeDtypeStruct((rows, slots), kind) for name, kind in kinds.items()},
    advantage=jax.ShapeDtypeStruct((rows,), jnp.float32),
  )
  state = abstract_state(components.policy, optimizer, components.layout)
  return Program(
    f"supervised step on {rows} rows of {slots} tokens", update, (state, mesh.abstract_batch(batch, components.layout))
  )
