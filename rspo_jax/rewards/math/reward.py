"""Extraction of the answer from a completion, and comparison by math-verify in worker processes with a time limit."""

import pathlib
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from rspo_jax.data.examples import Example
from rspo_jax.rewards.base import BatchReward, RewardResult
from rspo_jax.rewards.worker_pool import Outcome, WorkerPool
from rspo_jax.tasks.answers import FORMS, AnswerForm, extract_answer

Reason = Literal["right", "wrong", "no answer", "unparsed", "timeout", "failed"]

_SHORTCUTS = str(pathlib.Path(__file__).with_name("shortcuts.py"))  # loaded by its file: the package imports JAX


class MathVerdict(NamedTuple):
  """The verdict on one completion.

  Attributes:
    success: its answer is correct.
    reason: 'right'; 'wrong'; 'no answer' in the text; 'unparsed', math-verify cannot read the answer or the gold one
      and they are not the same text; 'timeout'; 'failed', math-verify raised or ended its worker.
    form: how the text marked the answer.
    answer: as written; '' for none.
  """

  success: bool
  reason: Reason
  form: AnswerForm
  answer: str = ""


def gold_answers(gold: Any) -> tuple[str, ...]:
  """The alternatives of a gold answer; an answer is correct if it equals any of them.

  Args:
    gold: LaTeX, or a sequence of alternatives, each LaTeX or a sequence of parts that are all required, in any order.
  Raises:
    ValueError: anything else, or no alternative, or an empty one.
  """
  alternatives = [gold] if isinstance(gold, str) else gold
  if isinstance(alternatives, list | tuple) and alternatives:
    joined = [part if isinstance(part, str) else ", ".join(map(str, part)) for part in alternatives]
    if all(part.strip() for part in joined):
      return tuple(joined)
  raise ValueError(
    f"a gold answer is {gold!r}; want LaTeX text, or a sequence of alternatives, each a text or a sequence of parts."
  )


class MathReward(BatchReward):
  """1 for a correct answer, format_reward for an incorrect one that is marked and readable, else 0.

  An answer in a box or after #### is marked. A pool of workers compares the answers of a batch; equal pairs of gold
  answer and answer are compared once. A context manager; workers also end with the process that started them.
  docs/math_rewards.md.
  """

  def __init__(
    self,
    *,
    format_reward: float = 0.0,
    forms: Sequence[AnswerForm] = FORMS,
    workers: int = 2,
    timeout: float = 5.0,
    recycle: int = 10_000,
  ):
    """Starts the workers.

    Args:
      format_reward: in [0, 1).
      forms: of `FORMS`: the forms of answers that are accepted.
      workers, timeout, recycle: see `WorkerPool`; timeout is in seconds, per answer and gold alternative.
    Raises:
      ValueError: a setting out of range.
    """
    if not 0.0 <= format_reward < 1.0:
      raise ValueError(f"format_reward is {format_reward}; want a value in [0, 1), less than a correct answer earns.")
    if not forms or set(forms) - set(FORMS):
      raise ValueError(f"forms is {forms!r}; want one or more of {', '.join(FORMS)}.")
    self._format_reward, self._forms = format_reward, tuple(forms)
    self._pool = WorkerPool(
      "rspo_jax.rewards.math.equivalence:load", argument=_SHORTCUTS, workers=workers, timeout=timeout, recycle=recycle
    )

  def close(self) -> None:
    self._pool.close()

  def score_batch(self, texts: Sequence[str], examples: Sequence[Example]) -> list[RewardResult]:
    """Results of texts[i] for examples[i]; golds as in `gold_answers`, which raises ValueError for others."""
    results = []
    for verdict in self.verdicts(texts, [example.gold for example in examples]):
      marked = verdict.form in ("boxed", "####") and verdict.reason in ("right", "wrong")
      reward = 1.0 if verdict.success else self._format_reward if marked else 0.0
      results.append(RewardResult(reward, verdict.success, marked, verdict.reason, verdict.answer))
    return results

  def verdicts(self, texts: Sequence[str], golds: Sequence[Any]) -> list[MathVerdict]:
    """As `score_batch`, with gold answers in place of examples."""
    alternatives_of = [gold_answers(gold) for gold in golds]
    extracted = [extract_answer(text, self._forms) for text in texts]
    pairs = dict.fromkeys(
      (gold, answer)
      for (answer, _), alternatives in zip(extracted, alternatives_of, strict=True)
      if answer is not None
      for gold in alternatives
    )
    reason_of = dict(zip(pairs, map(_reason, self._pool.map(list(pairs))), strict=True))
    verdicts = []
    for (answer, form), alternatives in zip(extracted, alternatives_of, strict=True):
      reasons = [reason_of[gold, answer] for gold in alternatives] if answer is not None else ["no answer"]
      chosen = min(reasons, key=_PRECEDENCE.index)
      verdicts.append(MathVerdict(chosen == "right", chosen, form, answer or ""))
    return verdicts


# With several alternatives, the verdict is the first of these that occurs.
_PRECEDENCE: tuple[Reason, ...] = ("right", "timeout", "failed", "unparsed", "wrong", "no answer")


def _reason(outcome: Outcome) -> Reason:
  return {"ok": outcome.value, "timeout": "timeout"}.get(outcome.status, "failed")
