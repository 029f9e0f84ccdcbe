"""The objectives against hand-worked cases, the papers' printed formulas, and the properties a loss must have."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rspo_jax.objectives import (
  AGGREGATIONS,
  OBJECTIVES,
  PLACEMENTS,
  aggregate,
  aggregation_weight,
  gmpo,
  grpo,
  gspo,
  policy_loss,
)

eager_and_jitted = pytest.mark.parametrize("way", [lambda f: f, jax.jit], ids=["eager", "jit"])
each_objective = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
each_placement = pytest.mark.parametrize("placement", PLACEMENTS)
each_mode = pytest.mark.parametrize("mode", AGGREGATIONS)
# Placement and aggregation never meet in the code: two pairs cover both of each.
each_setting = pytest.mark.parametrize(("placement", "mode"), list(zip(PLACEMENTS, AGGREGATIONS, strict=True)))
WIDE = {grpo: {}, gspo: dict(eps_low=0.1, eps_high=0.1), gmpo: {}}  # random rows fall on both sides of the clip


def case(seed=0, rows=6, columns=7, scale=0.5):
  """A random batch with an empty row and a zero advantage: (log_ratio, advantage, mask, log_shift)."""
  rng = np.random.default_rng(seed)
  mask = rng.random((rows, columns)) < 0.7
  mask[0, :2] = mask[1, 1:] = True
  mask[-1] = False
  advantage = rng.normal(size=rows)
  advantage[2] = 0.0
  log_shift = np.log(rng.uniform(0.8, 1.0, (rows, columns)))
  log_ratio = rng.normal(size=(rows, columns)) * scale
  return tuple(x.astype(x.dtype if x.dtype == bool else np.float32) for x in (log_ratio, advantage, mask, log_shift))


def loss(log_ratio, advantage, mask, log_shift=None, *, objective, mode="sequence_mean_token_mean", **options):
  return -aggregate(objective(log_ratio, advantage, mask, log_shift=log_shift, **options), mask, mode).mean


def row(objective, log_ratio, advantage, *, log_shift=None, **options):
  """One row without padding, compiled and not: (objective, clipped_low, clipped_high) as numpy rows."""
  log_ratio = jnp.asarray([log_ratio], jnp.float32)
  shift = None if log_shift is None else jnp.full(log_ratio.shape, log_shift)
  call = functools.partial(objective, log_shift=shift, **options)
  arguments = log_ratio, jnp.asarray([advantage], jnp.float32), jnp.ones(log_ratio.shape, bool)
  terms = call(*arguments)
  for one, other in zip(terms, jax.jit(call)(*arguments), strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-6)
  return tuple(np.asarray(x)[0] for x in terms)


@pytest.mark.parametrize(
  ("ratio", "advantage", "want", "low", "high"),
  [
    (1.5, 2.0, 2.4, False, True),
    (0.5, 2.0, 1.0, False, False),
    (1.5, -1.0, -1.5, False, False),
    (0.5, -1.0, -0.8, True, False),
    (1.0, -3.0, -3.0, False, False),
  ],
)
def test_grpo_matches_ppo_by_hand(ratio, advantage, want, low, high):
  objective, clipped_low, clipped_high = row(grpo, [math.log(ratio)], advantage)
  np.testing.assert_allclose(objective, want, rtol=1e-6)
  assert (clipped_low[0], clipped_high[0]) == (low, high)


@pytest.mark.parametrize(
  ("placement", "ratio", "advantage", "want", "clipped"),
  [
    ("before_clip", 1.4, 2.0, 1.4 * 0.8 * 2.0, False),  # trust brings it back under the bound
    ("before_clip", 1.6, 2.0, 1.2 * 2.0, True),
    ("before_clip", 0.9, -1.0, -0.8, True),  # trust pushes it under the bound
    ("after_clip", 1.4, 2.0, 1.2 * 0.8 * 2.0, True),
    ("after_clip", 0.9, -1.0, -0.9 * 0.8, False),
  ],
)
def test_grpo_with_router_shift_by_hand(placement, ratio, advantage, want, clipped):
  objective, low, high = row(grpo, [math.log(ratio)], advantage, log_shift=math.log(0.8), placement=placement)
  np.testing.assert_allclose(objective, want, rtol=1e-6)
  assert (low | high)[0] == clipped


@pytest.mark.parametrize(
  ("log_ratio", "advantage", "want", "low", "high"),
  [
    ([0.1, -0.0998], 1.0, math.exp(1e-4), False, False),
    ([0.001, 0.003], 2.0, 2.0 * 1.0004, False, True),
    ([0.001, 0.003], -2.0, -2.0 * math.exp(0.002), False, False),
    ([-0.001, -0.003], -2.0, -2.0 * 0.9997, True, False),
    ([-0.001, -0.003], 2.0, 2.0 * math.exp(-0.002), False, False),
  ],
)
def test_gspo_clips_the_sequence_ratio_by_hand(log_ratio, advantage, want, low, high):
  objective, clipped_low, clipped_high = row(gspo, log_ratio, advantage)
  np.testing.assert_allclose(objective, [want, want], rtol=2e-7)
  assert clipped_low.tolist() == [low] * 2
  assert clipped_high.tolist() == [high] * 2


def test_router_shift_before_gspos_narrow_clip_silences_negative_sequences():
  trust = {"log_shift": math.log(0.9)}
  for placement, negative, silenced in (("before_clip", -0.9997, True), ("after_clip", -0.9, False)):
    objective, low, _ = row(gspo, [0.0, 0.0], -1.0, placement=placement, **trust)
    np.testing.assert_allclose(objective, negative, rtol=1e-6)
    assert low.all() == silenced
    np.testing.assert_allclose(row(gspo, [0.0, 0.0], 1.0, placement=placement, **trust)[0], 0.9, rtol=1e-6)


@pytest.mark.parametrize(
  ("log_ratio", "advantage", "exponent", "low", "high"),
  [
    ([1.0, 0.2], 2.0, (0.4 + 0.2) / 2, [0, 0], [1, 0]),
    ([1.0, 0.2], -2.0, (1.0 + 0.2) / 2, [0, 0], [0, 0]),
    ([-1.0, -0.2], 2.0, (-1.0 - 0.2) / 2, [0, 0], [0, 0]),
    ([-1.0, -0.2], -2.0, (-0.4 - 0.2) / 2, [1, 0], [0, 0]),
  ],
)
def test_gmpo_clips_tokens_inside_the_geometric_mean_by_hand(log_ratio, advantage, exponent, low, high):
  objective, clipped_low, clipped_high = row(gmpo, log_ratio, advantage)
  np.testing.assert_allclose(objective, [advantage * math.exp(exponent)] * 2, rtol=1e-6)
  assert clipped_low.tolist() == low
  assert clipped_high.tolist() == high


@pytest.mark.parametrize(
  ("placement", "log_ratio", "advantage", "exponent"),
  [
    ("before_clip", [0.45, 0.2], 2.0, (0.35 + 0.1) / 2),
    ("before_clip", [-0.45, -0.2], -2.0, (-0.4 - 0.3) / 2),
    ("after_clip", [0.45, 0.2], 2.0, (0.4 + 0.2) / 2 - 0.1),
    ("after_clip", [-0.45, -0.2], -2.0, (-0.4 - 0.2) / 2 + 0.1),
  ],
)
def test_rspo_is_gmpo_with_router_shift_by_hand(placement, log_ratio, advantage, exponent):
  objective, _, _ = row(gmpo, log_ratio, advantage, log_shift=-0.1, placement=placement)
  np.testing.assert_allclose(objective, [advantage * math.exp(exponent)] * 2, rtol=1e-6)


def test_v1_placement_in_gmpo_amplifies_negative_sequences():
  base = row(gmpo, [0.0, 0.1], -1.0)[0]
  assert (row(gmpo, [0.0, 0.1], -1.0, log_shift=-0.1, placement="after_clip")[0] < base).all()
  assert (row(gmpo, [0.0, 0.1], -1.0, log_shift=-0.1, placement="before_clip")[0] > base).all()


def test_unequal_bounds_bind_on_the_side_of_the_advantages_sign():
  bounds = dict(eps_low=0.1, eps_high=0.3)
  for objective, low, high in ((grpo, 0.9, 1.3), (gspo, 0.9, 1.3), (gmpo, math.exp(-0.1), math.exp(0.3))):
    np.testing.assert_allclose(row(objective, [-2.0], -1.0, **bounds)[0], -low, rtol=1e-6)
    np.testing.assert_allclose(row(objective, [2.0], 1.0, **bounds)[0], high, rtol=1e-6)


def test_an_open_bound_never_clips():
  for objective, eps_low in ((grpo, 1.0), (gspo, 1.0), (gmpo, math.inf)):
    _, low, high = row(objective, [-20.0], -1.0, eps_low=eps_low, eps_high=math.inf)
    assert not low.any()
    value, _, high = row(objective, [9.0], 1.0, eps_low=eps_low, eps_high=math.inf)
    assert not high.any()
    np.testing.assert_allclose(value, math.exp(9.0), rtol=1e-5)


def printed(name, q, advantage, shift, placement, eps_low, eps_high):
  """One row as the papers print it (min of two terms, sign(A) in front), float64 numpy."""
  after = shift if placement == "after_clip" else np.zeros_like(q)
  if placement == "before_clip":
    q = q + shift
  sign = np.sign(advantage)
  if name == "gmpo":
    signed = np.minimum(sign * q, np.clip(sign * q, -eps_low, eps_high))
    return np.full(q.shape, advantage * np.exp(sign * np.mean(signed + after)))
  if name == "gspo":
    q, after = np.full(q.shape, q.mean()), np.full(q.shape, after.mean())
  ratio = np.exp(q)
  return np.minimum(ratio * advantage, np.clip(ratio, 1 - eps_low, 1 + eps_high) * advantage) * np.exp(after)


COLUMNS = 5
rows_of_tokens = st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=COLUMNS)


def padded(tokens):
  """Tokens as [1, COLUMNS] and its mask, so that every length runs the same program."""
  tokens = np.asarray(tokens)
  fill = COLUMNS - tokens.size
  return np.pad(tokens, (0, fill))[None], np.pad(np.ones(tokens.size, bool), (0, fill))[None]


@functools.cache
def compiled(name, placement, eps_low, eps_high):
  options = dict(placement=placement, eps_low=eps_low, eps_high=eps_high)
  return jax.jit(lambda q, a, mask, shift: OBJECTIVES[name](q, a, mask, log_shift=shift, **options))


@given(
  name=st.sampled_from(sorted(OBJECTIVES)),
  placement=st.sampled_from(PLACEMENTS),
  tokens=rows_of_tokens,
  advantage=st.floats(-3, 3),
  shift=st.floats(-0.3, 0),
  epsilon=st.sampled_from([0.02, 0.4]),
)
@settings(max_examples=100, deadline=None)
def test_objectives_equal_the_printed_formulas(name, placement, tokens, advantage, shift, epsilon):
  q, mask = padded(tokens)
  shifts = shift * np.linspace(0, 1, q.size).reshape(q.shape)
  with jax.enable_x64(True):
    run = compiled(name, placement, epsilon, epsilon)
    got = run(q, np.asarray([advantage]), mask, shifts).objective
  assert got.dtype == np.float64
  want = printed(name, q[mask], advantage, shifts[mask], placement, epsilon, epsilon)
  np.testing.assert_allclose(np.asarray(got)[mask], want, rtol=1e-9, atol=1e-12)


@eager_and_jitted
@each_objective
@each_placement
@each_mode
def test_gradients_match_finite_differences_in_float64(way, objective, placement, mode):
  with jax.enable_x64(True):
    log_ratio, advantage, mask, log_shift = (jnp.asarray(x, bool if x.dtype == bool else float) for x in case())
    options = dict(objective=objective, mode=mode, placement=placement, **WIDE[objective])
    f = way(lambda q: loss(q, advantage, mask, log_shift, **options))
    gradient = way(jax.grad(f))(log_ratio)
    assert gradient.dtype == jnp.float64
    step = 1e-6
    moves = step * np.eye(log_ratio.size).reshape(-1, *log_ratio.shape)
    numeric = jax.vmap(lambda move: (f(log_ratio + move) - f(log_ratio - move)) / (2 * step))(moves)
  assert np.abs(gradient).max() > 0.01
  np.testing.assert_allclose(gradient, numeric.reshape(gradient.shape), rtol=1e-6, atol=1e-9)


@each_objective
@given(tokens=rows_of_tokens, advantage=st.sampled_from([-1.5, -0.1, 0.0, 0.7]))
@settings(max_examples=50, deadline=None)
def test_clip_flags_stand_exactly_where_the_clip_removes_the_gradient(objective, tokens, advantage):
  q, mask = padded(np.asarray(tokens, np.float32))
  terms, gradient = terms_and_gradient(objective, q, np.asarray([advantage], np.float32), mask)
  live = mask & (advantage != 0)
  np.testing.assert_array_equal(terms.clipped_low | terms.clipped_high, live & (gradient == 0))


@functools.partial(jax.jit, static_argnums=0)
def terms_and_gradient(objective, log_ratio, advantage, mask):
  call = functools.partial(objective, advantage=advantage, mask=mask, **WIDE[objective])
  return call(log_ratio), jax.grad(lambda q: call(q).objective.sum())(log_ratio)


@eager_and_jitted
@each_objective
@each_setting
def test_padding_and_empty_rows_get_exactly_zero_gradient_whatever_stands_there(way, objective, placement, mode):
  log_ratio, advantage, mask, log_shift = case()
  f = functools.partial(loss, objective=objective, mode=mode, placement=placement)
  run = way(jax.value_and_grad(f))
  clean = run(np.where(mask, log_ratio, 0), advantage, mask, np.where(mask, log_shift, 0))
  for junk in (np.nan, np.inf, -np.inf):
    value, gradient = run(np.where(mask, log_ratio, junk), advantage, mask, np.where(mask, log_shift, junk))
    assert value == clean[0]
    np.testing.assert_array_equal(gradient, clean[1])
    assert not gradient[~mask].any()
  terms = objective(log_ratio, advantage, jnp.asarray(mask), log_shift=log_shift, placement=placement)
  assert not any(np.asarray(x)[~mask].any() for x in terms)


@eager_and_jitted
@each_objective
@each_mode
def test_an_all_empty_batch_has_zero_loss_and_gradient(way, objective, mode):
  log_ratio, advantage, mask, log_shift = case()
  f = functools.partial(loss, objective=objective, mode=mode)
  value, gradient = way(jax.value_and_grad(f))(log_ratio * np.nan, advantage, np.zeros_like(mask), log_shift)
  assert value == 0
  assert not gradient.any()


@eager_and_jitted
@each_objective
@each_setting
def test_masked_equals_subset(way, objective, placement, mode):
  """More padding columns on both sides, and more empty rows, change neither loss nor gradient."""
  log_ratio, advantage, mask, log_shift = case()
  run = way(jax.value_and_grad(functools.partial(loss, objective=objective, mode=mode, placement=placement)))
  value, gradient = run(log_ratio, advantage, mask, log_shift)
  pad = lambda x, fill: np.pad(x, ((2, 1), (3, 4)), constant_values=fill)
  wide = run(pad(log_ratio, 7.0), np.pad(advantage, (2, 1), constant_values=5.0), pad(mask, False), pad(log_shift, -9))
  np.testing.assert_allclose(wide[0], value, rtol=1e-6)
  np.testing.assert_allclose(wide[1], np.pad(gradient, ((2, 1), (3, 4))), rtol=1e-5, atol=1e-8)


@eager_and_jitted
@each_objective
@each_placement
def test_zero_advantage_contributes_nothing_even_where_the_ratio_overflows(way, objective, placement):
  log_ratio, advantage, mask, log_shift = case()
  assert mask[2].any()
  assert advantage[2] == 0
  run = way(jax.value_and_grad(functools.partial(loss, objective=objective, placement=placement)))
  value, gradient = run(log_ratio, advantage, mask, log_shift)
  log_ratio[2] = 300.0
  moved = run(log_ratio, advantage, mask, log_shift)
  assert moved[0] == value
  assert not moved[1][2].any()
  np.testing.assert_array_equal(moved[1], gradient)


@eager_and_jitted
@each_objective
@each_setting
def test_full_trust_reduces_to_the_base_objective_to_the_bit(way, objective, placement, mode):
  log_ratio, advantage, mask, _ = case(seed=3)
  run = way(jax.value_and_grad(functools.partial(loss, objective=objective, mode=mode, placement=placement)))
  base, shifted = run(log_ratio, advantage, mask), run(log_ratio, advantage, mask, np.zeros_like(log_ratio))
  assert base[0] == shifted[0]
  np.testing.assert_array_equal(base[1], shifted[1])


@each_objective
@each_placement
def test_only_the_log_ratio_carries_gradient(objective, placement):
  log_ratio, advantage, mask, log_shift = case()
  f = lambda q, a, shift: loss(q, a, mask, shift, objective=objective, placement=placement, **WIDE[objective])
  of_ratio, of_advantage, of_shift = jax.grad(f, argnums=(0, 1, 2))(log_ratio, advantage, log_shift)
  assert of_ratio.any()
  assert not of_advantage.any()
  assert not of_shift.any()


@eager_and_jitted
@each_objective
@each_mode
def test_at_ratio_one_the_gradient_is_the_policy_gradient(way, objective, mode):
  _, advantage, mask, _ = case(seed=5)
  rng = np.random.default_rng(5)
  logits = rng.normal(size=(*mask.shape, 11)).astype(np.float32)
  tokens = rng.integers(0, 11, mask.shape)

  def log_prob(logits):
    return jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=-1)[..., 0]

  def surrogate(logits):
    return policy_loss(log_prob(logits), log_prob(logits), advantage, mask, objective=objective, aggregation=mode)

  per_token = mask / mask.sum(1, keepdims=True).clip(1) / mask.any(1).sum()
  if mode == "token_mean":
    # A sequence objective weighs its row by its length: the same weight per token as a token objective.
    per_token = mask / mask.sum()
  reinforce = lambda logits: -(per_token * advantage[:, None] * log_prob(logits)).sum()
  np.testing.assert_allclose(way(jax.grad(surrogate))(logits), jax.grad(reinforce)(logits), rtol=1e-5, atol=1e-8)


@eager_and_jitted
@each_objective
@each_setting
def test_order_of_rows_and_of_tokens_does_not_matter(way, objective, placement, mode):
  log_ratio, advantage, mask, log_shift = case(seed=7)
  rng = np.random.default_rng(7)
  rows, columns = rng.permutation(mask.shape[0]), rng.permutation(mask.shape[1])
  run = way(jax.value_and_grad(functools.partial(loss, objective=objective, mode=mode, placement=placement)))
  value, gradient = run(log_ratio, advantage, mask, log_shift)
  move = lambda x: x[rows][:, columns]
  moved = run(move(log_ratio), advantage[rows], move(mask), move(log_shift))
  np.testing.assert_allclose(moved[0], value, rtol=1e-5)
  np.testing.assert_allclose(moved[1], move(gradient), rtol=1e-5, atol=1e-8)


@eager_and_jitted
@each_objective
@each_mode
@pytest.mark.parametrize("cuts", [[2, 4], [1]], ids=str)
def test_microbatches_add_up_to_the_whole(way, objective, mode, cuts):
  """Totals, weights, and the gradients of totals over the whole batch's weight; one piece may be empty."""
  log_ratio, advantage, mask, log_shift = case(seed=9)
  mask[4:] = False

  def total(log_ratio, advantage, mask, log_shift):
    result = aggregate(objective(log_ratio, advantage, mask, log_shift=log_shift), mask, mode)
    return result.total, result.weight

  run = way(jax.value_and_grad(total, has_aux=True))
  (whole, weight), gradient = run(log_ratio, advantage, mask, log_shift)
  split = (np.split(x, cuts) for x in (log_ratio, advantage, mask, log_shift))
  pieces = [run(*arrays) for arrays in zip(*split, strict=True)]
  np.testing.assert_allclose(sum(t for (t, _), _ in pieces), whole, rtol=1e-5, atol=1e-6)
  assert sum(w for (_, w), _ in pieces) == weight == aggregation_weight(jnp.asarray(mask), mode)
  np.testing.assert_allclose(np.concatenate([g for _, g in pieces]), gradient, rtol=1e-5, atol=1e-8)


