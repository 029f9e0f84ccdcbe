"""One contract for everything that samples completions, and the one place where a sampler is chosen."""

import dataclasses
import functools
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from rspo_jax import mesh
from rspo_jax.rollout.completions import Completion, from_rollout, new_completions, to_rollout
from rspo_jax.rollout.continuous import ContinuousSampler
from rspo_jax.rollout.sampling import sample
from rspo_jax.rollout.token_sampling import SamplingOptions
from rspo_jax.tokenization.basic import pad_left
from rspo_jax.types import Layout, Params, Policy, Program, Rollout

OnFinished = Callable[[list[Completion]], Sequence[Completion] | None]


class Sampler(Protocol):
  """Samples completions: `BatchSampler`, `ContinuousSampler`, `rspo_jax.rollout.remote_engine.RemoteEngine`, or yours.

  Attributes:
    options: how completions are sampled.
    programs: what it compiles; () for a sampler that compiles nothing.
    prompts_per_call: prompts that cost as much as one: new groups are begun in this number.
  """

  options: SamplingOptions
  programs: tuple[Program, ...]
  prompts_per_call: int

  def draw(
    self,
    params: Params,
    queue: Iterable[Completion],
    key: jax.Array,
    *,
    version: int = 0,
    on_finished: OnFinished | None = None,
  ) -> list[Completion]:
    """Samples until every completion is done, or until `on_finished` returns None.

    Args:
      queue: completions with different numbers; those that are done come back as they are. Numbers decide the random
        keys: a completion does not depend on the others.
      version: of params, recorded with every token.
      on_finished: called before sampling and whenever completions are done, with those done since the last call;
        returns further completions to sample (or none), or None to stop early.
    Returns:
      All completions in the order of their numbers. After an early stop some are new or partial, and a later call, also
      with other params, continues them.
    """


class BatchSampler:
  """Batch-synchronous sampling: whole batches of prompts, one after the other, each until its last row is done.

  Args:
    policy, options: as for `rspo_jax.rollout.sampling.sample`.
    prompts: P of a batch. prompt_length: Tp of the longest prompt.
    layout: the mesh; P is a multiple of its batch shards. None: the default device.
  """

  def __init__(
    self, policy: Policy, options: SamplingOptions, *, prompts: int, prompt_length: int, layout: Layout | None = None
  ):
    if options.cache_sizes is None:
      options = dataclasses.replace(options, cache_sizes=_cache_sizes(mesh.platform(layout), options))
    self.options, self.prompts_per_call, self._length, self._layout = options, prompts, prompt_length, layout
    self._sample = jax.jit(functools.partial(sample, policy, options=options))
    how = "greedily" if options.greedy else f"at T = {options.temperature:g}"
    self.programs = (
      Program(
        f"sample {options.samples_per_prompt} completions of up to {options.max_new_tokens} tokens {how} for each of "
        f"{prompts} prompts of up to {prompt_length} tokens",
        self._sample,
        (
          mesh.abstract_params(policy, layout),
          *mesh.abstract_batch(
            (
              jax.ShapeDtypeStruct((prompts, prompt_length), jnp.int32),
              jax.ShapeDtypeStruct((prompts, prompt_length), bool),
            ),
            layout,
          ),
          jax.eval_shape(jax.random.key, 0),
        ),
        {
          "numbers": mesh.abstract_batch(
            jax.ShapeDtypeStruct((prompts * options.samples_per_prompt,), jnp.int32), layout
          )
        },
      ),
    )

  def draw(
    self,
    params: Params,
    queue: Iterable[Completion],
    key: jax.Array,
    *,
    version: int = 0,
    on_finished: OnFinished | None = None,
  ) -> list[Completion]:
    """See `Sampler.draw`; a stop takes effect between batches. ValueError for a completion that is partial."""
    known = {completion.number: completion for completion in queue}
    pending = deque(completion for completion in known.values() if not completion.done)
    finished = [completion for completion in known.values() if completion.done]
    while True:
      if on_finished is not None:
        more = on_finished(finished)
        if more is None:
          break
        known |= {completion.number: completion for completion in more}
        pending.extend(completion for completion in more if not completion.done)
      if not pending:
        break
      finished = self._sample_batch(params, self._take_groups(pending), key, version)
      known |= {completion.number: completion for completion in finished}
    return [known[number] for number in sorted(known)]

  def _take_groups(self, pending: deque[Completion]) -> list[list[Completion]]:
    """The next P groups: up to G neighbours of the queue with the same prompt each."""
    groups: list[list[Completion]] = []
    while pending:
      completion = pending[0]
      if len(completion.tokens):
        raise ValueError(
          f"completion {completion.number} has {len(completion.tokens)} tokens already; batch-synchronous sampling "
          "starts completions only. Set SamplingOptions.rows to continue partial ones."
        )
      same_prompt = groups and np.array_equal(groups[-1][0].prompt, completion.prompt)
      if same_prompt and len(groups[-1]) < self.options.samples_per_prompt:
        groups[-1].append(pending.popleft())
      elif len(groups) < self.prompts_per_call:
        groups.append([pending.popleft()])
      else:
        break
    return groups

  def _sample_batch(
    self, params: Params, groups: list[list[Completion]], key: jax.Array, version: int
  ) -> list[Completion]:
    samples, new = self.options.samples_per_prompt, self.options.max_new_tokens
    filled = groups + [groups[-1]] * (self.prompts_per_call - len(groups))
    tokens, valid = pad_left([group[0].prompt for group in filled], self._length)
    rows = [group[min(i, len(group) - 1)] for group in filled for i in range(samples)]
    numbers = np.array([completion.number for completion in rows], np.int32)
    limits = np.array([completion.limit for completion in rows], np.int32)
    batch = {"tokens": tokens, "valid": valid, "numbers": numbers}
    if np.any(limits < new):
      batch["limits"] = limits
    if self._layout is not None:
      batch = mesh.put_batch(batch, self._layout)
    rollout = mesh.fetch(self._sample(params, batch.pop("tokens"), batch.pop("valid"), key, **batch))
    kept = [prompt * samples + i for prompt, group in enumerate(groups) for i in range(len(group))]
    return from_rollout(jax.tree.map(lambda leaf: leaf[kept], rollout), [rows[row] for row in kept], version)


