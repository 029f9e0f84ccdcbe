import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.policy import build_policy
from rspo_jax import mesh
from rspo_jax.rollout import continuous
from rspo_jax.rollout.completions import from_arrays, new_completions, to_arrays, to_rollout
from rspo_jax.rollout.continuous import ContinuousSampler
from rspo_jax.rollout.samplers import draw_rollout
from rspo_jax.rollout.sampling import sample
from rspo_jax.rollout.token_sampling import SamplingOptions
from rspo_jax.training.scoring import score
from tests.support import tiny

PROMPTS, LENGTH, NEW, SAMPLES = 10, 8, 12, 2
CONFIG = dataclasses.replace(tiny.CONFIG, num_hidden_layers=2, mlp_only_layers=())  # a layer less to compile
OPTIONS = SamplingOptions(NEW, SAMPLES, temperature=1.0, stop_ids=(0, 1, 2), record_experts=True)


def prompts():
  rng = np.random.default_rng(3)
  valid = np.arange(LENGTH) >= LENGTH - rng.integers(1, LENGTH + 1, size=(PROMPTS, 1))
  tokens = rng.integers(3, tiny.CONFIG.vocab_size, size=(PROMPTS, LENGTH)) * valid
  return tokens.astype(np.int32), valid


@functools.cache
def synchronous(limited=False):
  """What the batch-synchronous sampler draws."""
  policy, params = tiny.policy_and_params(CONFIG)
  given = limits() if limited else None
  run = jax.jit(functools.partial(sample, policy, options=OPTIONS))
  return jax.device_get(run(params, *map(jnp.asarray, prompts()), jax.random.key(7), first_row=5, limits=given))


def limits():
  return np.random.default_rng(4).integers(1, NEW + 1, PROMPTS * SAMPLES).astype(np.int32)


def assert_same(found, wanted):
  for name in ("tokens", "valid", "action_mask", "finished"):
    np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name), err_msg=name)
  for name in ("sampler_log_prob", "log_prob"):
    np.testing.assert_allclose(getattr(found, name), getattr(wanted, name), atol=1e-5, err_msg=name)
  # The position before a prompt's first token is padding, and what routes it means nothing.
  mask = wanted.valid & np.pad(wanted.valid, ((0, 0), (1, 0)))[:, :-1]
  np.testing.assert_array_equal(found.expert_index[mask], wanted.expert_index[mask])


traced = collections.Counter()


def counted(policy):
  """The same policy; `traced` counts how often jit looked into its functions, which is once a program."""

  def counting(name):
    def call(*args, **keywords):
      traced[name] += 1
      return getattr(policy, name)(*args, **keywords)

    return call

  return policy._replace(**{name: counting(name) for name in ("prefill", "insert", "decode")})


@functools.cache
def sampler(rows=6, refill=3, buckets=(4, LENGTH)):
  policy = counted(tiny.policy_and_params(CONFIG)[0])
  return ContinuousSampler(policy, OPTIONS, rows=rows, prompt_length=LENGTH, refill=refill, buckets=buckets)


def drawn(made, **arguments):
  params = tiny.policy_and_params(CONFIG)[1]
  return draw_rollout(made, params, *prompts(), jax.random.key(7), first_row=5, **arguments)


def test_it_draws_what_the_synchronous_sampler_draws():
  assert_same(drawn(sampler()), synchronous())


def test_more_rows_than_completions_are_no_harm():
  assert_same(drawn(sampler(rows=24, refill=24, buckets=(LENGTH,))), synchronous())


def test_every_completion_keeps_to_its_own_limit():
  found = drawn(sampler(), limits=limits())
  assert_same(found, synchronous(limited=True))
  lengths = found.action_mask.sum(axis=1)
  assert np.all(lengths <= limits()) and np.any(lengths == limits())
  np.testing.assert_array_equal(found.finished, np.isin(found.tokens[np.arange(20), LENGTH + lengths - 1], (0, 1, 2)))


@functools.cache
def continuing():
  policy = tiny.policy_and_params(CONFIG)[0]
  return ContinuousSampler(policy, OPTIONS, rows=6, prompt_length=LENGTH, refill=2, buckets=(LENGTH,), resume=True)


def waiting():
  tokens, valid = prompts()
  return new_completions([row[mask] for row, mask in zip(tokens, valid, strict=True)], SAMPLES, first=5, limits=NEW)


def stopped(params, version=0, collections=3):
  """All completions, as they stand when rows were collected so often."""
  calls = iter(range(collections))
  return continuing().draw(
    params,
    waiting(),
    jax.random.key(7),
    version=version,
    on_finished=lambda finished: () if next(calls, None) is not None else None,
  )


