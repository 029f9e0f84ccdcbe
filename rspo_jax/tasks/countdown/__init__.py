"""Countdown: reach a target with the given numbers, each used once.

Belongs here: problems, the checker of answers, the generator, and in `dataset`, which is not imported here because TFDS
is slow to import, the data set on disk. Does not belong here: the reward (`rspo_jax.rewards.puzzles`) and the loader of
examples (`rspo_jax.data.datasets`).
"""

from rspo_jax.tasks.countdown.generate import (
  CountdownSpec,
  SolvedProblem,
  demonstration,
  make_problems,
  solutions,
  wrong_demonstration,
)
from rspo_jax.tasks.countdown.problem import ALPHABET, OPERATORS, Problem, Verdict, check, prompt_text

__all__ = [
  "ALPHABET",
  "OPERATORS",
  "CountdownSpec",
  "Problem",
  "SolvedProblem",
  "Verdict",
  "check",
  "demonstration",
  "make_problems",
  "prompt_text",
  "solutions",
  "wrong_demonstration",
]
