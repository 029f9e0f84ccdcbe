import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.policy import build_policy
from rspo_jax import mesh
from rspo_jax.rollout import token_sampling
from rspo_jax.rollout.sampling import sample
from rspo_jax.rollout.token_sampling import SamplingOptions, truncated_log_prob
from rspo_jax.training.scoring import score
from tests.support import tiny

SETTINGS = [
  {},
  {"temperature": 0.7},
  {"top_k": 5},
  {"top_p": 0.6},
  {"temperature": 1.5, "top_k": 9, "top_p": 0.8},
  {"temperature": 0.0},
]


def draw(policy, params, options, rows=8, seed=0, first_row=0, prompts=None):
  tokens, valid = prompts or tiny.prompts(rows)
  run = jax.jit(functools.partial(sample, policy, options=options))
  return run(params, tokens, valid, jax.random.key(seed), first_row=first_row)


def forward_logits(policy, params, tokens, valid):
  hidden, _ = policy.forward(params, tokens, valid)
  return policy.unembed(params, hidden)


def reference_truncation(logits, temperature=1.0, top_k=0, top_p=1.0):
  """One row, in float64, by sorting: the definition."""
  if temperature == 0:
    return np.where(np.arange(len(logits)) == np.argmax(logits), 0.0, -np.inf)
  p = np.exp(np.asarray(logits, np.float64) / temperature)
  order = np.argsort(-p)
  if top_k:
    p[order[top_k:]] = 0
  p /= p.sum()
  reached = np.cumsum(p[order])
  keep = order[: np.searchsorted(reached, top_p) + 1] if top_p < 1 else order
  q = np.zeros_like(p)
  q[keep] = p[keep]
  with np.errstate(divide="ignore"):
    return np.log(q / q.sum())


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_truncated_distribution_is_the_one_defined(settings):
  logits = np.random.default_rng(0).normal(size=(20, 24)).astype(np.float32) * 2
  options = SamplingOptions(1, **settings)
  got = jax.jit(functools.partial(truncated_log_prob, options=options))(logits)
  want = np.stack([reference_truncation(row, **settings) for row in logits])
  np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_recorded_log_probs_are_those_of_the_training_forward(settings):
  policy, params = tiny.policy_and_params()
  options = SamplingOptions(7, 2, stop_ids=(0, 1), **settings)
  drawn = draw(policy, params, options, rows=6)
  logits = forward_logits(policy, params, drawn.tokens, drawn.valid)[:, :-1]
  chosen = drawn.tokens[:, 1:, None]
  raw = jnp.take_along_axis(jax.nn.log_softmax(logits), chosen, -1)[..., 0]
  from_truncated = jnp.take_along_axis(truncated_log_prob(logits, options), chosen, -1)[..., 0]
  mask = np.asarray(drawn.action_mask[:, 1:])
  assert mask.sum() > 20
  np.testing.assert_allclose(drawn.log_prob[:, 1:][mask], raw[mask], atol=1e-5)
  np.testing.assert_allclose(drawn.sampler_log_prob[:, 1:][mask], from_truncated[mask], atol=1e-5)
  scored = score(policy, params, drawn.tokens, drawn.valid)
  np.testing.assert_allclose(scored.log_prob[:, 1:][mask], raw[mask], atol=1e-5)
  np.testing.assert_array_equal(np.asarray(drawn.log_prob)[~np.asarray(drawn.action_mask)], 0)


def test_greedy_equals_brute_force_without_a_cache():
  policy, params = tiny.policy_and_params()
  tokens, valid = tiny.prompts(6)
  drawn = draw(policy, params, SamplingOptions(6, temperature=0.0), prompts=(tokens, valid))
  forward = jax.jit(functools.partial(forward_logits, policy))
  for _ in range(6):
    following = jnp.argmax(forward(params, tokens, valid)[:, -1], axis=-1).astype(jnp.int32)
    tokens = jnp.concatenate([tokens, following[:, None]], axis=1)
    valid = jnp.concatenate([valid, jnp.ones_like(valid[:, :1])], axis=1)
  np.testing.assert_array_equal(drawn.tokens, tokens)
  np.testing.assert_array_equal(drawn.valid, valid)


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7, "top_k": 8, "top_p": 0.9}], ids=str)
def test_sampled_frequencies_are_the_models_distribution(settings):
  policy, params = tiny.policy_and_params()
  tokens, valid = tiny.prompts(1)
  count = 20_000
  options = SamplingOptions(1, count, **settings)
  drawn = np.asarray(draw(policy, params, options, prompts=(tokens, valid)).tokens[:, -1])
  logits = forward_logits(policy, params, tokens, valid)[0, -1]
  p = np.exp(truncated_log_prob(logits, options))
  observed = np.bincount(drawn, minlength=len(p))
  assert observed[p == 0].sum() == 0
  often = p * count > 5
  chi_square = (((observed - p * count) ** 2)[often] / (p * count)[often]).sum()
  degrees = often.sum() - 1
  assert chi_square < degrees + 5 * np.sqrt(2 * degrees), (chi_square, degrees)


