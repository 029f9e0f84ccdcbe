"""The optimizer of a phase, and the parameters that it does not train."""

import dataclasses

import optax

from experiments.setup.ranges import check_at_least
from models.config import TransformerConfig
from models.lora import BASE
from rspo_jax.training import parameters
from rspo_jax.training.train_step import skip_nonfinite


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """AdamW with a learning-rate schedule: linear warm-up, then cosine decay.

  Attributes:
    learning_rate: the largest of the schedule, >= 0.
    warmup_steps: updates until the largest learning rate, >= 0.
    final_fraction: learning rate of the last update divided by the largest, >= 0; 1 keeps it constant after warm-up.
    b1, b2: decay rates of the first and the second moment, in [0, 1).
    weight_decay: decoupled, times the learning rate, >= 0.
    max_grad_norm: gradients with a larger global norm are scaled down to it, > 0.
    frozen: regular expressions; parameters whose path matches one are not trained (`rspo_jax.training.parameters`).
    freeze_router: do not train the routers.
    router_multiplier: factor on the updates of the routers, after AdamW, >= 0.
  Raises:
    ValueError: a field out of range.
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

  def __post_init__(self):
    check_at_least(self, learning_rate=0, warmup_steps=0, final_fraction=0, weight_decay=0, router_multiplier=0)
    if not (0.0 <= self.b1 < 1.0 and 0.0 <= self.b2 < 1.0):
      raise ValueError(f"b1 is {self.b1} and b2 {self.b2}; want decay rates in [0, 1).")
    if not self.max_grad_norm > 0.0:
      raise ValueError(f"max_grad_norm is {self.max_grad_norm}; want more than 0. Use inf to switch clipping off.")


def make_optimizer(
  config: OptimizerConfig, updates: int, model: TransformerConfig | None
) -> tuple[optax.GradientTransformation, optax.Schedule]:
  """The optimizer and its schedule over `updates` updates. Updates with non-finite gradients are skipped.

  Args:
    model: decides which parameters are always frozen; None for a policy of the user's own.
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
  optimizer = parameters.freeze(optimizer, frozen_parameters(config, model))
  if config.router_multiplier != 1.0:
    multipliers = {parameters.ROUTER: config.router_multiplier}
    optimizer = optax.chain(optimizer, parameters.scale_updates(multipliers))
  return skip_nonfinite(optimizer), schedule


def frozen_parameters(config: OptimizerConfig, model: TransformerConfig | None) -> tuple[str, ...]:
  """Patterns of the parameters that are not trained.

  Besides those of the config: the base model under LoRA adapters, and the bias on the experts' selection, which has its
  own update rule (`UpdateOptions.router_bias_rate`).
  """
  routers = (parameters.ROUTER,) if config.freeze_router else ()
  base = (BASE,) if model is not None and model.lora.rank else ()
  router_bias = ("router_bias$",) if model is not None and model.router_bias else ()
  return (*config.frozen, *routers, *base, *router_bias)