def make_sampler(
  policy: Policy,
  options: SamplingOptions,
  *,
  prompts: int,
  prompt_length: int,
  resume: bool = False,
  layout: Layout | None = None,
  remote: Callable[[SamplingOptions], Sampler] | None = None,
) -> Sampler:
  """The sampler that the options ask for: a remote engine if there is one, continuous batching with rows, else batches.

  Args:
    prompts: P of a batch of batch-synchronous sampling. prompt_length: Tp, the longest prompt, tokens.
    resume: partial completions will come (carry-over); continuous batching then compiles prefills for them.
    remote: makes a remote engine for the options.
  """
  if remote is not None:
    return remote(options)
  if options.rows:
    return ContinuousSampler(
      policy, options, rows=options.rows, prompt_length=prompt_length, resume=resume, layout=layout
    )
  return BatchSampler(policy, options, prompts=prompts, prompt_length=prompt_length, layout=layout)


def draw_rollout(
  sampler: Sampler,
  params: Params,
  tokens: np.ndarray,
  valid: np.ndarray,
  key: jax.Array,
  *,
  first_row: int = 0,
  limits: np.ndarray | None = None,
) -> Rollout:
  """What `rspo_jax.rollout.sampling.sample` returns, from any sampler and for any number of prompts.

  Args:
    tokens: [P, Tp] int32, left-padded prompts; valid: [P, Tp] bool.
    first_row: number of the first completion. limits: [B] int32, most tokens of each, or None.
  Returns:
    A `Rollout` of numpy arrays.
  """
  samples, new = sampler.options.samples_per_prompt, sampler.options.max_new_tokens
  prompts = [row[mask] for row, mask in zip(np.asarray(tokens), np.asarray(valid), strict=True)]
  queue = new_completions(prompts, samples, first=first_row, limits=new if limits is None else np.asarray(limits))
  return to_rollout(sampler.draw(params, queue, key), np.shape(tokens)[1], new)


def _cache_sizes(platform: str, options: SamplingOptions) -> int:
  """Measured on CPUs only: 4 sizes pay from 32 new tokens on; below, compiling them costs more than they save."""
  return 4 if platform == "cpu" and options.max_new_tokens >= 32 else 1
