"""The loss of a minibatch, or of one of its microbatches: the objective and the optional terms of an update."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from rspo_jax.objectives import penalties
from rspo_jax.objectives.aggregation import AGGREGATIONS, DEFAULT_AGGREGATION, aggregate, aggregation_weight
from rspo_jax.objectives.mismatch import MismatchOptions, mismatch_weight
from rspo_jax.objectives.sequence_level import gmpo
from rspo_jax.objectives.terms import Objective
from rspo_jax.router import balance
from rspo_jax.router.shift import ShiftOptions, combine_deviation, router_log_shift
from rspo_jax.router.trace import drift_probe, load_probe, replay_from_trace, to_positions, to_slots, trace_probe_inputs
from rspo_jax.training.diagnostics import RouterSums, TokenStatistics
from rspo_jax.training.minibatches import split_rows, sum_devices
from rspo_jax.training.parameters import stop_gradients
from rspo_jax.training.scoring import token_log_prob
from rspo_jax.types import Array, Params, Policy, TrainBatch, TrainState

REPLAYS = ("none", "scoring", "sampler")


@dataclasses.dataclass(frozen=True)
class UpdateOptions:
  """The loss of an update, and how its computation is divided.

  Attributes:
    objective: a function of `rspo_jax.objectives.token_level` or `rspo_jax.objectives.sequence_level`; bind its
      options (clip bounds, ...) with functools.partial, or use `rspo_jax.objectives.make_objective`. The placement of
      router shift is bound from `shift`.
    aggregation: how the terms of tokens are averaged, one of `rspo_jax.objectives.aggregation.AGGREGATIONS`. None:
      "seq_mean_token_mean". (An experiment puts the aggregation of the objective's recipe here.)
    norm_length: tokens, >= 1: the constant divisor of "seq_mean_token_sum_norm", the largest number of new tokens of a
      completion. Only that aggregation reads it.
    shift: router shift; None for the base objective, which reads no routing trace.
    replay: routing replay: which experts the update repeats instead of choosing them again. "none"; "scoring" (R2),
      those of the forward that gave the old log-probs; "sampler" (R3, arXiv 2510.11370), scoring repeats the sampler's
      experts, and the update repeats those of scoring. To the update both mean: the experts of `batch.old_routing`.
    replay_gates: repeat the gates of `batch.old_routing` too, as constants: the objective then gives the routers no
      gradient. False: the gates come from the current router, with gradient. Without a replay it has no effect on the
      update.
    mismatch: correction for a sampler whose log-probs differ from the trainer's; None is off.
    kl_coefficient: of the KL term to the reference policy in the loss, per nat; 0 is off.
    kl_estimator: of that KL, one of `rspo_jax.objectives.penalties.KL_ESTIMATORS`; "k2" or "k3" in a loss.
    entropy_coefficient: of an entropy bonus, per nat; 0 is off.
    load_balance_coefficient: of `rspo_jax.router.balance.load_balance_loss` over all valid tokens; 0 is off. With
      microbatches or pmap, the balance losses cost one additional forward, because the load-balance loss needs the
      choices of the whole minibatch.
    router_z_coefficient: of `rspo_jax.router.balance.router_z_loss` over all valid tokens, per nat^2; 0 is off.
    router_bias_rate: step of the bias on the expert choice after every update, in the unit of the router's scores; 0 is
      off. Needs a model with such a bias.
    frozen: patterns of parameter paths that get no gradient (`rspo_jax.training.parameters`). Freeze them in the
      optimizer too (`freeze` there); otherwise weight decay moves them.
    microbatches: equal pieces that a minibatch is processed in, to save memory, >= 1; the update is the same.
    logits_chunk: positions whose logits exist at the same time, >= 1.
  """

  objective: Objective = gmpo
  aggregation: str | None = None
  norm_length: int | None = None
  shift: ShiftOptions | None = dataclasses.field(default_factory=ShiftOptions)
  replay: str = "none"
  replay_gates: bool = False
  mismatch: MismatchOptions | None = None
  kl_coefficient: float = 0.0
  kl_estimator: str = "k3"
  entropy_coefficient: float = 0.0
  load_balance_coefficient: float = 0.0
  router_z_coefficient: float = 0.0
  router_bias_rate: float = 0.0
  frozen: tuple[str, ...] = ()
  microbatches: int = 1
  logits_chunk: int = 128

  def __post_init__(self):
    for name, known in (
      ("aggregation", (None, *AGGREGATIONS)),
      ("replay", REPLAYS),
      ("kl_estimator", penalties.KL_ESTIMATORS),
    ):
      if getattr(self, name) not in known:
        raise ValueError(f"{name} is {getattr(self, name)!r}; want one of {known}.")
    if self.norm_length is not None and self.norm_length < 1:
      raise ValueError(f"norm_length is {self.norm_length}; want 1 or more tokens.")
    if self.microbatches < 1 or self.logits_chunk < 1:
      raise ValueError(f"microbatches is {self.microbatches} and logits_chunk {self.logits_chunk}; want both >= 1.")

  @property
  def uses_balance_losses(self) -> bool:
    return bool(self.load_balance_coefficient or self.router_z_coefficient)

  @property
  def needs_trace(self) -> bool:
    """Whether the update reads `batch.old_routing`."""
    return self.shift is not None or self.replay != "none"


class LossAux(NamedTuple):
  """Outputs of a loss besides its value.

  Attributes:
    rows: arrays [b, ...], one entry per row of the microbatch; joined over microbatches and devices.
    sums: arrays that add up over microbatches and devices.
  """

  rows: Any
  sums: Any


class Normalisers(NamedTuple):
  """Values of the whole minibatch that the losses of its microbatches need; computed before any gradient.

  Attributes:
    weight: [] float32, of the objective's aggregation, >= 1.
    tokens: [], valid tokens, >= 1.
    choices: [L, E] int32, of each expert over the minibatch; None without balance losses, or if the microbatch is the
      whole minibatch.
    floor: of router shift; None without router shift.
  """

  weight: Array
  tokens: Array
  choices: Array | None
  floor: float | Array | None


def make_loss(policy: Policy, options: UpdateOptions) -> Callable[..., tuple[Array, LossAux]]:
  """The loss of one microbatch: (params, batch, Normalisers) -> (loss [], LossAux).

  The losses of all microbatches, and their gradients, add up to those of the minibatch.

  Raises:
    ValueError: "seq_mean_token_sum_norm" without a norm_length.
  """
  objective, mode = options.objective, options.aggregation or DEFAULT_AGGREGATION
  if mode == "seq_mean_token_sum_norm" and options.norm_length is None:
    raise ValueError(
      f"norm_length is None, but {mode!r} divides by it; want the largest number of new tokens a completion may have."
    )
  if options.shift is not None:
    objective = functools.partial(objective, placement=options.shift.placement)

  def mean(values: Array, mask: Array, norms: Normalisers) -> Array:
    values = jnp.where(mask, values, 0)
    return aggregate(values, mask, mode, norm_length=options.norm_length).total / norms.weight

  def loss(params: Params, batch: TrainBatch, norms: Normalisers) -> tuple[Array, LossAux]:
    mask = batch.action_mask
    params = stop_gradients(params, options.frozen)
    hidden, by_layer, router, balance_sums = _probed_forward(policy, params, batch, options)
    deviation = log_shift = weight = kl = None
    if options.shift is not None:
      deviation = combine_deviation(by_layer, mask, options.shift)
      log_shift = router_log_shift(deviation, floor=norms.floor)
    log_prob, entropy = token_log_prob(policy, params, hidden, batch.tokens, chunk=options.logits_chunk)
    log_ratio = log_prob - batch.old_log_prob
    terms = objective(log_ratio, batch.advantage, mask, log_shift=log_shift)
    values = terms.objective
    if options.mismatch is not None:
      weight = mismatch_weight(batch.old_log_prob, batch.sampler_log_prob, mask, options.mismatch)
      values = values * weight
    gain = mean(values, mask, norms)
    if options.entropy_coefficient:
      gain += options.entropy_coefficient * mean(entropy, mask, norms)
    if options.kl_coefficient:
      kl = penalties.kl(log_prob, batch.reference_log_prob, options.kl_estimator)
      gain -= options.kl_coefficient * mean(kl, mask, norms)
    losses = {}
    if options.uses_balance_losses:
      losses = _balance_losses(balance_sums, norms)
      gain -= options.load_balance_coefficient * losses["loss/load_balance"]
      gain -= options.router_z_coefficient * losses["loss/router_z"]
    statistics = TokenStatistics(
      log_prob=log_prob,
      entropy=entropy,
      log_ratio=log_ratio,
      clipped_low=terms.clipped_low,
      clipped_high=terms.clipped_high,
      grad_clipped=terms.grad_clipped,
      deviation=deviation,
      log_shift=log_shift,
      kl=kl,
      mismatch_weight=weight,
    )
    return -gain, LossAux(*jax.lax.stop_gradient((statistics, (router, losses))))

  return loss


def normalisers(
  policy: Policy,
  options: UpdateOptions,
  state: TrainState,
  batch: TrainBatch,
  *,
  pieces: int,
  axis_name: str | None = None,
) -> Normalisers:
  """`Normalisers` of a whole minibatch, under `jax.pmap` of that of all devices.

  Args:
    pieces: microbatches that the loss is computed in. axis_name: of `jax.pmap`, or None.
  Raises:
    ValueError: the batch lacks a field that the options need.
  """
  _check_batch(batch, options)
  weight = aggregation_weight(batch.action_mask, options.aggregation or DEFAULT_AGGREGATION)
  # At least 1, so that an empty minibatch gives 0 and not NaN.
  weight, tokens = (jnp.maximum(sum_devices(x, axis_name), 1) for x in (weight, batch.valid.sum()))
  choices = None
  if options.uses_balance_losses and (pieces > 1 or axis_name is not None):

    def count(piece):
      return _probed_forward(policy, state.params, piece, options)[3].choices

    choices = sum_devices(jax.lax.map(count, split_rows(batch, pieces)).sum(axis=0), axis_name)
  return Normalisers(weight, tokens, choices, None if options.shift is None else options.shift.floor_at(state.step))


def _balance_losses(sums: balance.BalanceSums, norms: Normalisers) -> dict[str, Array]:
  choices = sums.choices if norms.choices is None else norms.choices
  return {
    "loss/load_balance": balance.load_balance_loss(sums.probability, choices, norms.tokens),
    "loss/router_z": balance.router_z_loss(sums.z, norms.tokens),
  }


def _check_batch(batch: TrainBatch, options: UpdateOptions) -> None:
  chex.assert_equal_shape([batch.tokens, batch.valid, batch.action_mask, batch.old_log_prob])
  for needed, field, cure in (
    (options.shift is not None, "old_routing", "put the trace of `scoring.score` into it, or set shift to None"),
    (options.replay != "none", "old_routing", "put the trace of `scoring.score` into it, or set replay to 'none'"),
    (options.mismatch is not None, "sampler_log_prob", "put `Rollout.log_prob` into it, or set mismatch to None"),
    (options.kl_coefficient != 0, "reference_log_prob", "score the reference policy, or set kl_coefficient to 0"),
  ):
    if needed and getattr(batch, field) is None:
      raise ValueError(f"the options need {field}, but the batch has none; {cure}.")
  deviation = options.shift.deviation if options.shift else ""
  if deviation == "kl" and batch.old_routing.all_log_prob is None:
    raise ValueError("deviation 'kl' needs the log-probabilities of all experts; score with all_experts=True.")


def _probed_forward(policy: Policy, params: Params, batch: TrainBatch, options: UpdateOptions):
  """One training forward: (hidden, deviation by layer [L, B, T] by slot or None, RouterSums, BalanceSums or None)."""
  actions = to_positions(batch.action_mask)
  if options.shift is None:
    probe_routing = load_probe(policy.router_log_prob, actions)
  else:
    probe_routing = drift_probe(policy.router_log_prob, actions, deviation=options.shift.deviation)
  probe_balance = balance.balance_probe(batch.valid) if options.uses_balance_losses else lambda router, inputs: None
  replay = None
  if options.replay != "none":
    replay = replay_from_trace(batch.old_routing, gates=options.replay_gates)
  hidden, (routing, balance_sums) = policy.forward(
    params,
    batch.tokens,
    batch.valid,
    probe=lambda router, inputs: (probe_routing(router, inputs), probe_balance(router, inputs)),
    probe_inputs=None if options.shift is None else trace_probe_inputs(batch.old_routing.replace(gate=None)),
    replay=replay,
  )
  if options.shift is None:
    return hidden, None, RouterSums(routing.load, routing.entropy), balance_sums
  by_layer = to_slots(routing.deviation, axis=2)
  deviation = jnp.sum(jnp.where(batch.action_mask, by_layer, 0), axis=(1, 2))
  return hidden, by_layer, RouterSums(routing.load, routing.entropy, deviation, routing.overlap), balance_sums
