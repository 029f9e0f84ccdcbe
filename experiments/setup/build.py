"""From a config to the parts a run is made of."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from experiments.config import ExperimentConfig
from experiments.setup.config_flags import check_divides
from experiments.setup.data import make_tokenizer, need_splits, read_data
from experiments.setup.optimizer import frozen_parameters
from experiments.setup.weight_sync import remote_engine
from models.policy import build_policy
from rspo_jax import mesh
from rspo_jax.data.examples import Example, Split
from rspo_jax.objectives.mismatch import MismatchOptions
from rspo_jax.objectives.table import OBJECTIVES, Recipe
from rspo_jax.rewards.table import Reward, make_reward
from rspo_jax.rollout.continuous import ContinuousSampler
from rspo_jax.rollout.sampling import SamplingOptions, sample
from rspo_jax.router.shift import ShiftOptions
from rspo_jax.tokenization.basic import Tokenizer, pad_left
from rspo_jax.training.loss import UpdateOptions
from rspo_jax.types import Array, Layout, Params, Policy, Rollout

# Streams of random numbers, folded into the seed before anything else is.
INIT, SAMPLING, EVALUATION, DATA = range(4)

# Arguments that every objective takes; all others are its own options.
OBJECTIVE_ARGUMENTS = ("log_ratio", "advantage", "mask", "log_shift", "placement")


class Components(NamedTuple):
  """What a run is made of.

  Attributes:
    splits, reward: None where only benchmarks are evaluated.
    prompt_length: Tp, the longest prompt of all splits, tokens.
    sampler: (SamplingOptions, Tp) -> (params, tokens [P, Tp], valid, key, first_row) -> Rollout, compiled once.
  """

  config: ExperimentConfig
  layout: Layout
  policy: Policy
  tokenizer: Tokenizer
  splits: dict[str, Split] | None
  reward: Reward | None
  prompt_length: int
  sampler: Callable[[SamplingOptions, int], Callable[..., Rollout]]

  def encode_prompts(self, examples: Sequence[Example], length: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """tokens [P, Tp] int32 and valid [P, Tp] bool; Tp is `length`, by default `prompt_length`."""
    return pad_left([self.tokenizer.encode(example.prompt) for example in examples], length or self.prompt_length)

  def key(self, stream: int, step: int = 0) -> Array:
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(self.config.seed), stream), step)

  def sampling_options(self, samples: int, **changed) -> SamplingOptions:
    s = self.config.sampling
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "cache_sizes")
    settings = {name: getattr(s, name) for name in names} | changed
    return SamplingOptions(samples_per_prompt=samples, stop_ids=self.tokenizer.stop_ids, **settings)

  def generate(
    self,
    params: Params,
    options: SamplingOptions,
    key: Array,
    examples: Sequence[Example],
    first: int = 0,
    length: int | None = None,
  ):
    """(Rollout, texts, lengths [B] in tokens) of examples whose first one has number `first`.

    length: of the prompts, Tp; by default `prompt_length`.
    """
    length = length or self.prompt_length
    first_row = first * options.samples_per_prompt
    rollout = self.sampler(options, length)(params, *self.encode_prompts(examples, length), key, first_row=first_row)
    drawn, mask = mesh.fetch((rollout.tokens, rollout.action_mask))
    texts = [self.tokenizer.decode(row[chosen].tolist()) for row, chosen in zip(drawn, mask, strict=True)]
    return rollout, texts, mask.sum(axis=1)


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
  if tokenizer.vocab_size > config.model.vocab_size:
    raise ValueError(
      f"config.model.vocab_size is {config.model.vocab_size} but the tokenizer has {tokenizer.vocab_size} tokens; "
      "raise it to at least that."
    )
  splits, reward, prompt_length = None, None, 0
  if training or not config.evaluation.benchmarks:
    splits = read_data(config.data, tokenizer)
    need_splits(splits, *(["train"] if training else []), *([] if config.evaluation.benchmarks else ["test"]))
    prompt_length = max(longest_prompt(split.examples, tokenizer) for split in splits.values())
    reward = make_reward(config.reward.name, **config.reward.options)
  policy = build_policy(config.model, layout)
  mesh.param_shardings(policy, layout)

  engine = remote_engine(config, policy) if config.sampling.engine else None

  @functools.cache
  def sampler(options: SamplingOptions, length: int):
    if engine is not None:
      ask = engine(options)
      return lambda *inputs, first_row: mesh.put_batch(ask(*inputs, first_row=first_row), layout)
    if config.sampling.rows:
      draw = ContinuousSampler(policy, options, rows=config.sampling.rows, prompt_length=length, layout=layout)
      return lambda *inputs, first_row: mesh.put_batch(draw(*inputs, first_row=first_row), layout)
    run = jax.jit(functools.partial(sample, policy, options=options))
    return lambda params, tokens, valid, key, first_row: run(
      params, *mesh.put_batch((tokens, valid), layout), key, first_row=first_row
    )

  return Components(config, layout, policy, tokenizer, splits, reward, prompt_length, sampler)


def longest_prompt(examples: Sequence[Example], tokenizer: Tokenizer) -> int:
  """In tokens."""
  return max(len(tokenizer.encode(example.prompt)) for example in examples)


def recipe(config: ExperimentConfig) -> Recipe:
  """The named objective with what the config changes about it.

  Raises:
    ValueError: an option that the objective does not have.
  """
  o = config.objective
  named = OBJECTIVES[o.name]
  known = inspect.signature(named.objective).parameters
  options = {}
  for name in ("eps_low", "eps_high", "dual_clip", "tau_pos", "tau_neg", "bounds", "ratio", "length_epsilon"):
    value = getattr(o, name)
    if value is None:
      continue
    if name not in known:
      own = [name for name in known if name not in OBJECTIVE_ARGUMENTS]
      raise ValueError(
        f"config.objective.{name} is {value!r}, but {o.name} has no such option; it has {own or 'none'}."
      )
    options[name] = value
  objective = functools.partial(named.objective, **options)
  scale = named.scale if o.scale is None else o.scale
  if scale == "batch_std":
    one = jax.ShapeDtypeStruct((1, 1), np.float32)
    try:
      jax.eval_shape(objective, one, one, jax.ShapeDtypeStruct((1, 1), bool))
    except ValueError as error:
      raise ValueError(
        f"config.objective.scale is 'batch_std', which gives every token an advantage of its own, but {o.name}: {error}"
      ) from error
  return Recipe(
    objective,
    named.aggregation if o.aggregation is None else o.aggregation,
    named.baseline if o.baseline is None else o.baseline,
    scale,
  )


def update_options(config: ExperimentConfig) -> UpdateOptions:
  """The update that `config.objective`, `config.router`, `config.mismatch` and `config.rl` describe."""
  o, r, m = config.objective, config.router, config.mismatch
  shift = None
  if r.shift:
    shift = ShiftOptions(
      floor=r.shift_floor,
      floor_start=r.shift_floor_start,
      floor_updates=r.shift_floor_updates,
      # A train state counts the updates of both phases.
      floor_begin=config.warm_start.steps if r.shift_floor_updates else 0,
      placement=r.placement,
      deviation=r.deviation,
      layers=r.layers,
      level=r.level,
    )
  chosen = recipe(config)
  return UpdateOptions(
    objective=chosen.objective,
    aggregation=chosen.aggregation,
    norm_length=o.norm_length or config.sampling.max_new_tokens,
    shift=shift,
    replay=r.replay,
    replay_gates=r.replay_gates,
    mismatch=None if m.correction == "none" else MismatchOptions(m.correction, m.level, m.upper, m.lower),
    kl_coefficient=o.kl_coefficient if o.kl_in == "loss" else 0.0,
    kl_estimator=o.kl_estimator,
    entropy_coefficient=o.entropy_coefficient,
    load_balance_coefficient=r.load_balance,
    router_z_coefficient=r.z_loss,
    router_bias_rate=r.bias_rate,
    frozen=frozen_parameters(config),
    microbatches=config.rl.microbatches,
    logits_chunk=config.rl.logits_chunk,
  )
