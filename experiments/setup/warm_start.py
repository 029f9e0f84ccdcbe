"""Supervised steps on demonstrations, so that RL begins with a policy that knows the form of an answer."""

import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
import optax

from experiments.setup.build import Components
from experiments.setup.optimizer import make_optimizer, untrained_patterns
from rspo_jax import mesh
from rspo_jax.data.examples import Example, batches
from rspo_jax.training.state import state_shardings
from rspo_jax.training.train_step import jit_step, make_supervised_step
from rspo_jax.types import TrainBatch, TrainState


class WarmStart(NamedTuple):
  """The compiled parts of the warm start. step: (state, number of the step) -> (state, metrics)."""

  optimizer: optax.GradientTransformation
  step: Callable


def build_warm_start(parts: Components) -> WarmStart:
  """Raises ValueError if the data set has no demonstrations, or not the wrong ones that were asked for."""
  config = parts.config.warm_start
  train = parts.splits["train"]
  if config.steps and not all(example.demonstration for example in train.examples):
    raise ValueError(f"config.warm_start.steps is {config.steps}, but {train.name} has examples without demonstration.")
  longest = max(len(parts.tokenizer.encode(example.demonstration)) + 1 for example in train.examples)
  if config.steps and longest > parts.config.sampling.max_new_tokens:
    raise ValueError(
      f"the longest demonstration of {train.name} has {longest} tokens with its end token, but "
      f"config.sampling.max_new_tokens is {parts.config.sampling.max_new_tokens}; raise it."
    )
  optimizer, schedule = make_optimizer(config.optimizer, config.steps, frozen=untrained_patterns(parts.config.model))
  update = jit_step(
    make_supervised_step(parts.policy, optimizer, logits_chunk=parts.config.rl.logits_chunk),
    parts.layout,
    state_shardings(parts.policy, optimizer, parts.layout),
  )
  examples_of = batches(train, config.batch_size, parts.config.seed)
  slots = parts.config.sampling.max_new_tokens

  def completion(example: Example, number: int, row: int) -> list[int]:
    rng = np.random.default_rng((parts.config.seed, number, row))
    wrong = rng.random() < config.wrong_fraction
    text = example.wrong_demonstration if wrong else example.demonstration
    return [*parts.tokenizer.encode(text), parts.tokenizer.eos_id]

  def batch_of(number: int) -> TrainBatch:
    examples = examples_of.at(number)
    prompt, prompt_valid = parts.encode_prompts(examples)
    tokens = np.zeros((len(examples), slots), np.int32)
    chosen = np.zeros((len(examples), slots), bool)
    for row, example in enumerate(examples):
      ids = completion(example, number, row)[:slots]
      tokens[row, : len(ids)], chosen[row, : len(ids)] = ids, True
    return TrainBatch(
      tokens=np.concatenate([prompt, tokens], axis=1),
      valid=np.concatenate([prompt_valid, chosen], axis=1),
      action_mask=np.concatenate([np.zeros_like(prompt_valid), chosen], axis=1),
      old_log_prob=np.zeros((len(examples), prompt.shape[1] + slots), np.float32),
      advantage=np.zeros(len(examples), np.float32),
    )

  def step(state: TrainState, number: int) -> tuple[TrainState, dict]:
    start = time.perf_counter()
    batch = batch_of(number)
    state, metrics = update(state, mesh.put_batch(batch, parts.layout))
    metrics = jax.device_get(metrics)
    seconds = time.perf_counter() - start
    return state, metrics | {
      "optimizer/learning_rate": schedule(number),
      "speed/train_tokens_per_second": batch.valid.sum() / seconds,
      "seconds/step": seconds,
    }

  return WarmStart(optimizer, step)
