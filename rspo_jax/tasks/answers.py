"""The final answer in a text: in a box, after four hashes, or the last number."""

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

How = Literal["boxed", "####", "number", "none"]


FORMS: tuple[How, ...] = ("boxed", "####", "number")  # in order of precedence


_BRACE = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)


# Digits that are no number of their own stay out: an index, a power, part of a word, the base of a power.
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
  """answer: as written, stripped; None if there is none. how: where it stood."""

  answer: str | None
  how: How


def extract_answer(text: str, forms: Sequence[How] = FORMS) -> Extracted:
  r"""The answer of a completion: the first of these that is there and not empty.

  1. 'boxed': in the last \boxed{} or \fbox{} whose braces balance.
  2. '####': the first line of what follows the last ####.
  3. 'number': the last number: sign, decimals, thousands, percent, a/b or \frac of whole numbers.

  Args:
    text: of any length; takes time linear in it.
    forms: those that count.
  """
  finders = {"boxed": _last_box, "####": _after_hashes, "number": _last_number}
  for how in FORMS:
    if how in forms and (answer := finders[how](text).strip()):
      return Extracted(answer, how)
  return Extracted(None, "none")


def _last_box(text: str) -> str:
  opened, last, content = [], -1, ""
  for match in _BRACE.finditer(text):
    token = match[0]
    if token == "}":
      start, inside = opened.pop() if opened else (-1, 0)
      if start > last and text[inside : match.start()].strip():
        last, content = start, text[inside : match.start()]
    elif token.endswith("{") and token != r"\{":
      opened.append((match.start() if len(token) > 1 else -1, match.end()))
  return content


def _after_hashes(text: str) -> str:
  _, found, after = text.rpartition("####")
  return after.strip().partition("\n")[0] if found else ""


def _last_number(text: str) -> str:
  numbers = _NUMBER.findall(text)
  return numbers[-1] if numbers else ""
