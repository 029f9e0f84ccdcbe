"""Log-probabilities, entropies and the routing trace of given tokens, from one training forward."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from rspo_jax.router.trace import slots_to_layers, stack_trace, to_positions, to_slots, trace_probe
from rspo_jax.training.minibatches import join_rows, split_rows
from rspo_jax.types import Array, Params, Policy, Replay, RoutingTrace


class Scores(NamedTuple):
  """Results of one scoring forward.

  Attributes:
    log_prob, entropy: [B, T] float32, nats, slot-aligned; slot 0 has no scoring position: 0.
    trace: the routing of the same forward.
  """

  log_prob: Array
  entropy: Array
  trace: RoutingTrace


def token_log_prob(policy: Policy, params: Params, hidden: Array, tokens: Array, *, chunk: int) -> tuple[Array, Array]:
  """Log-probability of every token and entropy of its distribution, slot-aligned.

  Logits are computed for `chunk` positions at a time and recomputed in the backward pass, so [B, T, V] never exists.

  Args:
    hidden: [B, T, D], position-aligned. tokens: [B, T] int32.
    chunk: positions whose logits exist at the same time.
  Returns:
    (log_prob, entropy), [B, T] float32, nats; slot 0 is 0.
  """
  chex.assert_equal_shape_prefix([hidden, tokens], 2)
  length = tokens.shape[1]
  next_token = to_positions(tokens)

  def of_positions(hidden, token):
    logits = policy.unembed(params, hidden)
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.sum(jnp.where(jnp.arange(logits.shape[-1]) == token[..., None], logits, 0.0), axis=-1)
    expected = jnp.sum(jax.nn.softmax(logits, axis=-1) * logits, axis=-1)
    return chosen - normalizer, normalizer - expected

  if length <= chunk:
    per_position = of_positions(hidden, next_token)
  else:
    chunks = -(-length // chunk)

    def split(leaf):
      leaf = jnp.pad(leaf, [(0, 0), (0, chunks * chunk - length)] + [(0, 0)] * (leaf.ndim - 2))
      return leaf.reshape(leaf.shape[0], chunks, chunk, *leaf.shape[2:]).swapaxes(0, 1)

    def join(leaf):
      return leaf.swapaxes(0, 1).reshape(leaf.shape[1], chunks * chunk)[:, :length]

    recomputed = jax.checkpoint(of_positions, prevent_cse=False)
    _, by_chunk = jax.lax.scan(lambda _, xs: (None, recomputed(*xs)), None, (split(hidden), split(next_token)))
    per_position = jax.tree.map(join, by_chunk)
  return tuple(to_slots(value) for value in per_position)


def score(
  policy: Policy,
  params: Params,
  tokens: Array,
  valid: Array,
  *,
  expert_index: Array | None = None,
  all_experts: bool = False,
  gates: bool = False,
  microbatches: int = 1,
  chunk: int = 128,
) -> Scores:
  """The "old" values of the update: log-probabilities and routing under the policy that sampled, from one forward.

  Call it on minibatches with the update's shape, sharding and microbatches: the update's first forward then repeats
  this one exactly, so that every importance ratio and every gamma is 1.

  Args:
    tokens: [B, T] int32; valid: [B, T] bool.
    expert_index: [B, T, L, K], slot-aligned, experts to use instead of the router's own choice. With those of the
      sampler (`Rollout.expert_index`) this is rollout routing replay (R3, arXiv 2510.11370).
    all_experts, gates: additional fields of the trace, see `rspo_jax.router.trace.trace_probe`.
    microbatches: pieces scored one after the other, to save memory.
    chunk: positions whose logits exist at the same time.
  """
  probe = trace_probe(policy.router_log_prob, all_experts=all_experts, gates=gates)

  def score_piece(piece):
    tokens, valid, expert_index = piece
    replay = None if expert_index is None else Replay(slots_to_layers(expert_index))
    hidden, probed = policy.forward(params, tokens, valid, probe=probe, replay=replay)
    log_prob, entropy = token_log_prob(policy, params, hidden, tokens, chunk=chunk)
    return Scores(log_prob, entropy, stack_trace(probed))

  if microbatches == 1:
    return score_piece((tokens, valid, expert_index))
  return join_rows(jax.lax.map(score_piece, split_rows((tokens, valid, expert_index), microbatches)))
