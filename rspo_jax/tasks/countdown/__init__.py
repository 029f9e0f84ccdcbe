"""Countdown: reach a target with the given numbers, each used once. Problems, their answers and how they are made.

`rspo_jax.tasks.countdown.dataset` keeps generated problems as a TFDS data set; it is imported on its own because TFDS
is slow to import.
"""

from rspo_jax.tasks.countdown.generate import (
  CountdownSpec,
  Worked,
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
  "Verdict",
  "Worked",
  "check",
  "demonstration",
  "make_problems",
  "prompt_text",
  "solutions",
  "wrong_demonstration",
]
