"""Diagnostics too costly for every update: pure functions of parameters and a batch, run now and then.

Both answer questions that RSPO's reviewers asked: does router shift lower the variance of the gradient, and is the
router the cause of the importance ratios at all?
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

# The first name whose word stands in a parameter's path takes it.
GROUPS = (("router", "router"), ("moe", "experts"), ("attention/", "attention"), ("embedding", "embedding"))
GROUP_NAMES = ("router", "experts", "attention", "embedding", "rest")


def module_group(path: str) -> str:
  """ "layers_0/moe/router" -> "router"; one of `GROUP_NAMES`. The output matrix counts as embedding."""
  return next((group for word, group in (*GROUPS, ("lm_head", "embedding")) if word in path), "rest")


def _squares(gradient: Params) -> dict[str, Array]:
  """Squared norm of a gradient by module group."""
  totals = dict.fromkeys(GROUP_NAMES, jnp.zeros((), jnp.float32))
  for path, leaf in jax.tree_util.tree_flatten_with_path(gradient)[0]:
    totals[module_group(path_name(path))] += jnp.sum(jnp.square(leaf.astype(jnp.float32)))
  return totals


def make_gradient_noise(policy: Policy, options: UpdateOptions, pieces: int) -> Callable[..., dict[str, Array]]:
  """How noisy the gradient of a minibatch is, from the spread of its pieces' gradients.

  With g the minibatch's gradient and g_m those of M pieces (which sum to it), M g_m are M estimates of g, and the
  variance of their mean is sum_m |M g_m - g|^2 / (M (M - 1)). Reported over |g|^2: noise over signal, for the module
  groups and for all parameters. Costs a gradient of the minibatch.

  Args:
    options: of the update, with whose objective and router strategies it is measured.
    pieces: M >= 2, microbatches the minibatch is cut into.
  Returns:
    (state, batch) -> {"noise/<group>": [] float32}; 0 where the gradient is 0.
  """
  if pieces < 2:
    raise ValueError(f"pieces is {pieces}; the spread of gradients needs at least 2.")
  loss = make_loss(policy, options)

  def measure(state: TrainState, batch: TrainBatch) -> dict[str, Array]:
    norms = normalisers(policy, options, state, batch, pieces=pieces)
    differentiate = jax.grad(lambda params, part: loss(params, part, norms)[0])

    def one(carry, part):
      total, squares = carry
      gradient = differentiate(state.params, part)
      return (jax.tree.map(jnp.add, total, gradient), jax.tree.map(jnp.add, squares, _squares(gradient))), None

    start = (jax.tree.map(jnp.zeros_like, state.params), _squares(jax.tree.map(jnp.zeros_like, state.params)))
    (total, of_pieces), _ = jax.lax.scan(one, start, split_rows(batch, pieces))
    of_whole = _squares(total)
    of_pieces["all"], of_whole["all"] = sum(of_pieces.values()), sum(of_whole.values())

    def ratio(group):
      variance = (pieces * of_pieces[group] - of_whole[group]) / (pieces - 1)
      return jnp.where(of_whole[group] > 0, variance / jnp.where(of_whole[group] > 0, of_whole[group], 1), 0)

    return {f"noise/{group}": ratio(group) for group in of_whole}

  return measure


def make_replay_attribution(policy: Policy, *, logits_chunk: int = 128) -> Callable[..., dict[str, Array]]:
  """Which share of the squared log-ratio routing explains, so that the router is not blamed unheard.

  The batch is scored as it is, once more with the experts of its old trace pinned (their gates live), and, if the trace
  holds gates, with those pinned too. share = 1 - E[pinned log-ratio^2] / E[log-ratio^2]: 1 when routing is all there is
  to it, 0 when it has no part, below 0 when pinning makes it worse. Costs two or three forwards.

  Returns:
    (params, batch) -> {"replay/log_ratio_square": nats^2, "replay/experts_share", "replay/gates_share" if there are
    gates}; shares are 0 while every log-ratio is 0. The batch needs old_routing, else ValueError.
  """

  def square(params: Params, batch: TrainBatch, replay: Replay | None) -> Array:
    hidden, _ = policy.forward(params, batch.tokens, batch.valid, probe=lambda router, probe_inputs: (), replay=replay)
    log_prob, _ = token_log_prob(policy, params, hidden, batch.tokens, chunk=logits_chunk)
    squares = jnp.where(batch.action_mask, jnp.square(log_prob - batch.old_log_prob), 0)
    return squares.sum() / jnp.maximum(batch.action_mask.sum(), 1)

  def measure(params: Params, batch: TrainBatch) -> dict[str, Array]:
    if batch.old_routing is None:
      raise ValueError("the replay probe needs batch.old_routing; put the trace of `scoring.score` into it.")
    whole = square(params, batch, None)

    def share(gates: bool) -> Array:
      pinned = square(params, batch, replay_from_trace(batch.old_routing, gates=gates))
      return jnp.where(whole > 0, 1 - pinned / jnp.where(whole > 0, whole, 1), 0)

    shares = {"replay/log_ratio_square": whole, "replay/experts_share": share(False)}
    return shares | ({} if batch.old_routing.gate is None else {"replay/gates_share": share(True)})

  return measure