def test_aggregation_by_hand():
  mask = jnp.asarray([[True, True, True], [False, True, False], [False, False, False]])
  terms = grpo(jnp.zeros((3, 3)), jnp.asarray([1.0, 5.0, 9.0]), mask)
  tokens, sequences = (aggregate(terms, mask, mode) for mode in AGGREGATIONS)
  assert (float(tokens.total), float(tokens.weight)) == (8.0, 4.0)
  assert (float(sequences.total), float(sequences.weight)) == (6.0, 2.0)


@eager_and_jitted
@each_objective
@each_placement
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_far_log_ratios_and_bfloat16_stay_finite_in_float32(way, objective, placement, dtype):
  _, advantage, mask, log_shift = case(seed=11)
  log_ratio = np.where(np.arange(mask.size).reshape(mask.shape) % 2, 20.0, -20.0)
  run = way(jax.value_and_grad(functools.partial(loss, objective=objective, placement=placement)))
  for far in (log_ratio, np.full(mask.shape, 20.0), np.full(mask.shape, -20.0)):
    value, gradient = run(*(jnp.asarray(x, dtype) for x in (far, advantage)), mask, jnp.asarray(log_shift, dtype))
    assert value.dtype == jnp.float32
    assert gradient.dtype == dtype
    assert np.isfinite(value)
    assert np.isfinite(np.asarray(gradient, np.float32)).all()
  rounded = [jnp.asarray(x, dtype) for x in (case(seed=11)[0], advantage)]
  run = way(functools.partial(objective, log_shift=log_shift, placement=placement))
  for one, other in zip(run(*rounded, mask), run(*(x.astype(jnp.float32) for x in rounded), mask), strict=True):
    assert one.dtype == other.dtype
    np.testing.assert_allclose(one, other, rtol=1e-6)


