"""Builds a `Policy` from a transformer configuration: the pure functions that sampling, scoring and training call."""

import dataclasses
import functools
import re
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from models.config import LoraConfig, TransformerConfig
from models.layers.attention import Context, LayerCache, RMSNorm, init_layer_cache, slot_axes
from models.layers.experts import platform_of
from models.layers.rotary import rotary_angles
from models.layers.transformer import Block, LayerInputs, Transformer
from models.layers.weights import merge_lora
from rspo_jax.types import Array, Layout, Params, Policy, Probe, router_logits_probe


class KeyValueCache(NamedTuple):
  """Keys and values of a batch during decoding, a ring buffer of S slots.

  Attributes:
    layers: per layer keys [B, heads, width, S] and values [B, heads, S, width] (`models.layers.attention.LayerCache`).
    valid: [B, S] bool, slots that queries may attend to.
    position: [B] int32, number of valid tokens in each row so far, the rotary position of its next token.
    slot: [] int32, number of tokens written so far, the same for all rows; the next token is written to slot % S.
  """

  layers: tuple[LayerCache, ...]
  valid: Array
  position: Array
  slot: Array


# Router shift compares these log-probabilities: a distribution over the experts, or one probability per expert.
_ROUTER_LOG_PROB = {"softmax": functools.partial(jax.nn.log_softmax, axis=-1), "sigmoid": jax.nn.log_sigmoid}

# Parameters that are used in float32 for every dtype of activations.
_FLOAT32 = re.compile("router|sinks|down_bias")


def build_policy(config: TransformerConfig, layout: Layout | None = None) -> Policy:
  """The model as pure functions.

  Args:
    layout: the mesh that the functions run on; None for one device, and inside `jax.pmap`. The platform of its devices
      decides `scan_layers=None` and `expert_backend="auto"`, so a program can be compiled for devices that are absent.
  """
  config = dataclasses.replace(config, scan_layers=config.scans_layers(platform_of(layout)))
  transformer = functools.partial(Transformer, config, layout=layout)

  def init(rng: Array) -> Params:
    return nn.meta.unbox(_boxed_init(config, rng))

  def logical_axes():
    boxed = jax.eval_shape(functools.partial(_boxed_init, config), jax.random.key(0))
    return jax.tree.map(lambda box: tuple(box.names), boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned))

  def forward(params, tokens, valid, *, probe: Probe = router_logits_probe, probe_inputs=None, replay=None):
    return transformer(probe=probe).apply({"params": params}, tokens, valid, probe_inputs, replay)

  def unembed(params, hidden: Array) -> Array:
    kernel = params["embedding"].T if config.tie_word_embeddings else params["lm_head"]
    return jnp.matmul(hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)

  merged = dataclasses.replace(config, lora=LoraConfig())
  return Policy(
    init=init,
    logical_axes=logical_axes,
    forward=forward,
    unembed=unembed,
    for_decode=functools.partial(_for_decode, config),
    init_cache=functools.partial(_init_cache, config),
    prefill=functools.partial(_prefill, merged, layout),
    decode=functools.partial(_decode, merged, layout),
    grow=_grow,
    insert=_insert,
    router_log_prob=_ROUTER_LOG_PROB[config.scoring_func],
    num_moe_layers=config.num_moe_layers,
    num_experts=config.num_experts,
    experts_per_token=config.num_experts_per_tok,
    vocab_size=config.vocab_size,
    add_router_bias=functools.partial(_add_router_bias, config) if config.router_bias else None,
  )


def _add_router_bias(config: TransformerConfig, params: Params, step: Array) -> Params:
  """See `Policy.add_router_bias`. The rows of step [L, E] are split over the stacked runs of layers."""
  params, first = dict(params), 0
  for number, (is_moe, length) in enumerate(config.segments):
    if is_moe:
      layers = dict(params[f"layers_{number}"])
      layers["moe"] = layers["moe"] | {"router_bias": layers["moe"]["router_bias"] + step[first : first + length]}
      params[f"layers_{number}"], first = layers, first + length
  return params


def _boxed_init(config: TransformerConfig, rng: Array):
  """Parameters in flax boxes with their logical axis names. Without a mesh, because shapes do not depend on it."""
  tokens = jnp.zeros((1, 1), jnp.int32)
  config = dataclasses.replace(config, scan_layers=True)  # the parameters are the same, and it compiles faster
  return Transformer(config, probe=router_logits_probe).init(rng, tokens, tokens.astype(bool))["params"]


def param_shapes(config: TransformerConfig) -> dict[tuple[str, ...], jax.ShapeDtypeStruct]:
  """Shape and dtype of every parameter by its path, such as ("layers_0", "attention", "query")."""
  shapes = jax.eval_shape(lambda rng: nn.meta.unbox(_boxed_init(config, rng)), jax.random.key(0))
  return traverse_util.flatten_dict(shapes)