def test_what_was_stopped_and_saved_is_drawn_on_as_if_nothing_had_happened():
  params = tiny.policy_and_params(CONFIG)[1]
  partial = stopped(params)
  kinds = {(completion.done, len(completion.tokens) > 0) for completion in partial}
  assert kinds == {(True, True), (False, True), (False, False)}  # some through, some under way, some waiting
  saved = from_arrays(to_arrays(partial))
  found = continuing().draw(params, saved, jax.random.key(7))
  assert all(completion.done for completion in found)
  assert_same(to_rollout(found, LENGTH, NEW), synchronous())


def test_tokens_drawn_before_the_policy_changed_stay_and_say_which_policy_drew_them():
  params = tiny.policy_and_params(CONFIG)[1]
  other = jax.tree.map(lambda leaf: leaf * 1.5, params)
  partial = stopped(params, version=3)
  found = continuing().draw(other, partial, jax.random.key(7), version=4)
  carried = 0
  for old, new in zip(partial, found, strict=True):
    drawn = len(old.tokens)
    carried += 0 < drawn < len(new.tokens)
    for name in ("tokens", "sampler_log_prob", "log_prob"):
      np.testing.assert_array_equal(getattr(new, name)[:drawn], getattr(old, name))
    np.testing.assert_array_equal(new.version, np.where(np.arange(len(new.tokens)) < drawn, 3, 4))
    if drawn:
      np.testing.assert_array_equal(new.experts[: len(old.prompt) + drawn], old.experts)
  assert carried
  rollout = to_rollout(found, LENGTH, NEW, versions=True)
  assert set(rollout.version[rollout.action_mask]) == {3, 4}
  # What the new policy adds is what it gives these tokens after those: its own forward is the witness.
  policy = tiny.policy_and_params(CONFIG)[0]
  scored = jax.jit(functools.partial(score, policy))(other, rollout.tokens, rollout.valid)
  new = rollout.action_mask & (rollout.version == 4)
  np.testing.assert_allclose(rollout.log_prob[new], np.asarray(scored.log_prob)[new], atol=1e-4)
  old = rollout.action_mask & (rollout.version == 3)
  assert np.abs(rollout.log_prob[old] - np.asarray(scored.log_prob)[old]).max() > 1e-2


def test_further_completions_can_be_asked_for_on_the_way():
  everyone = waiting()
  rest, seen = [everyone[:5], everyone[5:12], everyone[12:]], []

  def on_finished(finished):
    seen.extend(completion.number for completion in finished)
    return rest.pop() if rest else ()

  found = continuing().draw(tiny.policy_and_params(CONFIG)[1], (), jax.random.key(7), on_finished=on_finished)
  assert_same(to_rollout(found, LENGTH, NEW), synchronous())
  assert sorted(seen) == [completion.number for completion in everyone]


def test_begun_completions_need_a_sampler_that_was_made_for_them():
  partial = stopped(tiny.policy_and_params(CONFIG)[1])
  with pytest.raises(ValueError, match="resume=True"):
    sampler().draw(tiny.policy_and_params(CONFIG)[1], partial, jax.random.key(7))


def test_rows_split_over_a_mesh_draw_the_same():
  _, params = tiny.policy_and_params(CONFIG)
  layout = mesh.make_layout({"data": 2, "expert": 2}, jax.devices()[:4])
  sharded = build_policy(CONFIG, layout)
  made = ContinuousSampler(sharded, OPTIONS, rows=8, prompt_length=LENGTH, refill=4, buckets=(LENGTH,), layout=layout)
  placed = jax.device_put(params, mesh.param_shardings(sharded, layout))
  assert_same(draw_rollout(made, placed, *prompts(), jax.random.key(7), first_row=5), synchronous())


def test_the_programs_are_listed_and_no_other_is_compiled():
  made = sampler()
  assert len(made.programs) == 7 and "6 rows of up to 20 tokens" in made.programs[-1].name
  assert [int(program.name.split()[1]) for program in made.programs[-3:]] == [1, 2, 6]  # rows that each program decodes
  layers, keys, width = 2, 2, 8
  assert made.cache_bytes == 6 * (20 * (layers * 2 * keys * width * 4 + 1) + 4) + 4
  drawn(made)
  before = traced.copy()
  drawn(made, limits=limits())
  assert traced == before and before["prefill"] >= 2


def test_sizes_that_cannot_be_are_refused_with_the_cure(monkeypatch):
  policy, _ = tiny.policy_and_params(CONFIG)
  make = functools.partial(ContinuousSampler, policy, OPTIONS, prompt_length=LENGTH)
  with pytest.raises(ValueError, match="refill up to rows"):
    make(rows=4, refill=5)
  with pytest.raises(ValueError, match="the last one 8"):
    make(rows=4, buckets=(4,))
  monkeypatch.setattr(continuous.os, "sysconf", lambda name: 64)
  with pytest.raises(ValueError, match=r"cache of 4 rows takes [\d,]+ bytes and 4,096 are left"):
    make(rows=4)
