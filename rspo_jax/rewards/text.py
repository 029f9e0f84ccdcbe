"""Rewards computed from the text alone: its form, repetitions, length, and exact match with the gold answer."""

import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import re2

from rspo_jax.data.examples import Example
from rspo_jax.objectives.penalties import overlong_penalty
from rspo_jax.rewards.base import RewardResult
from rspo_jax.tasks.answers import extract_answer

# Scripts that are written without spaces: Thai, Lao, Tibetan, Burmese, Khmer, kana, Chinese characters.
_UNSPACED = "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_UNIT = re.compile(rf"[{_UNSPACED}]|[^\s{_UNSPACED}]+")
_SIDES = ".,:;!?¡¿…·。、，；：！？\"'`*_“”‘’«»‹›„「」『』《》"


def _thought(text: str, opened: bool) -> str | None:
  """The text after its only <think>...</think>, with which it must begin; None for any other form."""
  before, begin, rest = ("", "<think>", text) if opened else text.partition("<think>")
  inside, end, after = rest.partition("</think>")
  tags = any(tag in part for part in (inside, after) for tag in ("<think>", "</think>"))
  return None if before.strip() or not (begin and end) or tags else after.strip()


def _thought_and_answer(text: str, opened: bool) -> str | None:
  """As `_thought`, with the answer in <answer>...</answer> and nothing after it."""
  answer = _thought(text, opened)
  if answer is None or not (answer.startswith("<answer>") and answer.endswith("</answer>")):
    return None
  answer = answer.removeprefix("<answer>").removesuffix("</answer>").strip()
  return None if "<answer>" in answer or "</answer>" in answer else answer


FORMS: dict[str, Callable[[str, bool], str | None]] = {"think": _thought, "think_answer": _thought_and_answer}


class FormatReward:
  """1 for a completion of the requested form, else 0; `success` and `format` are equal.

  Regular expressions run on RE2, which matches in time linear in the text, so no completion can make it hang.
  """

  def __init__(self, *, form: str = "", pattern: str = "", opened: bool = False):
    """Takes exactly one of form and pattern.

    Args:
      form: of `FORMS`. 'think' is <think>...</think> and an answer; 'think_answer' has it in <answer>...</answer>
        (arXiv 2501.12948). White space around the parts is ignored; every tag occurs once; the answer is not empty.
      pattern: a regular expression in RE2's syntax (no backreferences, no lookaround) that the whole completion
        matches; the dot matches line ends too. The text of a group named `answer` is the answer.
      opened: the prompt ends with <think>, so the completion does not begin with it.
    Raises:
      ValueError: none or both of form and pattern, an unknown form, or an expression that RE2 cannot compile.
    """
    if bool(form) == bool(pattern) or (form and form not in FORMS) or (pattern and opened):
      raise ValueError(
        f"form is {form!r}, pattern {pattern!r} and opened {opened}; want a form of {', '.join(FORMS)}, or a pattern "
        "without opened."
      )
    self._form, self._opened, self._pattern = form, opened, None
    if pattern:
      options = re2.Options()
      options.dot_nl, options.log_errors = True, False
      try:
        self._pattern = re2.compile(pattern, options)
      except re2.error as error:
        raise ValueError(
          f"pattern is {pattern!r}, which RE2 cannot compile ({error}). It has no backreferences and no lookaround; "
          "write the form without them, or as a reward of your own."
        ) from error

  def __call__(self, text: str, example: Example) -> RewardResult:
    del example
    formed, answer = False, None
    if self._pattern is None:
      answer = FORMS[self._form](text, self._opened)
      formed = bool(answer)
    elif match := self._pattern.fullmatch(text.encode("utf-8", "replace").decode()):  # UTF-8 has no lone surrogates
      formed, answer = True, match.groupdict().get("answer")
    return RewardResult(float(formed), formed, formed, "formed" if formed else "malformed", (answer or "").strip())


def repeated_share(text: str, ngram: int) -> float:
  """The share of a text's n-grams that repeat an earlier one, in [0, 1); 0 for a text of fewer than `ngram` units.

  Units are words, ignoring case, and single characters of scripts that are written without spaces.
  """
  units = _UNIT.findall(text.casefold())
  total = len(units) - ngram + 1
  return 0.0 if total < 1 else 1 - len({tuple(units[i : i + ngram]) for i in range(total)}) / total


