"""F4: from a config to the parts a run is made of."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
import optax

from experiments.config import ExperimentConfig, OptimizerConfig, check_divides
from models.policy import build_policy
from rspo_jax import countdown, mesh, objectives
from rspo_jax.data import DATASETS, Example, Split
from rspo_jax.rewards import REWARDS, Reward
from rspo_jax.sampling import SamplingOptions, sample
from rspo_jax.tokenizer import CharTokenizer, Tokenizer, pad_left
from rspo_jax.train_step import UpdateOptions, skip_nonfinite
from rspo_jax.types import Array, Layout, Params, Policy, Rollout

# Streams of random numbers, folded into the seed before anything else is.
INIT, SAMPLING, EVALUATION, DATA = range(4)


class Parts(NamedTuple):
  """What a run is made of.

  Attributes:
    prompt_length: Tp, the longest prompt of all splits, tokens.
    sampler: SamplingOptions -> jitted (params, tokens, valid, key, first_row) -> Rollout; one program per options.
  """

  config: ExperimentConfig
  layout: Layout
  policy: Policy
  tokenizer: Tokenizer
  splits: dict[str, Split]
  reward: Reward
  prompt_length: int
  sampler: Callable[[SamplingOptions], Callable[..., Rollout]]

  def encode_prompts(self, examples: Sequence[Example]) -> tuple[np.ndarray, np.ndarray]:
    """tokens [P, Tp] int32 and valid [P, Tp] bool."""
    return pad_left([self.tokenizer.encode(example.prompt) for example in examples], self.prompt_length)

  def key(self, stream: int, step: int = 0) -> Array:
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(self.config.seed), stream), step)

  def sampling_options(self, samples: int, **changed) -> SamplingOptions:
    s = self.config.sampling
    settings = {"temperature": s.temperature, "top_k": s.top_k, "top_p": s.top_p} | changed
    return SamplingOptions(s.max_new_tokens, samples, stop_ids=(self.tokenizer.eos_id,), **settings)

  def generate(self, params: Params, options: SamplingOptions, key: Array, examples: Sequence[Example], first: int = 0):
    """(Rollout, texts, lengths [B] in tokens) of examples whose first one has number `first`."""
    tokens, valid = mesh.put_batch(self.encode_prompts(examples), self.layout)
    first_row = first * options.samples_per_prompt
    rollout = self.sampler(options)(params, tokens, valid, key, first_row=first_row)
    drawn, mask = mesh.fetch((rollout.tokens, rollout.action_mask))
    texts = [self.tokenizer.decode(row[chosen].tolist()) for row, chosen in zip(drawn, mask, strict=True)]
    return rollout, texts, mask.sum(axis=1)


def build(config: ExperimentConfig) -> Parts:
  """Reads the data and checks every size; compiles nothing.

  Raises:
    ValueError: data, mesh, batch sizes or vocabulary do not fit; names the key and the cure.
  """
  layout = mesh.make_layout(config.runtime.mesh)
  check_divides(config, layout.batch_shards)
  tokenizer = CharTokenizer(countdown.ALPHABET)
  if tokenizer.vocab_size > config.model.vocab_size:
    raise ValueError(
      f"config.model.vocab_size is {config.model.vocab_size} but the tokenizer has {tokenizer.vocab_size} tokens; "
      "raise it to at least that."
    )
  splits = DATASETS[config.data.name](config.data.data_dir or None, **config.data.options)
  prompt_length = max(len(tokenizer.encode(e.prompt)) for split in splits.values() for e in split.examples)
  policy = build_policy(config.model, layout)
  mesh.param_shardings(policy, layout)

  @functools.cache
  def sampler(options: SamplingOptions):
    return jax.jit(functools.partial(sample, policy, options=options))

  reward = functools.partial(REWARDS[config.reward.name], **config.reward.options)
  return Parts(config, layout, policy, tokenizer, splits, reward, prompt_length, sampler)


def make_optimizer(config: OptimizerConfig, updates: int) -> tuple[optax.GradientTransformation, optax.Schedule]:
  """AdamW under the config's schedule over so many updates; non-finite gradients are skipped."""
  schedule = optax.warmup_cosine_decay_schedule(
    init_value=config.learning_rate / (config.warmup_steps + 1),
    peak_value=config.learning_rate,
    warmup_steps=config.warmup_steps,
    decay_steps=max(updates, config.warmup_steps + 1),
    end_value=config.learning_rate * config.final_fraction,
  )
  optimizer = optax.chain(
    optax.clip_by_global_norm(config.max_grad_norm),
    optax.adamw(schedule, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay),
  )
  return skip_nonfinite(optimizer), schedule


def update_options(config: ExperimentConfig) -> UpdateOptions:
  """The update that `config.objective` and `config.rl` describe."""
  o = config.objective
  objective = functools.partial(
    objectives.OBJECTIVES[o.name], eps_low=o.eps_low, eps_high=o.eps_high, placement=o.placement
  )
  return UpdateOptions(
    objective=objective,
    aggregation=o.aggregation,
    shift_floor=o.shift_floor if o.router_shift else None,
    microbatches=config.rl.microbatches,
    logits_chunk=config.rl.logits_chunk,
  )
