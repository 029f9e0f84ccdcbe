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
from rspo_jax.rl_step import Diagnose, UpdateFunctions, compile_update
from rspo_jax.rollout.collector import Collector
from rspo_jax.rollout.samplers import Sampler, make_sampler
from rspo_jax.rollout.token_sampling import SamplingOptions
from rspo_jax.tokenization.basic import Tokenizer
from rspo_jax.training.attribution import make_gradient_noise, make_replay_attribution
from rspo_jax.training.loss import UpdateOptions
from rspo_jax.types import Array, Layout, Policy

# Streams of random numbers: the number that is folded into the seed's key first.
INIT, SAMPLING, EVALUATION = range(3)


class Components(NamedTuple):
  """The components of a run.

  Attributes:
    splits: of `config.data`, with "train" and "test" as needed. reward: `config.reward`. Both are None if only named
      benchmarks are evaluated.
    prompt_length: Tp, length of the longest prompt of all splits, tokens; 0 without splits.
    sampler: (SamplingOptions, prompts per batch, Tp, resume=False) -> `Sampler`, cached by its arguments.
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
    """The key of a stream of random numbers; fold it further before use, or use `key`."""
    return jax.random.fold_in(jax.random.key(self.config.seed), number)

  def key(self, stream: int) -> Array:
    """A key of the stream that can be used directly."""
    return jax.random.fold_in(self.stream(stream), 0)

  def sampling_options(self, **changed) -> SamplingOptions:
    """`config.sampling` with the tokenizer's stop tokens, and with the fields in `changed`."""
    return dataclasses.replace(self.config.sampling, **{"stop_ids": self.tokenizer.stop_ids} | changed)


def build(config: ExperimentConfig, *, training: bool = True) -> Components:
  """Reads the data and checks all sizes. Compiles nothing.

  Args:
    training: False builds what `config.evaluation` needs: batches of training are not checked, and `config.data` and
      `config.reward` are not read if there are named benchmarks.
  Raises:
    ValueError: data, mesh, batch sizes, vocabulary or engine cannot be used together; names the key and the cure.
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
  mesh.param_shardings(policy, layout)  # raises if a parameter does not divide over the mesh
  remote = None
  if config.engine is not None:
    remote = remote_engine(config.engine, policy, config.model, (config.pretrained, config.tokenizer))

  @functools.cache
  def sampler(options: SamplingOptions, prompts: int, length: int, resume: bool = False) -> Sampler:
    sizes = {"prompts": prompts, "prompt_length": length, "resume": resume}
    return make_sampler(policy, options, layout=layout, remote=remote, **sizes)

  return Components(config, layout, policy, tokenizer, splits, reward, prompt_length, sampler)


def make_policy(config: ExperimentConfig, layout: Layout | None = None) -> Policy:
  """The policy named by `config.policy`.

  Args:
    layout: the mesh; None for one device.
  Raises:
    ValueError: there is no such function, it does not accept the options, or it does not return a `Policy`.
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
  """Length of the longest prompt, tokens."""
  return max(len(tokenizer.encode(example.prompt)) for example in examples)


def optimizers(config: ExperimentConfig) -> dict[str, tuple[optax.GradientTransformation, optax.Schedule]]:
  """The optimizer and the learning-rate schedule of each phase, "warm_start" and "rl"."""
  rl_updates = config.steps * config.rl.epochs * config.rl.minibatches
  return {
    "warm_start": make_optimizer(config.warm_start.optimizer, config.warm_start.steps, config.model),
    "rl": make_optimizer(config.optimizer, rl_updates, config.model),
  }


def build_collector(components: Components) -> Collector:
  """The collector of the groups that RL trains on."""
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


def build_update(components: Components, optimizer: optax.GradientTransformation) -> UpdateFunctions:
  """The jitted functions of an RL update. Warns of settings that are valid but seldom wanted."""
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


def build_diagnostics(components: Components) -> Diagnose:
  """The costly metrics: gradient noise by module group, and replay attribution."""
  config = components.config
  noise = jax.jit(make_gradient_noise(components.policy, update_options(config), config.diagnostics.pieces))
  attribution = jax.jit(make_replay_attribution(components.policy, logits_chunk=config.loss.logits_chunk))
  return lambda state, batch: noise(state, batch) | attribution(state.params, batch)


def update_options(config: ExperimentConfig) -> UpdateOptions:
  """`config.loss` with the fields that other groups of the config decide."""
  recipe = make_objective(config.objective.name, **config.objective.options)
  shift = config.shift
  if shift is not None:
    # The schedule starts with RL, but a train state counts the updates of both phases.
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
  """`config.advantage`, with the objective's baseline and scale where they are None."""
  recipe = make_objective(config.objective.name, **config.objective.options)
  options = config.advantage
  return dataclasses.replace(options, baseline=options.baseline or recipe.baseline, scale=options.scale or recipe.scale)


def _warn(config: ExperimentConfig) -> None:
  narrow_clip = config.objective.name in ("gspo", "gspo_token")
  if narrow_clip and config.shift is not None and config.shift.placement == "before_clip":
    logging.warning(
      "config.objective.name is %s and config.shift.placement is before_clip: a mean gamma below the lower bound of "
      "its narrow clip removes the gradient of every negative sequence. Set config.shift.placement=weight "
      "(docs/algorithms.md).",
      config.objective.name,
    )
  if config.collector.carry_over and config.mismatch is None:
    logging.warning(
      "config.collector.carry_over is %d and config.mismatch is off: tokens sampled by older policies are treated like "
      "those of the current policy. Set config.mismatch.correction=tis to weight them (docs/algorithms.md).",
      config.collector.carry_over,
    )
