"""Diagnostics that are too costly for every update; pure functions of parameters and a batch.

`make_gradient_noise`: does router shift lower the variance of the gradient? `make_replay_attribution`: which share of
the importance ratios is due to routing? (Both questions are from the reviews of RSPO.)
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from rspo_jax.router.trace import replay_from_trace
from rspo_jax.training.loss import UpdateOptions, make_loss, normalisers
from rspo_jax.training.minibatches import split_rows
from rspo_jax.training.parameters import path_name
from rspo_jax.training.scoring import token_log_prob
from rspo_jax.types import Array, Params, Policy, Replay, TrainBatch, TrainState

# (part of a parameter's path, its group); the first match decides.
GROUPS = (("router", "router"), ("moe", "experts"), ("attention/", "attention"), ("embedding", "embedding"))
GROUP_NAMES = ("router", "experts", "attention", "embedding", "rest")


def module_group(path: str) -> str:
  """The group of a parameter, one of `GROUP_NAMES`: "layers_0/moe/router" -> "router". lm_head is "embedding"."""
  return next((group for word, group in (*GROUPS, ("lm_head", "embedding")) if word in path), "rest")


def _squares(gradient: Params) -> dict[str, Array]:
  """Squared norm of a gradient, by module group."""
  totals = dict.fromkeys(GROUP_NAMES, jnp.zeros((), jnp.float32))
  for path, leaf in jax.tree_util.tree_flatten_with_path(gradient)[0]:
    totals[module_group(path_name(path))] += jnp.sum(jnp.square(leaf.astype(jnp.float32)))
  return totals


def make_gradient_noise(policy: Policy, options: UpdateOptions, pieces: int) -> Callable[..., dict[str, Array]]:
  """Noise of a minibatch's gradient, estimated from the gradients of its pieces.

  With g the minibatch's gradient and g_m those of M pieces (which sum to it), M g_m are M estimates of g, and the
  variance of their mean is sum_m |M g_m - g|^2 / (M (M - 1)). Its ratio to |g|^2 is noise over signal; reported by
  module group and for all parameters. Costs one gradient of the minibatch.

  Args:
    options: of the update; its objective and router strategies apply.
    pieces: M >= 2, equal parts of the minibatch.
  Returns:
    (state, batch) -> {"noise/<group>": [] float32}; 0 where the gradient is 0.
  """
  if pieces < 2:
    raise ValueError(f"pieces is {pieces}; the spread of gradients needs at least 2.")
  loss = make_loss(policy, options)

  def measure(state: TrainState, batch: TrainBatch) -> dict[str, Array]:
    norms = normalisers(policy, options, state, batch, pieces=pieces)
    differentiate = jax.grad(lambda params, piece: loss(params, piece, norms)[0])

    def accumulate(carry, piece):
      total, squares = carry
      gradient = differentiate(state.params, piece)
      return (jax.tree.map(jnp.add, total, gradient), jax.tree.map(jnp.add, squares, _squares(gradient))), None

    zeros = jax.tree.map(jnp.zeros_like, state.params)
    (total, of_pieces), _ = jax.lax.scan(accumulate, (zeros, _squares(zeros)), split_rows(batch, pieces))
    of_sum = _squares(total)
    of_pieces["all"], of_sum["all"] = sum(of_pieces.values()), sum(of_sum.values())

    def ratio(group):
      variance = (pieces * of_pieces[group] - of_sum[group]) / (pieces - 1)
      return jnp.where(of_sum[group] > 0, variance / jnp.where(of_sum[group] > 0, of_sum[group], 1), 0)

    return {f"noise/{group}": ratio(group) for group in of_sum}

  return measure


def make_replay_attribution(policy: Policy, *, logits_chunk: int = 128) -> Callable[..., dict[str, Array]]:
  """The share of the squared log-ratio that is due to routing.

  The batch is scored without a replay, with the experts of its old trace replayed (and the current gates), and, if the
  trace has gates, with those replayed too. share = 1 - E[replayed log-ratio^2] / E[log-ratio^2]: 1 if routing causes
  all of the log-ratio, 0 if it causes none, negative if the replay increases it. Costs two or three forwards.

  Returns:
    (params, batch) -> {"replay/log_ratio_square": nats^2, "replay/experts_share", and "replay/gates_share" if the trace
    has gates}; shares are 0 if every log-ratio is 0. Raises ValueError for a batch without old_routing.
  """

  def mean_square(params: Params, batch: TrainBatch, replay: Replay | None) -> Array:
    hidden, _ = policy.forward(params, batch.tokens, batch.valid, probe=lambda router, probe_inputs: (), replay=replay)
    log_prob, _ = token_log_prob(policy, params, hidden, batch.tokens, chunk=logits_chunk)
    squares = jnp.where(batch.action_mask, jnp.square(log_prob - batch.old_log_prob), 0)
    return squares.sum() / jnp.maximum(batch.action_mask.sum(), 1)

  def measure(params: Params, batch: TrainBatch) -> dict[str, Array]:
    if batch.old_routing is None:
      raise ValueError("replay attribution needs batch.old_routing; put the trace of `scoring.score` into it.")
    total = mean_square(params, batch, None)

    def share(gates: bool) -> Array:
      replayed = mean_square(params, batch, replay_from_trace(batch.old_routing, gates=gates))
      return jnp.where(total > 0, 1 - replayed / jnp.where(total > 0, total, 1), 0)

    shares = {"replay/log_ratio_square": total, "replay/experts_share": share(False)}
    return shares | ({} if batch.old_routing.gate is None else {"replay/gates_share": share(True)})

  return measure
