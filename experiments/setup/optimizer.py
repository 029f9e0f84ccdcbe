"""Optimizers of the two phases, and the parameters that they leave frozen."""

import dataclasses

import optax

from models.config import TransformerConfig
from models.lora import BASE
from rspo_jax.training import parameters
from rspo_jax.training.train_step import skip_nonfinite


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """AdamW under a schedule: linear warm-up, then a cosine to `final_fraction` of the learning rate.

  Attributes:
    learning_rate: its peak. warmup_steps: updates until there. final_fraction: share of it left at the last update.
    max_grad_norm: gradients are scaled down to this global norm.
    frozen: patterns of parameter paths that are not trained. freeze_router: the routers are not.
    router_multiplier: factor on the learning rate of the routers.
  """

  learning_rate: float = 1e-3
  warmup_steps: int = 20
  final_fraction: float = 1.0
  b1: float = 0.9
  b2: float = 0.99
  weight_decay: float = 0.0
  max_grad_norm: float = 1.0
  frozen: tuple[str, ...] = ()
  freeze_router: bool = False
  router_multiplier: float = 1.0


def make_optimizer(
  config: OptimizerConfig, updates: int, model: TransformerConfig | None
) -> tuple[optax.GradientTransformation, optax.Schedule]:
  """AdamW under the config's schedule over that many updates; non-finite gradients are skipped."""
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
  optimizer = parameters.freeze(optimizer, frozen_parameters(config, model))
  if config.router_multiplier != 1.0:
    multipliers = {parameters.ROUTER: config.router_multiplier}
    optimizer = optax.chain(optimizer, parameters.scale_updates(multipliers))
  return skip_nonfinite(optimizer), schedule


def frozen_parameters(config: OptimizerConfig, model: TransformerConfig | None) -> tuple[str, ...]:
  """Patterns of parameters that are not trained: those of the config, and those that no gradient may move.

  The latter are the base beside LoRA adapters, and the bias on the experts' choice, which has an update rule of its
  own.
  """
  routers = (parameters.ROUTER,) if config.freeze_router else ()
  base = (BASE,) if model is not None and model.lora.rank else ()
  router_bias = ("router_bias$",) if model is not None and model.router_bias else ()
  return (*config.frozen, *routers, *base, *router_bias)
