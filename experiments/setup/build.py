"""From a config to the components of a run."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import optax
from absl import logging

from experiments.config import ExperimentConfig
from experiments.setup.checks import check_divides
from experiments.setup.data import make_tokenizer, need_splits, read_data
from experiments.setup.optimizer import frozen_parameters, make_optimizer
from experiments.setup.weight_sync import remote_engine
from models.policy import build_policy
from rspo_jax import mesh
from rspo_jax.data.examples import Example, Split
from rspo_jax.lookup import look_up
from rspo_jax.objectives.advantages import AdvantageOptions
from rspo_jax.objectives.table import make_objective
from rspo_jax.rewards.base import Reward
from rspo_jax.rewards.table import make_reward
from rspo_jax.rl_step import UpdateFunctions, compile_update
from rspo_jax.rollout.collector import Collector
from rspo_jax.rollout.samplers import Sampler, make_sampler
from rspo_jax.rollout.token_sampling import SamplingOptions
from rspo_jax.tokenization.basic import Tokenizer
from rspo_jax.training.attribution import make_gradient_noise, make_replay_attribution
from rspo_jax.training.loss import UpdateOptions
from rspo_jax.types import Array, Layout, Policy

# Streams of random numbers, folded into the seed before anything else is.
INIT, SAMPLING, EVALUATION = range(3)


class Components(NamedTuple):
  """What a run is made of.

  Attributes:
    splits, reward: None where only benchmarks are evaluated.
    prompt_length: Tp, the longest prompt of all splits, tokens.
    sampler: (SamplingOptions, prompts of a batch, Tp, resume) -> `Sampler`; equal arguments give the same one.
  """

  config: ExperimentConfig
  layout: Layout
  policy: Policy
  tokenizer: Tokenizer
  splits: dict[str, Split] | None
  reward: Reward | None
  prompt_length: int
  sampler: Callable[..., Sampler]

  def stream(self, number: int) -> Array:
    """The key of a stream of random numbers, to be folded further."""
    return jax.random.fold_in(jax.random.key(self.config.seed), number)

  def key(self, stream: int) -> Array:
    return jax.random.fold_in(self.stream(stream), 0)

  def sampling_options(self, **changed) -> SamplingOptions:
    """`config.sampling` with the tokenizer's stop tokens and what is changed."""
    return dataclasses.replace(self.config.sampling, **{"stop_ids": self.tokenizer.stop_ids} | changed)


def build(config: ExperimentConfig, *, training: bool = True) -> Components:
  """Reads the data and checks every size; compiles nothing.

  Args:
    training: False where only `config.evaluation` counts: without batches of RL, and with benchmarks without
      `config.data` and `config.reward`.
  Raises:
    ValueError: data, mesh, batch sizes or vocabulary do not fit; names the key and the cure.
  """
  layout = mesh.make_layout(config.runtime.mesh)
  check_divides(config, layout.batch_shards, training=training)
  tokenizer = make_tokenizer(config.tokenizer, config.data.name)
  policy = make_policy(config, layout)
  if tokenizer.vocab_size > policy.vocab_size:
    raise ValueError(
      f"config.model.vocab_size is {policy.vocab_size} but the tokenizer has {tokenizer.vocab_size} tokens; "
      "raise it to at least that."
    )
  splits, reward, prompt_length = None, None, 0
  if training or not config.evaluation.benchmarks:
    splits = read_data(config.data, tokenizer)
    need_splits(splits, *(["train"] if training else []), *([] if config.evaluation.benchmarks else ["test"]))
    prompt_length = max(longest_prompt(split.examples, tokenizer) for split in splits.values())
    reward = make_reward(config.reward.name, **config.reward.options)
  mesh.param_shardings(policy, layout)  # raises for parameters that do not divide
  remote = None
  if config.engine is not None:
    remote = remote_engine(config.engine, policy, config.model, (config.pretrained, config.tokenizer))

  @functools.cache
  def sampler(options: SamplingOptions, prompts: int, length: int, resume: bool = False) -> Sampler:
    sizes = {"prompts": prompts, "prompt_length": length, "resume": resume}
    return make_sampler(policy, options, layout=layout, remote=remote, **sizes)

  return Components(config, layout, policy, tokenizer, splits, reward, prompt_length, sampler)