def _for_decode(config: TransformerConfig, params: Params, slots: int) -> dict[str, Any]:
  """One tree per layer, because slicing stacked layers inside the decode loop copies them at every step.

  Weights that layers use in the dtype of activations are cast to it once, here: in bfloat16 decoding reads half the
  bytes. "rotary" has the cosines and sines of all positions; inside the loop XLA would recompute them for every head.
  """
  config, params = merge_lora(config, params)
  layers = []
  for number, (_, length) in enumerate(config.segments):
    stacked = params[f"layers_{number}"]
    layers += [jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(length)]
  others = {name: value for name, value in params.items() if not name.startswith("layers_")}
  cast = jax.tree_util.tree_map_with_path(
    lambda path, leaf: leaf if _FLOAT32.search(jax.tree_util.keystr(path)) else leaf.astype(config.dtype),
    {"layers": layers, **others},
  )
  return {**cast, "rotary": rotary_angles(config, jnp.arange(slots))}


def _init_cache(config: TransformerConfig, batch: int, slots: int) -> KeyValueCache:
  return KeyValueCache(
    layers=(init_layer_cache(config, batch, slots),) * config.num_hidden_layers,
    valid=jnp.zeros((batch, slots), bool),
    position=jnp.zeros((batch,), jnp.int32),
    slot=jnp.zeros((), jnp.int32),
  )


def _prefill(config, layout, params, tokens, valid, cache: KeyValueCache, *, probe: Probe = router_logits_probe):
  """See `Policy.prefill`: runs tokens [B, T] through the layers, reading from and writing to the cache."""
  length = tokens.shape[1]
  offsets = jnp.cumsum(valid, axis=1)
  cos, sin = (
    table.at[jnp.maximum(cache.position[:, None] + offsets - 1, 0)].get(mode="clip") for table in params["rotary"]
  )
  size = cache.valid.shape[1]
  first = cache.slot % size
  cached = jax.lax.dynamic_update_slice_in_dim(cache.valid, valid, first, axis=1)
  slots, queries = jnp.arange(size), first + jnp.arange(length)
  # A single token attends to all cached slots: in a ring, slots after its own are older too.
  causal = cached[:, None, :] & ((length == 1) | (slots <= queries[:, None]))
  mask = causal | (slots == queries[:, None])
  distance = (queries[:, None] - slots) % size if config.sliding_layers else None
  context = Context(cos, sin, mask, valid, distance, first)

  x = params["embedding"].astype(config.dtype)[tokens]
  layers, probes = [], []
  for number, weights in enumerate(params["layers"]):
    block = Block(config, config.is_moe_layer(number), probe, layout)
    inputs = LayerInputs(cache.layers[number], window=config.window(number))
    x, (layer_cache, probed) = block.apply({"params": weights}, x, context, inputs)
    layers.append(layer_cache)
    if config.is_moe_layer(number):
      probes.append(probed)
  hidden = RMSNorm(config.rms_norm_eps).apply({"params": params["final_norm"]}, x)
  cache = KeyValueCache(tuple(layers), cached, cache.position + offsets[:, -1], cache.slot + length)
  return hidden, jax.tree.map(lambda *layers: jnp.stack(layers), *probes), cache


def _decode(config, layout, params, tokens, valid, cache: KeyValueCache, *, probe: Probe = router_logits_probe):
  """See `Policy.decode`: a prefill of one token [B] per row."""
  hidden, probed, cache = _prefill(config, layout, params, tokens[:, None], valid[:, None], cache, probe=probe)
  return hidden[:, 0], jax.tree.map(lambda leaf: leaf[:, :, 0], probed), cache


def _grow(cache: KeyValueCache, slots: int) -> KeyValueCache:
  """See `Policy.grow`."""
  more = slots - cache.valid.shape[1]

  def pad(array: Array, axis: int) -> Array:
    return jnp.pad(array, [(0, more if axis == i else 0) for i in range(array.ndim)])

  layers = tuple(tuple(map(pad, layer, slot_axes(layer))) for layer in cache.layers)
  return cache._replace(layers=layers, valid=pad(cache.valid, 1))


def _insert(cache: KeyValueCache, rows: Array, prompts: KeyValueCache, sources: Array) -> KeyValueCache:
  """See `Policy.insert`."""
  size, length = cache.valid.shape[1], prompts.valid.shape[1]
  slots = (cache.slot - length + jnp.arange(length)) % size

  def put(old: Array, new: Array, axis: int) -> Array:
    # Indexing with two arrays and slices between them puts the arrays' axes (rows, slots) first.
    index = (rows[:, None], *[slice(None)] * (axis - 1), slots)
    return old.at[index].set(jnp.moveaxis(new[sources], axis, 1), mode="drop")

  def put_layer(old: LayerCache, new: LayerCache) -> LayerCache:
    return tuple(map(put, old, new, slot_axes(old)))

  cleared = cache.valid.at[rows].set(False, mode="drop")
  return KeyValueCache(
    layers=tuple(map(put_layer, cache.layers, prompts.layers)),
    valid=cleared.at[rows[:, None], slots].set(prompts.valid[sources], mode="drop"),
    position=cache.position.at[rows].set(prompts.position[sources], mode="drop"),
    slot=cache.slot,
  )
