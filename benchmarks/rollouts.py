"""Samplers where lengths have a long tail: batch-synchronous, continuous, and continuous with partial rollouts."""

import functools
from typing import Any

import jax
import numpy as np

from benchmarks.ours import CONFIG, make_setup
from benchmarks.sizes import PROMPT_TOKENS, PROMPTS
from benchmarks.timing import clocked
from rspo_jax import mesh
from rspo_jax.rollout.completions import begin
from rspo_jax.rollout.continuous import ContinuousSampler
from rspo_jax.rollout.sampling import SamplingOptions, sample

STEP, ROWS, MEDIAN, LONGEST = 4 * PROMPTS, PROMPTS, 32, 256


def rollout_speed(rounds: int = 5, devices: int | None = None) -> dict[str, Any]:
  """Continuous batching against the batch-synchronous sampler, and partial rollouts against continuous batching.

  256 prompts of 32 tokens; lengths are log-normal, cut off at 8 times their median of 32. All decode 64 rows at once:
  the synchronous sampler four batches one after the other, the continuous one whatever is next. With partial rollouts
  64 completions more are under way, and a call ends when 256 are through; what is left goes on in the next call. The
  three take turns.

  Returns:
    {"ratio": [[cpu, wall], ...] of synchronous over continuous, "carried": [wall, ...] of continuous over carried, both
    per token, "tokens": drawn by each, "seconds": [[synchronous, continuous], ...], "same": share of completions that
    are equal}.
  """
  made = make_setup(devices, split="expert")
  rng = np.random.default_rng(0)

  def lengths(count):
    return np.clip(np.exp(rng.normal(np.log(MEDIAN), 1.0, count)), 1, LONGEST).astype(np.int32)

  limits = lengths(STEP)
  tokens = rng.integers(0, CONFIG.vocab_size, (STEP, PROMPT_TOKENS)).astype(np.int32)
  valid, key, options = np.ones(tokens.shape, bool), jax.random.key(1), SamplingOptions(max_new_tokens=LONGEST)
  run = jax.jit(functools.partial(sample, made.policy, options=options))
  engine = functools.partial(
    ContinuousSampler,
    made.policy,
    options,
    rows=ROWS,
    prompt_length=PROMPT_TOKENS,
    buckets=(PROMPT_TOKENS,),
    layout=made.layout,
  )
  plain, resume = engine(), engine(resume=True)

  def synchronous():
    parts = []
    for first in range(0, STEP, ROWS):
      part = slice(first, first + ROWS)
      placed = mesh.put_batch((tokens[part], valid[part], limits[part]), made.layout)
      parts.append(jax.device_get(run(made.state.params, *placed[:2], key, first_row=first, limits=placed[2])))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)

  def continuous():
    return plain(made.state.params, tokens, valid, key, limits=limits)

  left, begun = [], 0

  def carried():
    nonlocal left, begun
    fresh = STEP + ROWS - len(left)
    waiting = left + [
      begin(begun + i, tokens[(begun + i) % STEP], int(limit)) for i, limit in enumerate(lengths(fresh))
    ]
    begun += fresh
    before = sum(len(completion.tokens) for completion in left)
    through = 0

    def after(news):
      nonlocal through
      through += len(news)
      return None if through >= STEP else ()

    found = resume.draw(made.state.params, waiting, key, after=after)
    left = [completion for completion in found if not completion.done]
    return sum(len(completion.tokens) for completion in found) - before

  wanted, found = synchronous(), continuous()
  same = np.all(wanted.tokens == found.tokens, axis=1).mean()
  drawn = int(found.action_mask.sum())
  for _ in range(3):
    carried()  # until as much is left as always will be
  spent, per_token = [], []
  for _ in range(rounds):
    spent.append((clocked(synchronous)(), clocked(continuous)()))
    counts: list[int] = []
    of_carried = clocked(lambda counts=counts: counts.append(carried()))()
    per_token.append((spent[-1][1].wall / drawn) / (of_carried.wall / counts[-1]))
  return {
    "ratio": [(a.cpu / b.cpu, a.wall / b.wall) for a, b in spent],
    "carried": per_token,
    "seconds": [(a.wall, b.wall) for a, b in spent],
    "tokens": drawn,
    "same": float(same),
  }
