"""How one token is sampled from logits: temperature, truncation, and the random key of every row and step."""

import dataclasses

import jax
import jax.numpy as jnp

from rspo_jax.types import Array, Params, Policy


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
  """How completions are sampled.

  Attributes:
    max_new_tokens: longest completion, in tokens, the stop token included.
    samples_per_prompt: G, completions of each prompt.
    temperature: divides the logits; 0 takes the most likely token.
    top_k: keep this many of the most likely tokens; 0 keeps all.
    top_p: then keep the smallest set of tokens whose probability reaches this, in (0, 1]; 1 keeps all.
    stop_ids: tokens that end a completion (and belong to it).
    record_experts: keep the experts every token was sampled with, in `Rollout.expert_index`.
    rows: rows decoded together by continuous batching (`rspo_jax.rollout.continuous`), which pays where lengths differ
      much; 0 samples batch-synchronously. Read by `rspo_jax.rollout.samplers.make_sampler`.
    cache_sizes: steps in which the cache of batch-synchronous sampling grows to its full size. Decoding a token reads
      the
      whole cache: more steps read less, and one decode loop is compiled for each. None: `make_sampler` chooses by
      platform and length. Continuous batching keeps one size.
  """

  max_new_tokens: int
  samples_per_prompt: int = 1
  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  stop_ids: tuple[int, ...] = ()
  record_experts: bool = False
  rows: int = 0
  cache_sizes: int | None = None

  def __post_init__(self):
    for name, least in (("max_new_tokens", 1), ("samples_per_prompt", 1), ("top_k", 0), ("rows", 0)):
      if getattr(self, name) < least:
        raise ValueError(f"{name} is {getattr(self, name)}; want {least} or more.")
    if self.cache_sizes is not None and self.cache_sizes < 1:
      raise ValueError(f"cache_sizes is {self.cache_sizes}; want 1 or more (1: the full cache from the start).")
    if self.rows and (self.cache_sizes or 1) > 1:
      raise ValueError(
        f"cache_sizes is {self.cache_sizes} and rows {self.rows}: continuous batching keeps a cache of one size. Set "
        "cache_sizes to 1, or rows to 0."
      )
    if self.temperature < 0 or not 0 < self.top_p <= 1:
      raise ValueError(
        f"temperature is {self.temperature} and top_p {self.top_p}; want temperature >= 0 (0 is greedy) and top_p in "
        "(0, 1] (1 keeps all tokens)."
      )

  @property
  def greedy(self) -> bool:
    return self.temperature == 0


def truncated_log_prob(logits: Array, options: SamplingOptions) -> Array:
  """Log-probabilities of the distribution that tokens are sampled from.

  Args:
    logits: [..., V] float32.
  Returns:
    [..., V] float32, nats; -inf for tokens that temperature 0, top-k or top-p rule out.
  """
  if options.greedy:
    best = jnp.argmax(logits, axis=-1, keepdims=True)
    return jnp.where(jnp.arange(logits.shape[-1]) == best, 0.0, -jnp.inf)
  log_prob = jax.nn.log_softmax(logits / options.temperature, axis=-1)
  if 0 < options.top_k < logits.shape[-1]:
    smallest = jax.lax.top_k(log_prob, options.top_k)[0][..., -1:]
    log_prob = jax.nn.log_softmax(jnp.where(log_prob < smallest, -jnp.inf, log_prob), axis=-1)
  if options.top_p < 1:
    descending = jnp.sort(log_prob, axis=-1, descending=True)
    mass_before = jnp.cumsum(jnp.exp(descending), axis=-1) - jnp.exp(descending)
    smallest = jnp.min(jnp.where(mass_before < options.top_p, descending, jnp.inf), axis=-1, keepdims=True)
    log_prob = jax.nn.log_softmax(jnp.where(log_prob < smallest, -jnp.inf, log_prob), axis=-1)
  return log_prob


def row_keys(key: Array, number: Array) -> Array:
  """Random keys [B] of completions, from their numbers [B] int32 in the whole batch."""
  return jax.vmap(jax.random.fold_in, (None, 0))(key, number)


def sample_tokens(
  policy: Policy, options: SamplingOptions, weights: Params, hidden: Array, keys: Array, step: Array
) -> tuple[Array, Array, Array]:
  """Samples the next token of every row.

  Args:
    hidden: [B, D]. keys: [B], `row_keys` of the rows. step: [B] int32 or [], tokens sampled before.
  Returns:
    token [B] int32; its log-probability [B] under the distribution it was sampled from, and at temperature 1 without
    truncation; both float32, nats.
  """
  logits = policy.unembed(weights, hidden)
  log_prob = truncated_log_prob(logits, options)
  if options.greedy:
    token = jnp.argmax(log_prob, axis=-1).astype(jnp.int32)
  else:
    token = jax.vmap(_sample_token)(keys, jnp.broadcast_to(step, keys.shape), log_prob)
  chosen = jnp.arange(logits.shape[-1]) == token[:, None]
  raw = jnp.sum(jnp.where(chosen, jax.nn.log_softmax(logits, axis=-1), 0.0), axis=-1)
  return token, jnp.sum(jnp.where(chosen, log_prob, 0.0), axis=-1), raw


def _sample_token(key: Array, step: Array, log_prob: Array) -> Array:
  """`jax.random.categorical`: the argmax of log p + Gumbel noise has distribution p.

  Two plain reductions instead of its argmax, which on CPUs pulls the logarithms of the noise into a scalar loop: 3.6
  times as long. The tolerance covers compilers that compute the scores separately for each reduction; it is far below
  the resolution of the noise in float32. A row of NaNs gives V - 1.
  """
  scores = log_prob + jax.random.gumbel(jax.random.fold_in(key, step), log_prob.shape, log_prob.dtype)
  token = jnp.arange(scores.size, dtype=jnp.int32)
  return jnp.min(jnp.where(scores >= jnp.max(scores) - 1e-5, token, scores.size - 1))