def test_policy_loss_composes_objective_and_mean_and_leaves_the_old_policy_alone():
  log_ratio, advantage, mask, log_shift = case(seed=13)
  old = np.random.default_rng(1).normal(size=mask.shape).astype(np.float32) - 3
  for objective in OBJECTIVES.values():
    for mode in AGGREGATIONS:
      options = dict(objective=objective, aggregation=mode, log_shift=log_shift, placement="after_clip")
      got = policy_loss(old + log_ratio, old, advantage, mask, **options)
      want = loss(log_ratio, advantage, mask, log_shift, objective=objective, mode=mode, placement="after_clip")
      np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
  new, past = jax.grad(policy_loss, argnums=(0, 1))(old + log_ratio, old, advantage, mask)
  assert new.any()
  assert not past.any()
  np.testing.assert_allclose(
    policy_loss(old + log_ratio, old, advantage, mask), loss(log_ratio, advantage, mask, objective=gmpo), rtol=1e-4
  )


@each_objective
def test_mistakes_are_named_with_their_cure(objective):
  log_ratio, advantage, mask, _ = case()
  with pytest.raises(ValueError, match=r"placement is 'before'; want one of .*before_clip"):
    objective(log_ratio, advantage, mask, placement="before")
  for bad in (dict(eps_low=-0.1), dict(eps_high=-0.1), dict(eps_high=math.nan), dict(eps_low=math.nan)):
    with pytest.raises(ValueError, match=r"eps_low is .* and eps_high is .*want"):
      objective(log_ratio, advantage, mask, **bad)
  with pytest.raises(ValueError, match=r"aggregation is 'mean'; want one of .*token_mean"):
    aggregate(objective(log_ratio, advantage, mask), mask, "mean")
  for bad in ((log_ratio, advantage[:-1], mask), (log_ratio, advantage, mask[:, :-1]), (log_ratio, log_ratio, mask)):
    with pytest.raises(AssertionError):
      objective(*bad)
  with pytest.raises(AssertionError):
    objective(log_ratio, advantage, mask.astype(np.float32))


def test_a_ratio_cannot_be_bounded_below_zero():
  log_ratio, advantage, mask, _ = case()
  for objective in (grpo, gspo):
    with pytest.raises(ValueError, match=r"eps_low in \[0, 1\]"):
      objective(log_ratio, advantage, mask, eps_low=1.5)
