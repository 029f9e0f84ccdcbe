"""The batch-synchronous sampler keeps the contract of all samplers."""

import functools

import jax
import numpy as np
import pytest

from rspo_jax.rollout.completions import new_completions
from rspo_jax.rollout.continuous import ContinuousSampler
from rspo_jax.rollout.samplers import BatchSampler, draw_rollout, make_sampler
from rspo_jax.rollout.sampling import sample
from rspo_jax.rollout.token_sampling import SamplingOptions
from tests.support import tiny

NEW, SAMPLES, KEY = 5, 2, jax.random.key(3)
OPTIONS = SamplingOptions(NEW, SAMPLES, stop_ids=(0, 1, 2))


@functools.cache
def sampler(prompts=3):
  return BatchSampler(tiny.policy_and_params()[0], OPTIONS, prompts=prompts, prompt_length=5)


def prompts():
  tokens, valid = map(np.asarray, tiny.prompts(7))
  return [row[mask] for row, mask in zip(tokens, valid, strict=True)]


def queue():
  return new_completions(prompts(), SAMPLES, limits=NEW)


def assert_same(found, wanted):
  assert [c.number for c in found] == [c.number for c in wanted]
  for one, other in zip(found, wanted, strict=True):
    np.testing.assert_array_equal(one.tokens, other.tokens)
    assert one.finished == other.finished


@functools.cache
def whole():
  return sampler().draw(tiny.policy_and_params()[1], queue(), KEY)


def test_batches_of_prompts_give_what_one_call_gives():
  policy, params = tiny.policy_and_params()
  run = jax.jit(functools.partial(sample, policy, options=OPTIONS))
  wanted = jax.device_get(run(params, *tiny.prompts(7), KEY))
  found = draw_rollout(sampler(), params, *map(np.asarray, tiny.prompts(7)), KEY)
  np.testing.assert_array_equal(found.tokens, wanted.tokens)
  np.testing.assert_array_equal(found.action_mask, wanted.action_mask)
  np.testing.assert_allclose(found.log_prob, wanted.log_prob, atol=1e-5)


def test_a_stop_between_batches_leaves_new_completions_that_a_later_call_samples():
  params = tiny.policy_and_params()[1]
  seen = []

  def stop_after_one_batch(finished):
    seen.append([completion.number for completion in finished])
    return () if len(seen) < 2 else None

  half = sampler().draw(params, queue(), KEY, version=4, on_finished=stop_after_one_batch)
  assert seen == [[], list(range(6))]
  assert [completion.done for completion in half] == [True] * 6 + [False] * 8
  assert all(len(completion.tokens) == 0 for completion in half[6:])
  rest = sampler().draw(params, half, KEY, version=5)
  assert_same(rest, whole())
  assert {int(v) for completion in rest[:6] for v in completion.version} == {4}
  assert {int(v) for completion in rest[6:] for v in completion.version} == {5}


def test_numbers_need_not_be_neighbours_and_further_completions_may_come_on_the_way():
  everyone, params = queue(), tiny.policy_and_params()[1]
  rest = [everyone[4:8], everyone[:2]]
  found = sampler().draw(
    params, [*everyone[8:], *everyone[2:4]], KEY, on_finished=lambda finished: rest.pop() if rest else ()
  )
  assert_same(found, whole())


def test_every_completion_keeps_its_limit():
  params, limits = tiny.policy_and_params()[1], np.random.default_rng(0).integers(1, NEW + 1, 14)
  found = sampler().draw(params, new_completions(prompts(), SAMPLES, limits=limits), KEY)
  for completion, long in zip(found, whole(), strict=True):
    np.testing.assert_array_equal(completion.tokens, long.tokens[: completion.limit])


def test_partial_completions_are_refused_with_the_cure():
  partial = whole()[0]._replace(limit=NEW + 1, finished=False)
  with pytest.raises(ValueError, match=r"completion 0 has \d tokens already.*SamplingOptions.rows"):
    sampler().draw(tiny.policy_and_params()[1], [partial], KEY)


def test_the_options_choose_the_sampler():
  policy, _ = tiny.policy_and_params()
  make = functools.partial(make_sampler, policy, prompts=4, prompt_length=5)
  assert isinstance(make(OPTIONS), BatchSampler)
  assert isinstance(make(SamplingOptions(NEW, SAMPLES, rows=2)), ContinuousSampler)
  assert make(OPTIONS, remote=lambda options: ("remote", options)) == ("remote", OPTIONS)


def test_long_completions_grow_their_cache_by_default_on_cpus():
  policy, _ = tiny.policy_and_params()
  sizes = {
    new: BatchSampler(policy, SamplingOptions(new), prompts=1, prompt_length=2).options.cache_sizes for new in (8, 64)
  }
  assert sizes == {8: 1, 64: 4}