def test_draws_do_not_depend_on_the_batch_they_are_made_in():
  policy, params = tiny.policy_and_params()
  options = SamplingOptions(6, 3, stop_ids=(0, 1, 2))
  tokens, valid = tiny.prompts(8)
  whole = draw(policy, params, options, prompts=(tokens, valid))
  part = draw(policy, params, options, prompts=(tokens[6:], valid[6:]), first_row=18)
  np.testing.assert_array_equal(part.tokens, whole.tokens[18:])
  assert not np.array_equal(part.tokens, draw(policy, params, options, prompts=(tokens[6:], valid[6:])).tokens)


LATENT = {"kv_lora_rank": 8, "head_dim": 4, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4}
SLIDING = {"sliding_window": 4, "sliding_layers": (0, 2)}


@pytest.mark.parametrize("changes", [{}, LATENT, SLIDING], ids=["grouped", "latent", "sliding"])
def test_a_cache_that_grows_draws_the_same(changes):
  policy, params = tiny.policy_and_params(dataclasses.replace(tiny.CONFIG, **changes))
  options = SamplingOptions(8, 2, stop_ids=(0, 1), record_experts=True)
  whole = draw(policy, params, options)
  grown = draw(policy, params, dataclasses.replace(options, cache_sizes=3))
  assert 0 < whole.finished.sum() < 16
  np.testing.assert_array_equal(grown.tokens, whole.tokens)
  np.testing.assert_array_equal(grown.finished, whole.finished)
  np.testing.assert_array_equal(grown.expert_index[whole.valid], whole.expert_index[whole.valid])
  np.testing.assert_allclose(grown.log_prob, whole.log_prob, atol=1e-5)


@pytest.mark.parametrize(("sizes", "slots"), [(1, {12}), (2, {9, 12}), (3, {8, 10, 12}), (40, set(range(6, 13)))])
def test_a_cache_has_as_many_sizes_as_asked_for(sizes, slots):
  policy, params = tiny.policy_and_params()
  seen = set()

  def decode(weights, token, valid, cache, *, probe):
    seen.add(cache.valid.shape[1])
    return policy.decode(weights, token, valid, cache, probe=probe)

  run = functools.partial(sample, policy._replace(decode=decode), options=SamplingOptions(7, cache_sizes=sizes))
  jax.eval_shape(run, params, *tiny.prompts(8), jax.random.key(0))
  assert seen == slots


def test_one_draw_is_the_categorical_of_jax():
  logits = np.random.default_rng(0).normal(size=(2_000, 40)).astype(np.float32) * 3
  log_prob = np.where(np.random.default_rng(1).random(logits.shape) < 0.3, -np.inf, jax.nn.log_softmax(logits))
  keys, steps = jax.random.split(jax.random.key(2), len(logits)), jnp.arange(len(logits))
  drawn = jax.jit(jax.vmap(token_sampling._sample_token))(keys, steps, log_prob)
  wanted = jax.vmap(lambda key, step, p: jax.random.categorical(jax.random.fold_in(key, step), p))(
    keys, steps, log_prob
  )
  np.testing.assert_array_equal(drawn, wanted)
  assert len(np.unique(drawn)) == 40


def test_a_row_of_nans_draws_a_token_that_exists():
  assert token_sampling._sample_token(jax.random.key(0), 0, jnp.full(7, jnp.nan)) == 6


@pytest.mark.parametrize("shape", [{"data": 8}, {"fsdp": 2, "expert": 2, "tensor": 2}], ids=str)
def test_draws_do_not_depend_on_the_sharding(shape):
  policy, params = tiny.policy_and_params()
  options = SamplingOptions(6, 2, stop_ids=(0, 1))
  alone = draw(policy, params, options)
  layout = mesh.make_layout(shape)
  sharded = build_policy(tiny.CONFIG, layout)
  placed = jax.device_put(params, mesh.param_shardings(sharded, layout))
  spread = draw(sharded, placed, options, prompts=mesh.put_batch(tiny.prompts(8), layout))
  np.testing.assert_array_equal(spread.tokens, alone.tokens)
  np.testing.assert_allclose(spread.log_prob, alone.log_prob, atol=1e-5)


