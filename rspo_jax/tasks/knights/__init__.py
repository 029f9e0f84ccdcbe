"""Knights and Knaves: find out who tells the truth and who lies.

Belongs here: problems, the checker and the parser of answers, the generator, and in `dataset`, which is not imported
here because TFDS is slow to import, the data set on disk. Does not belong here: the reward (`rspo_jax.rewards.puzzles`)
and the loader of examples (`rspo_jax.data.datasets`).
"""

from rspo_jax.tasks.knights.generate import (
  KnightsSpec,
  SolvedProblem,
  demonstration,
  key,
  make_problems,
  wrong_demonstration,
)
from rspo_jax.tasks.knights.problem import (
  ALPHABET,
  STYLES,
  Problem,
  Verdict,
  answer_text,
  check,
  check_style,
  prompt_text,
)

__all__ = [
  "ALPHABET",
  "STYLES",
  "KnightsSpec",
  "Problem",
  "SolvedProblem",
  "Verdict",
  "answer_text",
  "check",
  "check_style",
  "demonstration",
  "key",
  "make_problems",
  "prompt_text",
  "wrong_demonstration",
]
