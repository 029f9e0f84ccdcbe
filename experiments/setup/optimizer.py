"""The optimizers of the two phases, and what they leave frozen."""

from collections.abc import Mapping, Sequence

import optax

from experiments.config import ExperimentConfig, OptimizerConfig
from models.config import TransformerConfig
from models.lora import BASE
from rspo_jax.training import parameters
from rspo_jax.training.train_step import skip_nonfinite


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
  return (*config.rl.frozen, *routers, *untrained_patterns(config.model))


def untrained_patterns(model: TransformerConfig) -> tuple[str, ...]:
  """Patterns of what no gradient moves: the base beside adapters, and the bias on the experts' choice, which has a rule
  of its own."""
  return (*((BASE,) if model.lora.rank else ()), *(("router_bias$",) if model.router_bias else ()))
