"""The records that pass between the subjects of the library, and the protocol that a policy fills in.

Letters used in every shape of this project: P prompts, G samples of each, B = P * G rows (prompt-major), T tokens
(left-padded prompt, then completion), L mixture-of-experts layers, E experts, K active experts, D width,
V vocabulary, S cache slots.

Alignment: slot t describes `tokens[:, t]`. Its log-probability and its routing both come from position t - 1, the
position whose logits scored that token (`rspo_jax.router.trace.to_slots` and `to_positions` convert between the two).
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, Protocol

import jax
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Array = jax.Array
Params = Any  # a pytree of arrays
Cache = Any  # a pytree: leaves of rank >= 1 lead with the batch axis, scalars are shared by all rows


class RouterOutput(NamedTuple):
  """What the router of one layer did. logits [B, T, E] float32; expert_index [B, T, K] int32 and gate [B, T, K]
  float32, the choice and the weights that the layer executes."""

  logits: Array
  expert_index: Array
  gate: Array


class Replay(NamedTuple):
  """Routing that a forward is to repeat instead of choosing; position-aligned.

  Attributes:
    expert_index: [L, B, T, K] integers: the experts of every position. Their weights come from the live router, with
      gradient,
    gate: unless they are given too, [L, B, T, K] float32.
  """

  expert_index: Array
  gate: Array | None = None


class Probe(Protocol):
  """Looks at one mixture-of-experts layer inside the layer scan; what it returns is stacked over layers."""

  def __call__(self, router: RouterOutput, probe_inputs: Any) -> Any:
    """probe_inputs is this layer's slice of what `Policy.forward` was given (None if it was given None)."""


def router_logits_probe(router: RouterOutput, probe_inputs: Any) -> Array:
  """The default probe: hands out the router logits, so a forward returns them as [L, B, T, E]."""
  del probe_inputs
  return router.logits


def _log_softmax(logits: Array) -> Array:
  return jax.nn.log_softmax(logits, axis=-1)


class Policy(NamedTuple):
  """A mixture-of-experts language model as pure functions. Anything that fills this in can be sampled and trained.

  The first seven fields are required. Without the functions of the cache, sampling runs `forward` over the whole row
  for every token (`rspo_jax.rollout.cacheless`), which is correct and slow; `policy_from_forward` there makes a policy
  of a forward function alone.

  Attributes:
    init: key -> params.
    forward: (params, tokens [B, T] int32, valid [B, T] bool, *, probe, probe_inputs, replay) -> (hidden [B, T, D],
      probed). `probe` defaults to `router_logits_probe`; every leaf of `probe_inputs` and of `probed` leads with L.
      `replay`, a `Replay`, pins the experts of every position (and their gates, if it holds them).
    unembed: (params, hidden [..., D]) -> logits [..., V] float32.
    num_moe_layers, num_experts, experts_per_token, vocab_size: L, E, K, V.
    logical_axes: () -> a pytree like params whose leaves are tuples with one logical axis name, or None, per array
      axis. The legal names are the keys of `rspo_jax.mesh.RULES`: "batch", "layers", "embed", "vocab", "heads",
      "kv_heads", "head_dim", "mlp", "experts", "expert_mlp", "norm". None instead of the function: every parameter is
      replicated.
    router_log_prob: router logits [..., E] -> log-probabilities [..., E] float32 of the router, as router shift
      compares them (softmax over all experts for softmax routers, log-sigmoid for sigmoid routers).
    for_decode: (params, slots) -> the same weights laid out for `decode` and `prefill`, for caches with that many
      slots; called once, outside the decode loop.
    init_cache: (batch, slots) -> an empty cache for that many rows and tokens.
    prefill: (decode params, tokens [B, T], valid [B, T], cache, *, probe) -> (hidden [B, T, D], probed, cache).
    decode: (decode params, tokens [B], valid [B], cache, *, probe) -> (hidden [B, D], probed, cache). A row whose
      `valid` is False is computed, but neither routed to experts nor remembered. The cache is a ring: after its last
      slot the first one is overwritten, so a row may be at most one turn old.
    grow: (cache, slots) -> the same cache with room for that many tokens, at least as many as before. No slot may have
      been written twice.
    insert: (cache, rows [n] int32, prompts, sources [n] int32) -> the cache, in which rows `rows` hold what rows
      `sources` of the cache `prompts` (filled to its last slot) hold, as if those tokens had come just before the next
      one. A row index beyond the batch is skipped.
    add_router_bias: (params, [L, E] float32) -> params with that added to the bias on each expert's choice; None for a
      model without such a bias.
  """

  init: Callable[[Array], Params]
  forward: Callable[..., tuple[Array, Any]]
  unembed: Callable[[Params, Array], Array]
  num_moe_layers: int
  num_experts: int
  experts_per_token: int
  vocab_size: int
  logical_axes: Callable[[], Any] | None = None
  router_log_prob: Callable[[Array], Array] = _log_softmax
  for_decode: Callable[[Params, int], Any] | None = None
  init_cache: Callable[[int, int], Cache] | None = None
  prefill: Callable[..., tuple[Array, Any, Cache]] | None = None
  decode: Callable[..., tuple[Array, Any, Cache]] | None = None
  grow: Callable[[Cache, int], Cache] | None = None
  insert: Callable[..., Cache] | None = None
  add_router_bias: Callable[[Params, Array], Params] | None = None