def repetition_reward(text: str, example: Example, *, ngram: int = 4, max_penalty: float = 1.0) -> RewardResult:
  """-max_penalty times `repeated_share`: 0 for a text without repetitions, near -max_penalty for one long repetition.

  It ignores the answer: `success` and `format` are always true.

  Args:
    ngram: length of a repetition in units, >= 1.
    max_penalty: in the reward's unit, finite, >= 0.
  Raises:
    ValueError: a setting out of range.
  Source: Yeo et al., "Demystifying Long Chain-of-Thought Reasoning in LLMs", arXiv 2502.03373, appendix C.2.
  """
  del example
  if ngram < 1 or not 0 <= max_penalty < float("inf"):
    raise ValueError(f"ngram is {ngram} and max_penalty {max_penalty}; want ngram >= 1 and a finite max_penalty >= 0.")
  return RewardResult(-max_penalty * repeated_share(text, ngram), True, True)


class LengthReward:
  """DAPO's soft penalty for completions near the length limit, in tokens: see `penalties.overlong_penalty`.

  In [-penalty, 0]. It ignores the answer: `success` and `format` are always true; the reason is 'overlong' or ''.

  Source: DAPO, arXiv 2503.14476, eq. 13.
  """

  needs_lengths = True

  def __init__(self, *, max_length: int, buffer: int, penalty: float = 1.0):
    """Checks the settings.

    Args:
      max_length: tokens, as `config.sampling.max_new_tokens`.
      buffer: tokens before max_length over which the reward falls linearly to -penalty.
      penalty: in the reward's unit.
    Raises:
      ValueError: a setting out of range.
    """
    self._limits = {"max_length": max_length, "buffer": buffer, "penalty": penalty}
    overlong_penalty(np.zeros(1), **self._limits)

  def score_batch(
    self, texts: Sequence[str], examples: Sequence[Example], lengths: Sequence[int] | None = None
  ) -> list[RewardResult]:
    """Penalties from the lengths alone; ValueError if lengths is None."""
    if lengths is None:
      raise ValueError(
        "The length reward needs the lengths of the completions in tokens: score_completions(..., lengths=lengths)."
      )
    penalties = np.asarray(overlong_penalty(np.asarray(lengths), **self._limits)).tolist()
    return [RewardResult(penalty, True, True, "overlong" if penalty < 0 else "") for penalty in penalties]


def normalized(answer: str) -> str:
  """An answer in the form that `exact_match_reward` compares.

  Unicode's NFKC and case folding, without invisible characters, white space as single spaces, and without sentence
  punctuation, quotes and emphasis at both ends (the point of .5 is kept).
  """
  folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", answer).casefold())
  folded = " ".join("".join(c for c in folded if unicodedata.category(c) != "Cf").split())
  bare = folded.strip(_SIDES + " ")
  before = folded[: folded.index(bare)]
  if before.endswith((".", ",")) and bare[:1].isdigit():
    bare = before[-1] + bare
  return bare or folded


PLACES = ("boxed", "####", "last_line", "all")  # in order of precedence


def _find(text: str, place: str) -> str:
  """The text in one of `PLACES`, stripped; '' if there is none."""
  if place == "last_line":
    return text.strip().rpartition("\n")[2].strip()
  return text.strip() if place == "all" else extract_answer(text, (place,)).answer or ""


def exact_match_reward(
  text: str, example: Example, *, answer_in: str | Sequence[str] = "all", format_reward: float = 0.0
) -> RewardResult:
  """1 if the answer equals a gold answer after `normalized`, format_reward for any other answer, 0 for none.

  For words in any language; use the math reward for numbers and formulas.

  Args:
    example: its gold is a text, or a sequence of alternatives.
    answer_in: one or several of `PLACES`; the first of them that is not empty, in the order of `PLACES`, is the answer.
      'boxed': the last box; '####': the line after the last ####; 'last_line'; 'all': the whole completion.
    format_reward: in [0, 1), for an incorrect answer.
  Raises:
    ValueError: a setting out of range, or a gold that is not text.
  """
  places = (answer_in,) if isinstance(answer_in, str) else tuple(answer_in)
  if not places or set(places) - set(PLACES) or not 0.0 <= format_reward < 1.0:
    raise ValueError(
      f"answer_in is {answer_in!r} and format_reward {format_reward}; want one or more of {', '.join(PLACES)}, and a "
      "format_reward in [0, 1)."
    )
  golds = _golds(example.gold)
  answer = next(filter(None, (_find(text, place) for place in PLACES if place in places)), "")
  if not answer:
    return RewardResult(0.0, False, False, "no answer")
  correct = normalized(answer) in map(normalized, golds)
  return RewardResult(1.0 if correct else format_reward, correct, True, "right" if correct else "wrong", answer)


def _golds(gold: Any) -> Sequence[str]:
  golds = [gold] if isinstance(gold, str) else gold
  if isinstance(golds, list | tuple) and golds and all(isinstance(text, str) and text.strip() for text in golds):
    return golds
  raise ValueError(f"a gold answer is {gold!r}; want a nonempty text, or a sequence of alternatives.")
