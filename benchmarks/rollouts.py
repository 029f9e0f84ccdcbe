"""Sampling of completions with long-tailed lengths: batch-synchronous, continuous, and with partial rollouts."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks.ours import Setup, make_setup
from benchmarks.sizes import PROMPT_TOKENS, PROMPTS
from benchmarks.timing import clocked
from rspo_jax.rollout.completions import Completion, new_completion
from rspo_jax.rollout.samplers import Sampler, draw_rollout, make_sampler
from rspo_jax.rollout.token_sampling import SamplingOptions
from rspo_jax.types import Params

CALL, ROWS, MEDIAN, LONGEST = 4 * PROMPTS, PROMPTS, 32, 256  # completions of a call, rows, tokens, tokens


class _PartialRollouts:
  """Calls that end when CALL of CALL + ROWS completions are done; the others continue in the next call."""

  def __init__(self, sampler: Sampler, params: Params, prompts: np.ndarray, lengths: Callable[[int], np.ndarray]):
    self._sampler, self._params, self._prompts, self._lengths = sampler, params, prompts, lengths
    self._partial: list[Completion] = []
    self._begun = 0
    self.sampled = 0  # tokens of the last call

  def __call__(self) -> list[Completion]:
    count = CALL + ROWS - len(self._partial)
    new = [
      new_completion(number, self._prompts[number % CALL], int(limit))
      for number, limit in enumerate(self._lengths(count), start=self._begun)
    ]
    self._begun += count
    before = sum(len(completion.tokens) for completion in self._partial)
    done = 0

    def on_finished(finished: list[Completion]) -> Sequence[Completion] | None:
      nonlocal done
      done += len(finished)
      return None if done >= CALL else ()

    completions = self._sampler.draw(self._params, self._partial + new, jax.random.key(1), on_finished=on_finished)
    self._partial = [completion for completion in completions if not completion.done]
    self.sampled = sum(len(completion.tokens) for completion in completions) - before
    return completions


def rollout_speed(rounds: int = 5, devices: int | None = None) -> dict[str, Any]:
  """Continuous batching relative to batch-synchronous sampling, and partial rollouts relative to continuous batching.

  256 prompts of 32 tokens; lengths are log-normal, truncated at 8 times their median of 32. Every mode decodes 64 rows
  together: the batch-synchronous sampler samples four batches one after the other, the continuous one refills rows.
  With partial rollouts 64 more completions are in progress, and a call ends when 256 are done; the others continue in
  the next call. The three alternate.

  Returns:
    {"ratio": [[cpu, wall], ...] of batch-synchronous relative to continuous, "partial": [...] tokens per second of
    partial rollouts relative to continuous batching, "tokens_per_second": of continuous batching, "tokens": per call of
    the first two, "equal": fraction of completions that are equal}.
  """
  setup = make_setup(devices)
  rng = np.random.default_rng(0)

  def lengths(count: int) -> np.ndarray:
    return np.clip(np.exp(rng.normal(np.log(MEDIAN), 1.0, count)), 1, LONGEST).astype(np.int32)

  limits = lengths(CALL)
  tokens = rng.integers(0, setup.config.vocab_size, (CALL, PROMPT_TOKENS)).astype(np.int32)
  valid = np.ones(tokens.shape, bool)
  batch, continuous = _sampler(setup), _sampler(setup, rows=ROWS)
  partial = _PartialRollouts(_sampler(setup, rows=ROWS, resume=True), setup.state.params, tokens, lengths)

  def draw(sampler: Sampler) -> Any:
    return draw_rollout(sampler, setup.state.params, tokens, valid, jax.random.key(1), limits=limits)

  of_batch, of_continuous = draw(batch), draw(continuous)
  sampled = int(of_continuous.action_mask.sum())
  for _ in range(3):
    partial()  # until the number of completions that are left over is stationary
  runs, partial_ratios = [], []
  for _ in range(rounds):
    runs.append((clocked(lambda: draw(batch))(), clocked(lambda: draw(continuous))()))
    of_partial = clocked(partial)()
    partial_ratios.append((partial.sampled / of_partial.wall) / (sampled / runs[-1][1].wall))
  return {
    "ratio": [(synchronous.cpu / refilled.cpu, synchronous.wall / refilled.wall) for synchronous, refilled in runs],
    "partial": partial_ratios,
    "tokens_per_second": sampled / statistics.median(refilled.wall for _, refilled in runs),
    "tokens": sampled,
    "equal": float(np.all(of_batch.tokens == of_continuous.tokens, axis=1).mean()),
  }


def _sampler(setup: Setup, rows: int = 0, resume: bool = False) -> Sampler:
  options = SamplingOptions(max_new_tokens=LONGEST, rows=rows)
  return make_sampler(
    setup.policy, options, prompts=ROWS, prompt_length=PROMPT_TOKENS, resume=resume, layout=setup.layout
  )
