"""F4: from a config to the parts a run is made of."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
import optax

from experiments.config import ExperimentConfig, OptimizerConfig
from experiments.config_io import check_divides
from models.config import TransformerConfig
from models.lora import BASE
from models.policy import build_policy
from rspo_jax import countdown, mesh, objectives, parameters
from rspo_jax.continuous import ContinuousSampler
from rspo_jax.data import DATASETS, Example, Split
from rspo_jax.hf_tokenizer import load_tokenizer
from rspo_jax.mismatch import MismatchOptions
from rspo_jax.rewards import Reward, make_reward
from rspo_jax.router_shift import ShiftOptions, linear_floor
from rspo_jax.sampling import SamplingOptions, sample
from rspo_jax.tokenizer import CharTokenizer, Tokenizer, pad_left
from rspo_jax.train_step import UpdateOptions, skip_nonfinite
from rspo_jax.types import Array, Layout, Params, Policy, Rollout

# Streams of random numbers, folded into the seed before anything else is.
INIT, SAMPLING, EVALUATION, DATA = range(4)

# Arguments that every objective takes; all others are its own options.
OBJECTIVE_ARGUMENTS = ("log_ratio", "advantage", "mask", "log_shift", "placement")


class Parts(NamedTuple):
  """What a run is made of.

  Attributes:
    prompt_length: Tp, the longest prompt of all splits, tokens.
    sampler: SamplingOptions -> (params, tokens [P, Tp], valid, key, first_row) -> Rollout, compiled once per options.
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
    return SamplingOptions(s.max_new_tokens, samples, stop_ids=self.tokenizer.stop_ids, **settings)

  def generate(self, params: Params, options: SamplingOptions, key: Array, examples: Sequence[Example], first: int = 0):
    """(Rollout, texts, lengths [B] in tokens) of examples whose first one has number `first`."""
    first_row = first * options.samples_per_prompt
    rollout = self.sampler(options)(params, *self.encode_prompts(examples), key, first_row=first_row)
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
  tokenizer = load_tokenizer(config.tokenizer) if config.tokenizer else CharTokenizer(countdown.ALPHABET)
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
    if config.sampling.rows:
      draw = ContinuousSampler(policy, options, rows=config.sampling.rows, prompt_length=prompt_length, layout=layout)
      return lambda *inputs, first_row: mesh.put_batch(draw(*inputs, first_row=first_row), layout)
    run = jax.jit(functools.partial(sample, policy, options=options))
    return lambda params, tokens, valid, key, first_row: run(
      params, *mesh.put_batch((tokens, valid), layout), key, first_row=first_row
    )

  reward = make_reward(config.reward.name, **config.reward.options)
  return Parts(config, layout, policy, tokenizer, splits, reward, prompt_length, sampler)


def make_optimizer(
  config: OptimizerConfig,
  updates: int,
  *,
  frozen: Sequence[str] = (),
  multipliers: Mapping[str, float] | None = None,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
  """AdamW under the config's schedule over so many updates; non-finite gradients are skipped.

  Args:
    frozen: patterns of parameters that are not trained. multipliers: pattern -> factor on the learning rate.
  """
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
  optimizer = parameters.freeze(optimizer, frozen)
  if multipliers:
    optimizer = optax.chain(optimizer, parameters.scale_updates(multipliers))
  return skip_nonfinite(optimizer), schedule


def rl_optimizer(config: ExperimentConfig) -> tuple[optax.GradientTransformation, optax.Schedule]:
  """The optimizer of RL, with what `config.router` and `config.rl` freeze or slow down."""
  factor = config.router.learning_rate_multiplier
  return make_optimizer(
    config.rl.optimizer,
    config.rl.steps * config.rl.epochs * config.rl.minibatches,
    frozen=frozen_parameters(config),
    multipliers=None if factor == 1.0 else {parameters.ROUTER: factor},
  )


def frozen_parameters(config: ExperimentConfig) -> tuple[str, ...]:
  """Patterns of what RL does not train."""
  routers = (parameters.ROUTER,) if config.router.freeze else ()
  return (*config.rl.frozen, *routers, *never_trained(config.model))


def never_trained(model: TransformerConfig) -> tuple[str, ...]:
  """Patterns of what no gradient moves: the base beside adapters, and the bias on the experts' choice, which has a rule
  of its own."""
  return (*((BASE,) if model.lora.rank else ()), *(("router_bias$",) if model.router_bias else ()))


def recipe(config: ExperimentConfig) -> objectives.Recipe:
  """The named objective with what the config changes about it.

  Raises:
    ValueError: an option that the objective does not have.
  """
  o = config.objective
  named = objectives.OBJECTIVES[o.name]
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
  return objectives.Recipe(
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
    begin = config.warm_start.steps  # a train state counts the updates of both phases
    floor = (
      linear_floor(r.shift_floor_start, r.shift_floor, r.shift_floor_updates, begin=begin)
      if r.shift_floor_updates
      else r.shift_floor
    )
    shift = ShiftOptions(floor, r.placement, r.deviation, r.layers, r.level)
  chosen = recipe(config)
  return UpdateOptions(
    objective=chosen.objective,
    aggregation=chosen.aggregation,
    norm_length=o.norm_length or config.sampling.max_new_tokens,
    shift=shift,
    replay="none" if r.replay == "none" else "experts_and_gates" if r.replay_gates else "experts",
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
