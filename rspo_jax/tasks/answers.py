"""The final answer in a text: in a box, after four hashes, or the last number."""

import re
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

AnswerForm = Literal["boxed", "####", "number", "none"]

FORMS: tuple[AnswerForm, ...] = ("boxed", "####", "number")  # in order of precedence

_BRACE = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)

# Excluded, since they are not numbers by themselves: digits of an index, a power, a word, or the base of a power.
_NUMBER = re.compile(
  r"""(?:(?<![\w)}\]])[-+−])?(?<![\w.^\\])(?<![\^_]\{)
      (?:(?:\d+\s*)?\\[dt]?frac\s*\{-?\d+\}\s*\{\d+\}
        |(?:\d+\ )?\d+/\d+
        |(?:\d{1,3}(?:(?:,|\{,\}|,?\\!|\\,)\d{3})+(?![\d])|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?
        |\.\d+)
      (?:\s?\\?%)?(?![\d{]|\^(?!\{?\\circ))""",
  re.VERBOSE,
)


class Extracted(NamedTuple):
  """An extracted answer.

  Attributes:
    answer: as written, stripped; None if the text has none.
    form: how the text marks it; 'none' if there is none.
  """

  answer: str | None
  form: AnswerForm


def extract_answer(text: str, forms: Sequence[AnswerForm] = FORMS) -> Extracted:
  r"""The answer of a completion: the first of these that is present and not empty.

  1. 'boxed': in the last \boxed{} or \fbox{} whose braces balance.
  2. '####': the first line after the last ####.
  3. 'number': the last number: sign, decimals, thousands, percent, a/b or \frac of whole numbers.

  Args:
    text: of any length; the time is linear in it.
    forms: the forms that are accepted.
  """
  finders = {"boxed": _last_box, "####": _after_hashes, "number": _last_number}
  for form in FORMS:
    if form in forms and (answer := finders[form](text).strip()):
      return Extracted(answer, form)
  return Extracted(None, "none")


def balanced_boxes(text: str) -> Iterator[tuple[re.Match[str], int]]:
  r"""The \boxed{} and \fbox{} of a text whose braces balance, in the order of their closing braces.

  Yields:
    (opening, end): the match of `\boxed{` or `\fbox{`, and the index of the closing brace; the content is
    `text[opening.end() : end]`.
  """
  opened: list[re.Match[str] | None] = []  # None for a plain brace
  for match in _BRACE.finditer(text):
    token = match[0]
    if token == "}":
      if opened and (opening := opened.pop()):
        yield opening, match.start()
    elif token.endswith("{") and token != r"\{":
      opened.append(match if len(token) > 1 else None)


def _last_box(text: str) -> str:
  """Content of the box that opens last and is not empty; '' if there is none."""
  last, content = -1, ""
  for opening, end in balanced_boxes(text):
    if opening.start() > last and (inside := text[opening.end() : end].strip()):
      last, content = opening.start(), inside
  return content


def _after_hashes(text: str) -> str:
  _, hashes, after = text.rpartition("####")
  return after.strip().partition("\n")[0] if hashes else ""


def _last_number(text: str) -> str:
  numbers = _NUMBER.findall(text)
  return numbers[-1] if numbers else ""
