"""F3: how good a policy is on problems it was not trained on."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from rspo_jax.data import Example
from rspo_jax.rewards import Reward, Scores, score_completions


class Completions(NamedTuple):
  """Completions of examples, prompt-major: k texts of the first example, then of the second.

  Attributes:
    texts: N * k strings. tokens: [N * k] int, length in tokens. scores: their rewards.
    samples: k.
  """

  texts: tuple[str, ...]
  tokens: np.ndarray
  scores: Scores
  samples: int

  @property
  def success(self) -> float:
    """avg@k: mean success over problems and samples."""
    return float(self.scores.success.mean())


def complete(
  generate: Callable[[Sequence[Example], int], tuple[list[str], np.ndarray]],
  reward: Reward,
  examples: Sequence[Example],
  *,
  samples: int,
  batch_problems: int,
) -> Completions:
  """Completes every example and judges the completions.

  Args:
    generate: (`batch_problems` examples, number of the first of them) -> texts and token counts, `samples` of each.
    reward: judges them.
    examples: N of them; the last batch is filled up with repetitions, which are thrown away.
    samples: k. batch_problems: examples per call of `generate`.
  Raises:
    ValueError: no examples.
  """
  if not examples:
    raise ValueError("there are no examples to evaluate on; check the data set's held-out split.")
  texts: list[str] = []
  tokens: list[np.ndarray] = []
  for first in range(0, len(examples), batch_problems):
    batch = list(examples[first : first + batch_problems])
    filled = [batch[i % len(batch)] for i in range(batch_problems)]
    some_texts, some_tokens = generate(filled, first)
    texts += some_texts[: len(batch) * samples]
    tokens.append(some_tokens[: len(batch) * samples])
  repeated = [example for example in examples for _ in range(samples)]
  return Completions(tuple(texts), np.concatenate(tokens), score_completions(reward, texts, repeated), samples)
