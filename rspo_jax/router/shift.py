"""Router shift: the deviation of the router since the rollout, and the trust in each token that follows from it.

    deviation of a layer  d[l, t]  change of the router's log-probabilities of the OLD experts (`DEVIATIONS`)
    of a token            D[t]     over layers (`LAYERS`), then per token or over the sequence (`LEVELS`)
    trust                 gamma[t] = max(exp(-D[t]), floor), always without gradient

The defaults are the paper's: absolute log-difference, mean over layers, per token, floor 0.8, before the clip
(arXiv 2510.23027v2). The alternatives exist for comparison.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from rspo_jax.types import PLACEMENTS, Array, RoutingTrace

DEVIATIONS = ("abs", "squared", "kl", "overlap")
LAYERS = ("mean", "sum", "max")
LEVELS = ("token", "sequence")


@dataclasses.dataclass(frozen=True)
class ShiftOptions:
  """How router shift is measured and where it enters the objective. The defaults are the paper's.

  Attributes:
    floor: gamma_min, the smallest trust, in (0, 1]. 1 switches router shift off.
    floor_start: the floor before its schedule begins, in (0, 1]; read only if floor_updates > 0.
    floor_updates: the floor moves linearly from `floor_start` to `floor` over this many updates, then stays. 0: the
      floor is constant.
    floor_begin: updates before the schedule begins. A train state counts all its updates, also those of a warm start.
    placement: where the trust enters an objective, one of `rspo_jax.types.PLACEMENTS`: "before_clip", the ratio times
      trust is clipped (version 2 of the paper); "after_clip", the clipped term times trust (version 1); "weight", the
      same, but it never amplifies a term (only `gmpo` distinguishes the two).
    deviation: "abs", mean over the old experts of |change of log-probability|, nats; "squared", mean of its square,
      nats^2; "kl", KL(old || new) of the router over all experts, nats (the trace then stores the log-probabilities of
      all E experts); "overlap", 1 - |old and new top-k| / K.
    layers: how the deviations of the mixture-of-experts layers are combined: "mean", "sum" or "max".
    level: "token", or "sequence": the mean over the row's tokens, one trust for all of them.
  """

  floor: float = 0.8
  floor_start: float = 1.0
  floor_updates: int = 0
  floor_begin: int = 0
  placement: str = "before_clip"
  deviation: str = "abs"
  layers: str = "mean"
  level: str = "token"

  def __post_init__(self):
    for name, known in (
      ("placement", PLACEMENTS),
      ("deviation", DEVIATIONS),
      ("layers", LAYERS),
      ("level", LEVELS),
    ):
      if getattr(self, name) not in known:
        raise ValueError(f"router shift's {name} is {getattr(self, name)!r}; want one of {known}.")
    _check_floor(self.floor, "floor")
    _check_floor(self.floor_start, "floor_start")
    if self.floor_updates < 0 or self.floor_begin < 0:
      raise ValueError(
        f"floor_updates is {self.floor_updates} and floor_begin {self.floor_begin}; want both >= 0. Use "
        "floor_updates=0 for a constant floor."
      )

  def floor_at(self, step: int | Array) -> float | Array:
    """The floor after `step` updates: a float if it is constant, else a [] float32."""
    if not self.floor_updates:
      return self.floor
    progress = jnp.clip((step - self.floor_begin) / self.floor_updates, 0.0, 1.0)
    return self.floor_start + (self.floor - self.floor_start) * progress


def _check_floor(floor: float, name: str) -> None:
  if not 0.0 < floor <= 1.0:
    raise ValueError(f"{name} is {floor}; want a value in (0, 1]. Use 1.0 to switch router shift off.")


def router_drift(new_log_prob: Array, old_log_prob: Array, *, squared: bool = False) -> Array:
  """Mean absolute (or squared) change of the old experts' router log-probs.

  Args:
    new_log_prob, old_log_prob: [..., K], nats, of the experts the OLD policy chose.
  Returns:
    [...] float32, nats (or nats^2), >= 0. Its mean over layers is the Delta of router shift.
  Source: RSPO, arXiv 2510.23027v2.
  """
  change = new_log_prob.astype(jnp.float32) - old_log_prob.astype(jnp.float32)
  return (jnp.square(change) if squared else jnp.abs(change)).mean(axis=-1)


def router_kl(new_log_prob: Array, old_log_prob: Array) -> Array:
  """KL(old || new) of the router over all experts.

  Args:
    new_log_prob, old_log_prob: [..., E], nats. Scores that do not sum to 1 (sigmoid routers) are normalised first.
  Returns:
    [...] float32, nats, >= 0; exactly 0 for equal input.
  """
  new, old = (jax.nn.log_softmax(x.astype(jnp.float32), axis=-1) for x in (new_log_prob, old_log_prob))
  unmoved = jnp.all(new_log_prob == old_log_prob, axis=-1)  # XLA may round the two normalisations of it differently
  return jnp.where(unmoved, 0.0, jnp.maximum(jnp.sum(jnp.exp(old) * (old - new), axis=-1), 0.0))


def expert_overlap(new_index: Array, old_index: Array) -> Array:
  """[..., K] new and old experts (distinct) -> [...] float32 in [0, 1], the share of the old ones still chosen."""
  same = new_index[..., None, :].astype(jnp.int32) == old_index[..., :, None].astype(jnp.int32)
  return same.any(axis=-1).mean(axis=-1, dtype=jnp.float32)


def layer_deviation(kind: str, new: RoutingTrace, old: RoutingTrace) -> Array:
  """One layer's deviation, [B, T] float32, >= 0.

  Args:
    kind: one of `DEVIATIONS`.
    new, old: of one layer, [B, T, ...]. `new.expert_index` is the current choice, `new.log_prob` of the OLD experts.
      "kl" reads `all_log_prob` of both.
  """
  if kind == "kl":
    return router_kl(new.all_log_prob, old.all_log_prob)
  if kind == "overlap":
    return 1.0 - expert_overlap(new.expert_index, old.expert_index)
  return router_drift(new.log_prob, old.log_prob, squared=kind == "squared")


def combine_deviation(by_layer: Array, mask: Array, options: ShiftOptions) -> Array:
  """The deviation of every token, over layers and, for level "sequence", over the tokens of its row.

  Args:
    by_layer: [L, B, T]. mask: [B, T] bool, the tokens the policy sampled.
  Returns:
    [B, T] float32, >= 0, in the unit of `options.deviation`.
  """
  deviation = {"mean": jnp.mean, "sum": jnp.sum, "max": jnp.max}[options.layers](by_layer, axis=0)
  if options.level == "token":
    return deviation
  length = jnp.maximum(mask.sum(axis=1, keepdims=True), 1)
  row = jnp.where(mask, deviation, 0).sum(axis=1, keepdims=True) / length
  return jnp.broadcast_to(row, deviation.shape)


def router_log_shift(drift: Array, *, floor: float | Array) -> Array:
  """Log trust in a token whose routing moved since the rollout: log(max(exp(-drift), floor)).

  Args:
    drift: [B, T] deviation of the router, >= 0 (the paper's: mean absolute change of the old experts' router
      log-probs over experts and layers, nats).
    floor: smallest trust, in (0, 1]; the paper uses 0.8; 1 switches router shift off. The range of an array (the value
      of a schedule) is not checked.
  Returns:
    [B, T] float32, nats, in [log(floor), 0]; carries no gradient.
  Raises:
    ValueError: a float outside (0, 1].
  Source: RSPO, arXiv 2510.23027v2.
  """
  if isinstance(floor, jax.Array):
    log_floor = jnp.log(floor)
  else:
    _check_floor(floor, "floor")
    log_floor = math.log(floor)
  return jax.lax.stop_gradient(jnp.maximum(-drift.astype(jnp.float32), log_floor))