def test_samples_of_a_prompt_follow_one_another_and_differ():
  policy, params = tiny.policy_and_params()
  drawn = draw(policy, params, SamplingOptions(8, 4), rows=3)
  tokens, valid = tiny.prompts(3)
  np.testing.assert_array_equal(drawn.tokens[:, :5], jnp.repeat(tokens, 4, axis=0))
  np.testing.assert_array_equal(drawn.valid[:, :5], jnp.repeat(valid, 4, axis=0))
  assert len({tuple(row) for row in np.asarray(drawn.tokens[:4, 5:]).tolist()}) > 1


def test_completions_end_with_their_stop_token_and_masks_follow_the_lengths():
  policy, params = tiny.policy_and_params()
  drawn = draw(policy, params, SamplingOptions(10, 4, stop_ids=(0, 1, 2, 3)), rows=8)
  completions, mask = np.asarray(drawn.tokens[:, 5:]), np.asarray(drawn.action_mask[:, 5:])
  lengths = mask.sum(axis=1)
  np.testing.assert_array_equal(mask, np.arange(10) < lengths[:, None])
  np.testing.assert_array_equal(drawn.action_mask[:, :5], False)
  np.testing.assert_array_equal(drawn.valid[:, 5:], mask)
  stops = np.isin(completions, (0, 1, 2, 3)) & mask
  for row, finished in enumerate(np.asarray(drawn.finished)):
    assert finished == stops[row].any()
    assert finished or lengths[row] == 10
    assert not finished or stops[row].nonzero()[0].tolist() == [lengths[row] - 1]
  assert drawn.finished.any() and not drawn.finished.all()


def test_wider_left_padding_changes_no_draw():
  policy, params = tiny.policy_and_params()
  tokens, valid = tiny.prompts(6)
  options = SamplingOptions(6, 2)
  wider = (jnp.pad(tokens, [(0, 0), (4, 0)]), jnp.pad(valid, [(0, 0), (4, 0)]))
  narrow = draw(policy, params, options, prompts=(tokens, valid))
  wide = draw(policy, params, options, prompts=wider)
  np.testing.assert_array_equal(wide.tokens[:, 4:], narrow.tokens)
  np.testing.assert_allclose(wide.log_prob[:, 4:], narrow.log_prob, atol=1e-5)


def test_recorded_experts_are_those_the_training_forward_would_choose_for_the_same_slots():
  policy, params = tiny.policy_and_params()
  drawn = draw(policy, params, SamplingOptions(7, 3, stop_ids=(0, 1), record_experts=True), rows=4)
  scored = jax.jit(functools.partial(score, policy))(params, drawn.tokens, drawn.valid)
  assert drawn.expert_index.shape == (*drawn.tokens.shape, policy.num_moe_layers, policy.experts_per_token)
  assert drawn.expert_index.dtype == scored.trace.expert_index.dtype
  # A slot's routing is that of the token before it, which must be a real one.
  routed = np.pad(np.asarray(drawn.valid), [(0, 0), (1, 0)])[:, :-1] & np.asarray(drawn.valid)
  assert routed.sum() > 40
  same = np.sort(drawn.expert_index, axis=-1) == np.sort(scored.trace.expert_index, axis=-1)
  assert same[routed].all()


def test_scoring_with_the_samplers_experts_repeats_them_whatever_the_router_says_now():
  policy, params = tiny.policy_and_params()
  drawn = draw(policy, params, SamplingOptions(7, 3, stop_ids=(0, 1), record_experts=True), rows=4)
  _, others = tiny.policy_and_params(seed=1)
  router = {"router": others["layers_0"]["moe"]["router"]}
  moved = params | {"layers_0": params["layers_0"] | {"moe": params["layers_0"]["moe"] | router}}
  run = jax.jit(lambda params, experts: score(policy, params, drawn.tokens, drawn.valid, expert_index=experts))
  mask = np.asarray(drawn.action_mask)
  replayed = run(moved, drawn.expert_index)
  np.testing.assert_array_equal(replayed.trace.expert_index[mask], drawn.expert_index[mask])
  free = jax.jit(functools.partial(score, policy))(moved, drawn.tokens, drawn.valid)
  assert (free.trace.expert_index[mask] != drawn.expert_index[mask]).any()
  np.testing.assert_allclose(run(params, drawn.expert_index).log_prob[mask], drawn.log_prob[mask], atol=1e-5)
  pieces = jax.jit(functools.partial(score, policy, microbatches=3))(
    moved, drawn.tokens, drawn.valid, expert_index=drawn.expert_index
  )
  np.testing.assert_allclose(pieces.log_prob[mask], replayed.log_prob[mask], atol=1e-6)


@pytest.mark.parametrize(
  "wrong", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}, {"samples_per_prompt": 0}], ids=str
)
def test_impossible_options_are_refused(wrong):
  with pytest.raises(ValueError, match="want|start at"):
    SamplingOptions(**{"max_new_tokens": 4} | wrong)
