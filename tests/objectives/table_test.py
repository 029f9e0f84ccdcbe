"""Properties of every objective under every placement of router shift and every aggregation."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rspo_jax.objectives.advantages import BASELINES, SCALES
from rspo_jax.objectives.aggregation import AGGREGATIONS, aggregate
from rspo_jax.objectives.sequence_level import gmpo
from rspo_jax.objectives.table import OBJECTIVES, policy_loss
from rspo_jax.objectives.token_level import grpo
from rspo_jax.types import PLACEMENTS
from tests.support.objective_cases import (
  CONSTANT_WEIGHT,
  EVERY,
  NORM_LENGTH,
  SEQUENCE_OBJECTIVES,
  SHIFTS,
  TOKEN_OBJECTIVES,
  assert_same,
  batch,
  compiled,
  evaluate,
  results,
  shift_options,
  total,
)

each_objective = pytest.mark.parametrize("objective", EVERY.values(), ids=EVERY)


def test_compiled_equals_eager():
  arrays = batch()
  assert_same(compiled(*arrays), evaluate(*arrays), rtol=1e-5, atol=1e-6)


def test_gradients_match_finite_differences_in_float64():
  """A weight that an objective treats as constant is fixed at the point of differentiation."""
  step = 1e-6
  with jax.enable_x64(True):
    log_ratio, advantage, mask, log_shift = (jnp.asarray(x, bool if x.dtype == bool else float) for x in batch())
    analytic = jax.jit(lambda q: evaluate(q, advantage, mask, log_shift))(log_ratio)

    def totals(q):
      for name, objective in EVERY.items():
        for shift in SHIFTS:
          if name in CONSTANT_WEIGHT:
            terms = analytic[name][shift][0]
            values = terms.objective * jnp.where(terms.grad_clipped, 1, jnp.exp(q - log_ratio))
          else:
            values = objective(q, advantage, mask, **shift_options(shift, log_shift)).objective
          for mode in AGGREGATIONS:
            yield total(values, mask, mode).total

    moves = step * np.eye(log_ratio.size).reshape(-1, *log_ratio.shape)
    f = jax.jit(jax.vmap(lambda move: jnp.stack(list(totals(log_ratio + move)))))
    numeric = np.asarray((f(moves) - f(-moves)) / (2 * step)).T.reshape(-1, *log_ratio.shape)
  for (name, shift, mode, weighted, gradient), want in zip(results(analytic), numeric, strict=True):
    assert weighted.total.dtype == gradient.dtype == np.float64
    assert np.abs(gradient).max() > 0.01
    np.testing.assert_allclose(gradient, want, rtol=1e-6, atol=1e-8, err_msg=f"{name} {shift} {mode}")


def test_microbatches_add_up_to_the_minibatch():
  """Totals, weights, and the gradients of totals; each piece has only the columns it uses."""
  log_ratio, advantage, mask, log_shift = batch(seed=9, rows=12, columns=10)
  mask[6:, 7:] = mask[:6, :3] = False
  whole = evaluate(log_ratio, advantage, mask, log_shift)
  cuts = (slice(0, 6), slice(3, 10)), (slice(6, 12), slice(0, 7))
  pieces = [results(compiled(log_ratio[c], advantage[c[0]], mask[c], log_shift[c])) for c in cuts]
  for (name, shift, mode, weighted, gradient), *parts in zip(results(whole), *pieces, strict=True):
    message = f"{name} {shift} {mode}"
    assert sum(part[3].weight for part in parts) == weighted.weight > 0
    summed = sum(part[3].total for part in parts)
    np.testing.assert_allclose(summed, weighted.total, rtol=1e-5, atol=1e-6, err_msg=message)
    for cut, part in zip(cuts, parts, strict=True):
      np.testing.assert_allclose(gradient[cut], part[4], rtol=1e-5, atol=1e-7, err_msg=message)
    assert not gradient[~mask].any()


@given(st.lists(st.integers(0, 2), min_size=6, max_size=6))
@settings(max_examples=20, deadline=None)
def test_any_split_of_the_rows_adds_up(piece_of_row):
  log_ratio, advantage, mask, log_shift = batch(seed=10)
  pieces = [
    compiled(log_ratio, advantage, mask & (np.asarray(piece_of_row) == i)[:, None], log_shift) for i in range(3)
  ]
  whole = compiled(log_ratio, advantage, mask, log_shift)
  sums = lambda tree: {name: {shift: modes for shift, (_, modes) in shifts.items()} for name, shifts in tree.items()}
  assert_same(jax.tree.map(lambda *x: sum(x), *map(sums, pieces)), sums(whole), rtol=1e-5, atol=1e-6)


def test_order_of_rows_and_of_tokens_does_not_matter():
  log_ratio, advantage, mask, log_shift = batch(seed=7)
  rng = np.random.default_rng(7)
  rows, columns = rng.permutation(mask.shape[0]), rng.permutation(mask.shape[1])
  move = lambda x: x[rows][:, columns]
  straight = compiled(log_ratio, advantage, mask, log_shift)
  moved = compiled(move(log_ratio), advantage[rows], move(mask), move(log_shift))
  arrange = lambda x: move(np.asarray(x)) if x.ndim else x
  assert_same(moved, jax.tree.map(arrange, straight), rtol=1e-5, atol=1e-6)


def test_padding_and_empty_rows_give_exactly_zero_for_any_values_there():
  log_ratio, advantage, mask, log_shift = batch()
  expected = compiled(np.where(mask, log_ratio, 0), advantage, mask, np.where(mask, log_shift, 0))
  for outside in (np.nan, np.inf, -np.inf):
    got = compiled(np.where(mask, log_ratio, outside), advantage, mask, np.where(mask, log_shift, outside))
    assert_same(got, expected)
  for leaf in jax.tree.leaves(expected):
    assert leaf.ndim == 0 or not np.asarray(leaf)[~mask].any()


def test_more_padding_and_more_empty_rows_change_nothing():
  log_ratio, advantage, mask, log_shift = batch()
  pad = lambda x, fill: np.pad(x, ((2, 4), (1, 2)), constant_values=fill)
  more = np.pad(advantage, (2, 4), constant_values=5)
  wide = evaluate(pad(log_ratio, 7.0), more, pad(mask, False), pad(log_shift, -9))
  narrow = jax.tree.map(lambda x: np.asarray(x)[2:-4, 1:-2] if x.ndim else x, wide)
  assert_same(narrow, compiled(log_ratio, advantage, mask, log_shift), rtol=1e-5, atol=1e-6)


def test_an_all_empty_batch_has_zero_objective_weight_and_gradient():
  log_ratio, advantage, mask, log_shift = batch()
  for _, _, _, weighted, gradient in results(compiled(log_ratio * np.nan, advantage, mask & False, log_shift)):
    assert weighted.total == weighted.weight == weighted.mean == 0
    assert not gradient.any()


def test_zero_advantage_contributes_nothing_even_if_the_ratio_overflows():
  log_ratio, advantage, mask, log_shift = batch()
  assert mask[2].any() and advantage[2] == 0
  before = compiled(log_ratio, advantage, mask, log_shift)
  for far in (300.0, -300.0):
    log_ratio[2] = far
    moved = compiled(log_ratio, advantage, mask, log_shift)
    assert_same(moved, before)
    assert all(not gradient[2].any() for *_, gradient in results(moved))


def test_full_trust_gives_the_base_objective_bit_for_bit():
  """Eagerly; compiled, XLA may fuse the two programs differently."""
  log_ratio, advantage, mask, _ = batch(seed=3)
  for way, tolerance in ((evaluate, {}), (compiled, dict(rtol=1e-6, atol=1e-7))):
    for shifts in way(log_ratio, advantage, mask, np.zeros_like(log_ratio)).values():
      for placement in PLACEMENTS:
        assert_same(shifts[placement], shifts["no_shift"], **tolerance)


def test_large_log_ratios_stay_finite_in_float32():
  log_ratio, advantage, mask, log_shift = batch(seed=11)
  mixed = np.where(np.arange(mask.size).reshape(mask.shape) % 2, 20, -20).astype(np.float32)
  for far in (mixed, np.full_like(log_ratio, 20), np.full_like(log_ratio, -20)):
    for name, shift, mode, weighted, gradient in results(compiled(far, advantage, mask, log_shift)):
      assert weighted.total.dtype == np.float32
      assert np.isfinite(weighted.total) and np.isfinite(gradient).all(), (name, shift, mode)


def test_bfloat16_is_computed_in_float32():
  rounded = [jnp.asarray(x, bool if x.dtype == bool else jnp.bfloat16) for x in batch(seed=11)]
  got = evaluate(*rounded)
  widened = compiled(*(x if x.dtype == bool else x.astype(jnp.float32) for x in rounded))
  for (name, shift, mode, one, gradient), (*_, other, wanted) in zip(results(got), results(widened), strict=True):
    assert one.total.dtype == jnp.float32 and gradient.dtype == jnp.bfloat16
    np.testing.assert_allclose(one.total, other.total, rtol=1e-5, atol=1e-6, err_msg=f"{name} {shift} {mode}")
    np.testing.assert_allclose(gradient.astype(np.float32), wanted, rtol=2**-7, atol=1e-6)
  flags = lambda tree: {name: shifts["before_clip"][0][1:] for name, shifts in tree.items()}
  assert_same(flags(got), flags(widened))


@each_objective
def test_only_the_log_ratio_carries_gradient(objective):
  log_ratio, advantage, mask, log_shift = batch()
  for placement in PLACEMENTS:
    f = lambda q, a, s, at=placement: objective(q, a, mask, log_shift=s, placement=at).objective.sum()
    of_ratio, of_advantage, of_shift = jax.grad(f, argnums=(0, 1, 2))(log_ratio, advantage, log_shift)
    assert of_ratio.any()
    assert not of_advantage.any()
    assert not of_shift.any()


def test_at_ratio_one_all_objectives_are_the_policy_gradient():
  """Value A and gradient A / n on a row of n tokens; sapo's value is 2 A / tau, a product of ratios has gradient A."""
  log_ratio, advantage, mask, log_shift = batch(seed=5)
  length = mask.sum(1, keepdims=True).clip(1)
  value = np.where(mask, advantage[:, None], 0)
  for name, shifts in compiled(np.zeros_like(log_ratio), advantage, mask, log_shift).items():
    terms, modes = shifts["no_shift"]
    scale = 2 / np.where(value > 0, 1, 1.05) if name == "sapo" else 1
    np.testing.assert_allclose(terms.objective, value * scale, rtol=1e-6, err_msg=name)
    assert not (terms.clipped_low | terms.clipped_high | terms.grad_clipped).any()
    steps = length if name == "rloo_sequence" else 1
    np.testing.assert_allclose(modes["seq_mean_token_mean"][1], value / length * steps, rtol=1e-6, err_msg=name)
    np.testing.assert_allclose(modes["token_mean"][1], value * steps, rtol=1e-6, err_msg=name)
    np.testing.assert_allclose(modes["seq_mean_token_sum_norm"][1], value * steps / NORM_LENGTH, rtol=1e-6)