class Program(NamedTuple):
  """A function that a run compiles. What is printed before compilation, a planner and the run itself use one list.

  Attributes:
    name: for people, unique within a run.
    function: jitted; its shardings and donations are bound.
    arguments: abstract (`jax.ShapeDtypeStruct` with shardings where a mesh is used; static Python values as they are).
    keywords: keyword arguments, likewise.
  """

  name: str
  function: Callable[..., Any]
  arguments: tuple[Any, ...]
  keywords: Mapping[str, Any] = {}

  def lower(self) -> Any:
    """The program as `jax.stages.Lowered`: `.compile()` gives memory, operations and collectives."""
    return self.function.lower(*self.arguments, **self.keywords)


class Layout(NamedTuple):
  """A device mesh and the one table that says which mesh axes a logical axis is split over."""

  mesh: Mesh
  rules: Mapping[str, str | tuple[str, ...] | None]

  def spec(self, *logical: str | None) -> PartitionSpec:
    """The partition of an array whose axes have these logical names. KeyError for a name the table does not hold."""
    return PartitionSpec(*(None if name is None else self.rules[name] for name in logical))

  def sharding(self, *logical: str | None) -> NamedSharding:
    return NamedSharding(self.mesh, self.spec(*logical))

  @property
  def batch_shards(self) -> int:
    """Into how many pieces the batch axis is cut."""
    axes = self.rules["batch"] or ()
    shards = 1
    for axis in (axes,) if isinstance(axes, str) else axes:
      shards *= self.mesh.shape[axis]
    return shards


class Weighted(NamedTuple):
  """A mean carried as (sum, weight) until the last division, so that parts of a batch add up exactly."""

  total: Array
  weight: Array

  def __add__(self, other: "Weighted") -> "Weighted":  # type: ignore[override]
    return Weighted(self.total + other.total, self.weight + other.weight)

  @property
  def mean(self) -> Array:
    """total / weight; 0 where nothing was weighed."""
    return self.total / jax.numpy.where(self.weight > 0, self.weight, 1)


@struct.dataclass
class RoutingTrace:
  """What the router did for every slot, kept from scoring to the update. Batch-major, so a minibatch is one tree.map.

  Attributes:
    expert_index: [B, T, L, K] uint8 (E <= 256) or uint16.
    log_prob: [B, T, L, K] float16, the router's log-probability of those experts, nats. The deviation is taken
      against new values rounded the same way, so an unmoved router deviates by exactly 0.
    all_log_prob: [B, T, L, E] float16, of all experts; only where router shift's deviation asks for it.
    gate: [B, T, L, K] float32, the weights of the chosen experts; only where they are to be replayed.
  """

  expert_index: Array
  log_prob: Array
  all_log_prob: Array | None = None
  gate: Array | None = None


@struct.dataclass
class Rollout:
  """Completions drawn by the sampler. T = prompt slots + new slots.

  Attributes:
    tokens: [B, T] int32. valid: [B, T] bool, prompt and completion tokens. action_mask: [B, T] bool, the tokens the
      policy chose (the stop token included).
    sampler_log_prob: [B, T] float32, nats, of the distribution each token was drawn from (tempered, truncated).
    log_prob: [B, T] float32, nats, of the same tokens at temperature 1 without truncation.
    finished: [B] bool, ended by a stop token; False means cut off at the length limit.
    expert_index: [B, T, L, K] uint8 or uint16, slot-aligned, the experts every token was sampled with; None unless
      `SamplingOptions.record_experts`.
    version: [B, T] int32, of the policy that drew each token; None where one policy drew all of them.
  """

  tokens: Array
  valid: Array
  action_mask: Array
  sampler_log_prob: Array
  log_prob: Array
  finished: Array
  expert_index: Array | None = None
  version: Array | None = None


@struct.dataclass
class TrainBatch:
  """One minibatch of the update; everything [B, T] is slot-aligned.

  Attributes:
    tokens, valid, action_mask: as in `Rollout`.
    old_log_prob: [B, T] float32, nats, under the policy that sampled.
    advantage: [B] float32, or [B, T] for objectives of tokens.
    old_routing: the trace of the forward that gave old_log_prob, or None when the router is not watched.
    sampler_log_prob: [B, T] float32, nats, at temperature 1 under the sampler's own forward; None when it is taken to
      agree with the trainer's.
    reference_log_prob: [B, T] float32, nats, under the reference policy; None without a KL term in the loss.
  """

  tokens: Array
  valid: Array
  action_mask: Array
  old_log_prob: Array
  advantage: Array
  old_routing: RoutingTrace | None = None
  sampler_log_prob: Array | None = None
  reference_log_prob: Array | None = None


@struct.dataclass
class TrainState:
  """What an update changes. step: [] int32, updates taken. Random keys are folded from (seed, step), never stored."""

  params: Params
  opt_state: Any
  step: Array


Placement = Literal["before_clip", "after_clip", "weight"]


PLACEMENTS = ("before_clip", "after_clip", "weight")
