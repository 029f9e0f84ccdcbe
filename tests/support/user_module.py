"""What a user's module may hold: a policy, an objective, a reward and a data set, named in configs by dotted paths."""

import jax
import jax.numpy as jnp

from rspo_jax import policy_from_forward
from rspo_jax.data import Example, Split
from rspo_jax.objectives.terms import Terms, prepare
from rspo_jax.rewards import RewardResult

EXPERTS = 3


def make_policy(layout, *, vocab: int, width: int = 8):
  """One layer of experts that see the mean of the tokens so far."""

  def init(key):
    keys = jax.random.split(key, 3)
    shapes = {"embedding": (vocab, width), "router": (width, EXPERTS), "experts": (EXPERTS, width, width)}
    return {name: jax.random.normal(k, shape) * 0.3 for k, (name, shape) in zip(keys, shapes.items(), strict=True)}

  def forward(params, tokens, valid):
    x = params["embedding"][tokens] * valid[..., None]
    x = jnp.cumsum(x, axis=1) / jnp.maximum(jnp.cumsum(valid, axis=1), 1)[..., None]
    router = x @ params["router"]
    mixed = jnp.einsum("btd,edf,bte->btf", x, params["experts"], jax.nn.softmax(router))
    return (x + mixed) @ params["embedding"].T, router[None]

  return policy_from_forward(init, forward, experts_per_token=2)


def unclipped(log_ratio, advantage, mask, *, log_shift=None, placement="before_clip", power: float = 1.0):
  x = prepare(log_ratio, advantage, mask, log_shift, placement, per_token=True)
  values = jnp.exp(power * x.log_ratio + x.late_shift) * x.advantage
  return Terms(jnp.where(x.active, values, 0), *[jnp.zeros_like(mask)] * 3)


def longest(text, example, *, per_letter: float = 0.1):
  return RewardResult(per_letter * len(text), len(text) > 1, True)


def letters(data_dir, *, count: int):
  examples = tuple(Example(chr(97 + i), None) for i in range(count))
  return {"train": Split("letters/train", examples), "test": Split("letters/test", examples[:8])}