COLUMNS = 4
terms_and_gradients = jax.jit(
  lambda q, advantage, mask: {
    name: (f(q, advantage, mask), jax.grad(lambda q, f=f: f(q, advantage, mask).objective.sum())(q))
    for name, f in EVERY.items()
  }
)


@given(
  tokens=st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=COLUMNS),
  advantage=st.sampled_from([-1.5, -0.1, 0.0, 0.7]),
)
@settings(max_examples=60, deadline=None)
def test_grad_clipped_marks_exactly_the_tokens_whose_gradient_a_bound_removes(tokens, advantage):
  fill = COLUMNS - len(tokens)
  q, mask = np.pad(np.asarray(tokens, np.float32), (0, fill))[None], np.arange(COLUMNS)[None] < len(tokens)
  for name, (terms, gradient) in terms_and_gradients(q, np.asarray([advantage], np.float32), mask).items():
    active = mask & (advantage != 0)
    np.testing.assert_array_equal(terms.grad_clipped, active & (gradient == 0), err_msg=name)
    bound = terms.clipped_low | terms.clipped_high
    if name.startswith("cispo"):
      assert not (terms.grad_clipped.any() or (bound & ~active).any())
    else:
      np.testing.assert_array_equal(terms.grad_clipped, bound, err_msg=name)
    if name in ("policy_gradient", "rloo_none", "sapo"):
      assert not bound.any()


