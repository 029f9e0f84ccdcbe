"""Knights and Knaves: who tells the truth, who lies? Problems, their answers and how they are made.

`rspo_jax.tasks.knights.dataset` keeps generated problems as a TFDS data set; it is imported on its own because TFDS is
slow to import.
"""

from rspo_jax.tasks.knights.generate import (
  KnightsSpec,
  Worked,
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
  "Verdict",
  "Worked",
  "answer_text",
  "check",
  "check_style",
  "demonstration",
  "key",
  "make_problems",
  "prompt_text",
  "wrong_demonstration",
]