def make_policy(config: ExperimentConfig, layout: Layout | None = None) -> Policy:
  """The policy that `config.policy` names.

  Raises:
    ValueError: there is no such function, it does not take the options, or it returns something else.
  """
  if config.policy.name == "transformer":
    return build_policy(config.model, layout)
  make = look_up("config.policy.name", config.policy.name, {})
  try:
    inspect.signature(make).bind(layout, **config.policy.options)
  except TypeError as error:
    raise ValueError(f"config.policy.options do not fit {config.policy.name}: {error}.") from error
  policy = make(layout, **config.policy.options)
  if not isinstance(policy, Policy):
    raise ValueError(f"{config.policy.name} returned a {type(policy).__name__}; want a rspo_jax.Policy.")
  return policy


def longest_prompt(examples: Sequence[Example], tokenizer: Tokenizer) -> int:
  """In tokens."""
  return max(len(tokenizer.encode(example.prompt)) for example in examples)


def optimizers(config: ExperimentConfig) -> dict[str, tuple[optax.GradientTransformation, optax.Schedule]]:
  """Optimizer and schedule of each phase."""
  rl_updates = config.steps * config.rl.epochs * config.rl.minibatches
  return {
    "warm_start": make_optimizer(config.warm_start.optimizer, config.warm_start.steps, config.model),
    "rl": make_optimizer(config.optimizer, rl_updates, config.model),
  }


def build_collector(components: Components) -> Collector:
  """The groups that RL trains on."""
  config = components.config
  options = components.sampling_options(record_experts=config.loss.replay == "sampler")
  sampler = components.sampler(
    options, config.collector.prompts, components.prompt_length, resume=config.collector.carry_over > 0
  )
  return Collector(
    sampler,
    components.splits["train"],
    components.reward,
    components.tokenizer,
    config.collector,
    prompt_length=components.prompt_length,
    key=components.stream(SAMPLING),
    seed=config.seed,
    layout=components.layout,
    curriculum=config.curriculum,
  )


def build_update(components: Components, optimizer) -> UpdateFunctions:
  """The jitted functions of an RL update."""
  config = components.config
  _warn(config)
  return compile_update(
    components.policy,
    optimizer,
    config.rl,
    update=update_options(config),
    advantage=advantage_options(config),
    samples_per_prompt=config.sampling.samples_per_prompt,
    layout=components.layout,
    keep_trace=config.diagnostics.every > 0,
  )


def build_diagnostics(components: Components) -> Callable:
  """(state, minibatch) -> costly metrics: gradient noise by module group, and the replay attribution."""
  config = components.config
  noise = jax.jit(make_gradient_noise(components.policy, update_options(config), config.diagnostics.pieces))
  attribution = jax.jit(make_replay_attribution(components.policy, logits_chunk=config.loss.logits_chunk))
  return lambda state, batch: noise(state, batch) | attribution(state.params, batch)


def update_options(config: ExperimentConfig) -> UpdateOptions:
  """`config.loss` with the fields that other groups decide."""
  recipe = make_objective(config.objective.name, **config.objective.options)
  shift = config.shift
  if shift is not None:
    # A train state counts the updates of both phases.
    shift = dataclasses.replace(shift, floor_begin=config.warm_start.steps)
  return dataclasses.replace(
    config.loss,
    objective=recipe.objective,
    aggregation=config.loss.aggregation or recipe.aggregation,
    norm_length=config.loss.norm_length or config.sampling.max_new_tokens,
    shift=shift,
    mismatch=config.mismatch,
    frozen=frozen_parameters(config.optimizer, config.model),
  )


def advantage_options(config: ExperimentConfig) -> AdvantageOptions:
  """`config.advantage`; what it leaves open is the objective's."""
  recipe = make_objective(config.objective.name, **config.objective.options)
  chosen = config.advantage
  return dataclasses.replace(chosen, baseline=chosen.baseline or recipe.baseline, scale=chosen.scale or recipe.scale)


def _warn(config: ExperimentConfig) -> None:
  if (
    config.shift is not None
    and config.shift.placement == "before_clip"
    and config.objective.name in ("gspo", "gspo_token")
  ):
    logging.warning(
      "%s with router shift before its narrow clip: a mean gamma below the lower bound takes the gradient of every "
      "negative sequence; --config.shift.placement=weight does not (docs/algorithms.md).",
      config.objective.name,
    )
  if config.collector.carry_over and config.mismatch is None:
    logging.warning(
      "config.collector.carry_over is %d: tokens sampled by older policies count as sampled by the present one; "
      "--config.mismatch.correction=tis weighs them (docs/algorithms.md).",
      config.collector.carry_over,
    )