def test_token_and_sequence_objectives_agree_on_rows_of_one_token():
  log_ratio, advantage, _, log_shift = batch(seed=2, rows=24)
  mask = np.zeros_like(log_ratio, bool)
  mask[np.arange(24), np.arange(24) % 7] = True
  bounds = dict(eps_low=0.2, eps_high=0.3)
  nats = dict(eps_low=-math.log(0.8), eps_high=math.log(1.3))
  for shift in SHIFTS[:2]:
    options = shift_options(shift, log_shift)
    run = lambda f, options=options, **bounds: jax.value_and_grad(
      lambda q: (lambda terms: (terms.objective.sum(), terms))(f(q, advantage, mask, **options, **bounds)), has_aux=True
    )(log_ratio)
    want = run(grpo, **bounds)
    assert want[0][1].clipped_low.any() and want[0][1].clipped_high.any()
    for name in ("gspo", "gspo_token", "rloo_sequence", "rloo_token"):
      objective = EVERY[name]
      assert_same(run(objective.func, **{**objective.keywords, **bounds}), want, rtol=1e-6, atol=1e-7)
    assert_same(run(gmpo, **nats), want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", TOKEN_OBJECTIVES)
def test_token_level_objectives_take_an_advantage_for_every_token(name):
  """Each token's term is that of a row whose tokens all have its advantage."""
  log_ratio, advantage, mask, log_shift = batch(seed=4)
  objective, gradient = TOKEN_OBJECTIVES[name], lambda f, q: jax.grad(lambda q: f(q).objective.sum())(q)
  one = np.where(mask, np.broadcast_to(advantage[:, None], mask.shape), np.nan)
  pick = np.random.default_rng(0).random(mask.shape) < 0.5
  for shift in SHIFTS:
    call = lambda a, shift=shift: functools.partial(
      objective, advantage=a, mask=mask, **shift_options(shift, log_shift)
    )
    constant, per_row, flipped = call(one), call(advantage), call(-advantage)
    mixed = call(np.where(pick, one, -one))
    assert_same(constant(log_ratio), per_row(log_ratio), rtol=1e-6)
    assert_same(gradient(constant, log_ratio), gradient(per_row, log_ratio), rtol=1e-6)
    both = (per_row(log_ratio), gradient(per_row, log_ratio)), (flipped(log_ratio), gradient(flipped, log_ratio))
    want = jax.tree.map(lambda a, b: np.where(pick, a, b), *both)
    assert_same((mixed(log_ratio), gradient(mixed, log_ratio)), want, rtol=1e-6)


@pytest.mark.parametrize("name", SEQUENCE_OBJECTIVES)
def test_sequence_level_objectives_refuse_an_advantage_for_every_token(name):
  log_ratio, _, mask, _ = batch()
  with pytest.raises(ValueError, match=r"advantage is \(6, 7\), one for every token, .*want \[B\]"):
    EVERY[name](log_ratio, log_ratio, mask)


@each_objective
def test_invalid_arguments_are_refused_with_a_cure(objective):
  log_ratio, advantage, mask, _ = batch()
  with pytest.raises(ValueError, match=r"placement is 'before'; want one of .*before_clip"):
    objective(log_ratio, advantage, mask, placement="before")
  for bad in ((log_ratio, advantage[:-1], mask), (log_ratio, advantage, mask[:, :-1]), (log_ratio[0], advantage, mask)):
    with pytest.raises(AssertionError):
      objective(*bad)
  with pytest.raises(AssertionError):
    objective(log_ratio, advantage, mask.astype(np.float32))
  with pytest.raises(AssertionError):
    objective(log_ratio, advantage, mask, log_shift=log_ratio[:, :-1])


def test_impossible_bounds_are_refused():
  log_ratio, advantage, mask, _ = batch()
  for name in ("grpo", "cispo", "gspo_token", "rloo_token", "gspo", "gmpo", "gmpo_signed", "rloo_sequence"):
    for bad in (dict(eps_low=-0.1), dict(eps_high=-0.1), dict(eps_high=math.nan), dict(eps_low=math.nan)):
      with pytest.raises(ValueError, match=r"eps_low is .* and eps_high is .*want"):
        EVERY[name](log_ratio, advantage, mask, **bad)
    if not name.startswith("gmpo"):
      with pytest.raises(ValueError, match=r"eps_low in \[0, 1\]"):
        EVERY[name](log_ratio, advantage, mask, eps_low=1.5)


def test_every_recipe_runs_and_names_existing_conventions():
  log_ratio, advantage, mask, log_shift = batch()
  for recipe in OBJECTIVES.values():
    assert recipe.baseline in BASELINES and recipe.scale in SCALES
    options = dict(objective=recipe.objective, aggregation=recipe.aggregation, norm_length=NORM_LENGTH)
    loss, gradient = jax.value_and_grad(policy_loss)(
      log_ratio, np.zeros_like(log_ratio), advantage, mask, log_shift=log_shift, placement="weight", **options
    )
    assert np.isfinite(loss) and gradient.any()


def test_policy_loss_is_minus_the_mean_objective_without_gradient_into_the_old_policy():
  log_ratio, advantage, mask, log_shift = batch(seed=13)
  old = np.random.default_rng(1).normal(size=mask.shape).astype(np.float32) - 3
  for objective in EVERY.values():
    for mode in AGGREGATIONS:
      options = dict(objective=objective, aggregation=mode, norm_length=5, log_shift=log_shift, placement="after_clip")
      got = policy_loss(old + log_ratio, old, advantage, mask, **options)
      terms = objective(log_ratio, advantage, mask, log_shift=log_shift, placement="after_clip")
      want = -aggregate(terms.objective, mask, mode, norm_length=5).mean
      np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
  new, past = jax.grad(policy_loss, argnums=(0, 1))(old + log_ratio, old, advantage, mask)
  assert new.any()
  assert not past.any()
  want = -aggregate(gmpo(log_ratio, advantage, mask).objective, mask, "seq_mean_token_mean").mean
  np.testing.assert_allclose(policy_loss(old + log_ratio, old, advantage, mask), want, rtol=1e-4)
