"""Whether a mathematical answer equals the gold one. Runs in worker processes: imports math-verify and nothing of ours.

math-verify (0.9.0) decides equality. This module rewrites answers into notation that math-verify can read, and is
stricter in the few comparisons in which math-verify equates different answers; docs/math_rewards.md lists both. `load`
adds the short cuts that make it fast.
"""

import functools
import importlib.util
import logging
import math
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any, Literal, NamedTuple

import sympy
from math_verify import LatexExtractionConfig, parse, verify

Equality = Literal["right", "wrong", "unparsed"]

# Silences the warning that math-verify runs without its own timeout; the worker pool has one.
logging.getLogger("math_verify").setLevel(logging.ERROR)

_CONFIG = [LatexExtractionConfig(boxed_match_priority=0)]
_NUMBER = r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)"
_TEXT = r"\\(?:text|mathrm|mbox|textrm|textbf|textit|mathbf|mathit|operatorname)"
_BRACED = r"\{(?:[^{}]|\{[^{}]*\})*\}"
_POWER = r"(?:\^\{?-?\d\}?)?"
_WORD = r"(?:(?!infinity|hundred|thousand|million|billion|trillion|dozen)[A-Za-z]{4,}|[ckmn]m|kg|ft|in|eV|Hz|m/s)"

# Each makes one notation readable to math-verify; applied in order. Cases of each: tests/support/math_cases.py.
_PREPARATIONS = tuple(
  (re.compile(pattern), replacement)
  for pattern, replacement in (
    (r"(?<!\\)\\[()\[\]]|(?<!\\)\$", ""),  # \(5\), $5$
    (r"^[\s*]*(?:=|\\approx(?![a-zA-Z])|≈)?\s*|(?:\\[,;:! ]|[\s.,;*])+$", ""),  # = 5, **5**.
    (r"°|\\degree(?![a-zA-Z])", r"^\\circ"),
    (r"~", " "),
    (r"\{\\rm\s+([^{}]*)\}", r"\\mathrm{\1}"),
    (r"(?<=\d)\\,(?=\d{3}(?!\d))", ""),  # 12\,345
    (r"\.\s*\}", "}"),  # \text{east.}
    (rf"^{_TEXT}\s*\{{\s*\(?({_NUMBER}[^{{}}()]*)\)?\}}$", r"\1"),  # \text{5 cm}, \textbf{(073)}
    (r",?\s*(?:\\text\s*\{\s*(?:and|or)\s*\}|(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z]))\s*", ", "),
    (rf"_\s*\{{\s*{_TEXT}\s*\{{\s*([^{{}}]*?)\s*\}}\s*\}}", r"_{\1}"),  # v_{\text{max}}
    (rf"_\s*{_TEXT}\s*\{{\s*([^{{}}]*?)\s*\}}", r"_{\1}"),
    (r"_\s*(?:\{\s*\\(max|min|odot)\s*\}|\\(max|min|odot)(?![a-zA-Z]))", r"_{\1\2}"),  # M_\odot
    # Units, \text{ cm}^2 or \mathrm{~m}/\mathrm{s}: math-verify would drop all from the first \text{ to a final }.
    (rf"(?<=[\w}})\]%])(?:(?:\s|/|\\[,;: ]|\\cdot(?![a-z]))*{_TEXT}\s*{_BRACED}{_POWER})+$", ""),
    (rf"({_TEXT})\{{(?![dT]\}})", r"\1 {"),
    (r"\bnp\.(?=[a-z])", r"\\"),  # np.arcsin(10/13), as Minerva writes it
    (r"(?<![\\a-zA-Z])E_", r"\\mathrm {E}_"),  # else Euler's number, which takes no index
    (r"(?<!\{)\\gamma(?![a-zA-Z]|\s*\()", r"{\\gamma}"),  # else the function in \gamma^2-1
    (r"(?<=\d)\.(?=\s*/)", ""),  # -1./3
    (r"^([-+]?\d+)\s+(\d+)/(\d+)$", r"\1\\frac{\2}{\3}"),  # 1 1/2
    (rf"^({_NUMBER})[eE]([-+]?\d+)(?![\d.])", r"\1 \\times 10^{\2}"),  # 4.5e33
    (rf"^((?:[-+\d.,/{{}} ]|\\[dt]?frac)*[\d}}])\s+{_WORD}(?:[ /]+[A-Za-z]+)*{_POWER}$", r"\1"),  # 5 cm^2
  )
)
# For two answers of the same of these forms, math-verify's equality is exact equality.
_DECIMAL = re.compile(r"-?(?:(?:\d{1,3}(?:,\d{3}){1,5}|\d{1,18})(?:\.\d{1,6})?|\.\d{1,6})")
_RATIONAL = re.compile(r"-?(?:\d{1,18}|\d{1,18}/[1-9]\d{0,17}|\\[dt]?frac\{\d{1,18}\}\{[1-9]\d{0,17}\})")
_FRAC = re.compile(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_PERCENT = re.compile(r"\s*\\?%")
_BASED = re.compile(r"(\d+)_\{?(\d+)\}?")


def prepare(answer: str) -> str:
  """Rewrites an answer, without its box, into LaTeX that math-verify reads."""
  for pattern, replacement in _PREPARATIONS:
    answer = pattern.sub(replacement, answer)
  return answer.strip()


class _Parsed(NamedTuple):
  """An answer as math-verify parses it.

  Attributes:
    candidates: the arguments of math-verify's `verify`: expressions and the text.
    readable: the answer is mathematics, not only text.
    number: its value, if it is a single number.
    decimals: position of the first nonzero decimal of the smallest number in it; 0 if no number is below 1.
  """

  candidates: list[Any]
  readable: bool
  number: complex | None
  decimals: int


def _parse(answer: str) -> _Parsed:
  candidates = parse(rf"\boxed{{{answer}}}", _CONFIG, extraction_mode="first_match", parsing_timeout=None)
  value = next((part for part in candidates if not isinstance(part, str)), None)
  if value is None or value.has(sympy.zoo, sympy.nan):
    return _Parsed(candidates if value is None else [], False, None, 0)
  if value.has(sympy.Derivative):  # when it solves equations, math-verify takes the derivative of a letter as 0
    value = value.replace(sympy.Derivative, lambda *of: sympy.Symbol(str(of)))
    candidates = [value, *(part for part in candidates if isinstance(part, str))]
  several = isinstance(value, sympy.Set | sympy.Tuple)
  parts = value.args if several else value.flat() if isinstance(value, sympy.MatrixBase) else [value]
  numbers = [number for number in map(_number, parts) if number is not None]
  decimals = max((-math.floor(math.log10(abs(number))) for number in numbers if 0 < abs(number) < 1), default=0)
  return _Parsed(candidates, True, _number(value), decimals)


def _number(value: Any) -> complex | None:
  try:
    return complex(value) if getattr(value, "is_number", False) else None
  except (TypeError, ValueError, OverflowError):
    return None


_parse_gold = functools.lru_cache(maxsize=256)(_parse)  # the samples of a group share their gold answer


def compare(item: tuple[str, str]) -> Equality:
  """Whether an answer equals the gold one.

  Args:
    item: (gold, answer), both LaTeX without a box.
  Returns:
    'right', 'wrong', or 'unparsed' if math-verify cannot read one of them and they are not the same text.
  """
  gold, answer = map(prepare, item)
  if "%" in gold and "%" in answer:
    gold, answer = _PERCENT.sub("", gold), _PERCENT.sub("", answer)
  if gold == answer:
    return "right" if gold else "unparsed"
  for form in (_DECIMAL, _RATIONAL):
    if form.fullmatch(gold) and form.fullmatch(answer):
      return "right" if _value(gold) == _value(answer) else "wrong"
  bases = _BASED.fullmatch(gold), _BASED.fullmatch(answer)
  if all(bases):
    return "right" if bases[0].groups() == bases[1].groups() else "wrong"
  parts = [part.strip() for part in _THOUSANDS.sub("", gold).split(",")]
  if len(set(parts)) < len(parts) > answer.count(",") + 1:
    return "wrong"  # math-verify reads 3,1,1 as the set of 3 and 1
  parsed_gold, parsed_answer = _parse_gold(gold), _parse(answer)
  if _equal(parsed_gold, parsed_answer):
    return "right"
  if "%" in gold + answer:  # math-verify ignores the percent sign of whole numbers only
    return compare((_PERCENT.sub("", gold), _PERCENT.sub("", answer)))
  return "wrong" if parsed_gold.readable and parsed_answer.readable else "unparsed"


def load(path: str) -> Callable[[tuple[str, str]], Equality]:
  """`compare`, after running the module `shortcuts` from its file, which makes math-verify faster."""
  spec = importlib.util.spec_from_file_location("math_shortcuts", path)
  spec.loader.exec_module(importlib.util.module_from_spec(spec))
  return compare


def _value(number: str) -> Fraction:
  return Fraction(_FRAC.sub(r"\1/\2", number.replace(",", "")))


def _equal(gold: _Parsed, answer: _Parsed) -> bool:
  numbers = None not in (gold.number, answer.number)
  if numbers and abs(gold.number - answer.number) > 1e-5 + 1e-3 * abs(gold.number):
    return False  # far beyond any rounding; math-verify would simplify at length
  # Rounded to six decimals all numbers below 5e-7 are equal, so small gold answers add decimals.
  return verify(
    gold.candidates,
    answer.candidates,
    float_rounding=6 + gold.decimals,
    numeric_precision=15 + gold.decimals,
    timeout_seconds=None,
  )
