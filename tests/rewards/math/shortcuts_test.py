"""math-verify with the short cuts against math-verify without them: parsing and equality."""

import pytest
import sympy
from math_verify import grader, parser, verify

from rspo_jax.rewards.math import shortcuts
from rspo_jax.rewards.math.equivalence import prepare
from rspo_jax.rewards.math.shortcuts import (
  _SCALES,
  PSParser,
  _differ,
  _Latex2Sympy,
  _misses,
  _parse_exactly,
  _parse_number_exactly,
  _Point,
  _simplified_equal_exactly,
  _solution,
  _solved_equal_exactly,
)
from tests.support.math_cases import PREPARED, STRICTER, plain

WRITTEN = [gold for pair in PREPARED + STRICTER for gold in pair]


def restore(monkeypatch):
  """Restores the functions that the short cuts replace."""
  monkeypatch.setattr(PSParser, "math", _parse_exactly)
  monkeypatch.setattr(_Latex2Sympy, "parse_number", _parse_number_exactly)
  monkeypatch.setattr(grader, "sympy_symbolic_eq", _simplified_equal_exactly)
  monkeypatch.setattr(grader, "sympy_solve_and_compare", _solved_equal_exactly)
  parser.parse_latex_cached.cache_clear()
  parser.extract_latex.cache_clear()


SAME_KINDS = ["2x+3", "7y+9", r"\frac{dx}{dt}=2", r"\frac{ds}{dt}=3", r"\max(3, 5)", r"\min(7, 1)", "2x+3"]
UNREADABLE = [r"\frac{1}{", "x+", "5§", "x)"]
SUB_AND_SUPER = [
  "x_1^2",
  "x^2_1",
  "x_{a^2}^{b_1}",
  "x^3 - 2x^2 + x - 1",
  r"C_1 e^{-t}\pm C_2^2",
  "52_8",
  r"\{1\pm\sqrt{5}, 2\}",
]
OF_SETS = [r"\{1,2\}", "2 < x \\le 3", r"[1,2) \cup (3,\infty)", "007", "1,000", "1.50", ".5", r"12\%"]


@pytest.mark.parametrize("answers", [[text] for text in WRITTEN + UNREADABLE + SUB_AND_SUPER + OF_SETS] + [SAME_KINDS])
def test_short_cuts_parse_as_math_verify_does(monkeypatch, answers):
  prepared = [prepare(answer) for answer in answers]
  fast = [[sympy.srepr(part) for part in plain(answer)] for answer in prepared]
  restore(monkeypatch)
  assert [[sympy.srepr(part) for part in plain(answer)] for answer in prepared] == fast


EQUAL = [  # equal at every point
  (r"\sin^2 x+\cos^2 x", "1"),
  (r"\sqrt{x^2}", "|x|"),
  (r"\frac{x^2-1}{x-1}", "x+1"),
  ("(x-y)^2", "x^2-2xy+y^2"),
  (r"\lfloor\log_2 8\rfloor+x", "x+3"),
  (r"\lfloor 0.1+0.2+0.7\rfloor+x", "x+1"),
  (r"\lfloor\frac{\ln 243}{\ln 3}\rfloor+x", "x+5"),
  (r"x\sin(\pi)", r"2x\sin(\pi)"),
  ("0.1+0.2", "0.3"),
  (r"\sqrt{3+2\sqrt{2}}", r"1+\sqrt{2}"),
  (r"\frac{n!}{(n-1)!}+1", "n+1"),
  (r"\binom{2n}{n}", r"\frac{(2n)!}{n!n!}"),
  (r"\tan x", r"\frac{\sin x}{\cos x}"),
  ("f(x+1)+f(2)", "f(2)+f(1+x)"),
  ("e^{a+b}", "e^a e^b"),
  (r"\sin(\pi)+x+1", "x+1"),
  (r"\frac{1}{b-a}", r"-\frac{1}{a-b}"),
  ("2^{n-1}", r"\frac{2^n}{2}"),
  ("(-8)^{1/3}+x", "2(-1)^{1/3}+x"),
  ("y=2x+3", "2y=4x+6"),
  ("y=2x+3", r"x=\frac{y-3}{2}"),
  ("y=2x+3", "3(y-2x-3)=0"),
  ("y=0.1x+0.2x", "y=0.3x"),
  ("x^2+y^2=1", "2x^2+2y^2=2"),
  ("x^2+y^2=-1", "x^2+y^2=-2"),  # without solutions
  ("n=n", "m=m+1"),
  ("xy=0", "2xy=0"),
  (r"m \dot{v}+bv=f", r"f=bv+m \dot{v}"),
]
UNEQUAL = [  # different at some point
  ("x^2+1", "x^2+2"),
  (r"\frac{1}{2}mv^2", "mv^2"),
  (r"e^{-t}\cos(\omega t)", r"e^{-t}\sin(\omega t)"),
  (r"\frac{n(n+1)}{2}", r"\frac{n(n-1)}{2}"),
  (r"\lfloor n/2\rfloor", r"\lfloor n/3\rfloor"),
  (r"\binom{2n}{n}", r"\binom{3n}{n}"),
  ("f(x)+1", "f(x)+2"),
  (r"\sqrt{x^2}", "-x"),
  ("y=2x+3", "y=2x+4"),
  ("y=2x+3", "x=2y+3"),
  ("x=5", "x=6"),
  ("x=5", "2x=10"),  # math-verify compares no solutions of equations in one symbol
  ("f(x)=2x", "f(x)=3x"),
  (r"m \dot{v}+bv=f", r"m \dot{v}+2bv=f"),
]
NO_SHORT_CUT = [  # unequal by math-verify alone
  ("0.1x+0.2x", "0.3x"),
  ("abc+1", r"\text{abc}+1"),
  ("50\\%+x", "x+50"),
  ("x^2+y^2=1", "x^2+y^2=2"),
  ("y=xe", r"y=x\text{e}"),
  ("a=bc", r"a=\text{bc}"),
]


@pytest.mark.parametrize(("gold", "answer"), EQUAL + UNEQUAL + NO_SHORT_CUT)
def test_short_cuts_equate_the_same_pairs_as_math_verify(monkeypatch, gold, answer):
  pairs = [(gold, answer), (answer, gold), (f"(1, {gold})", f"(1, {answer})")]
  fast = [verify(plain(one), plain(other)) for one, other in pairs]
  restore(monkeypatch)
  assert [verify(plain(one), plain(other)) for one, other in pairs] == fast
  assert fast[0] == ((gold, answer) in EQUAL)


@pytest.mark.parametrize(("gold", "answer"), UNEQUAL)
def test_pairs_that_differ_at_a_point_are_neither_simplified_nor_solved(monkeypatch, gold, answer):
  for name in ("_simplified_equal_exactly", "_solved_equal_exactly"):
    monkeypatch.setattr(shortcuts, name, lambda *_: pytest.fail("slow path"))
  assert not verify(plain(gold), plain(answer))


@pytest.mark.parametrize("scale", _SCALES)
def test_equal_pairs_do_not_differ_at_any_point(scale):
  for gold, answer in EQUAL:
    one, other = plain(gold)[0], plain(answer)[0]
    if isinstance(one, sympy.Eq):
      solution = _solution(one)
      assert not solution or not _misses(other, *solution, _Point(scale)), (gold, answer)
    else:
      assert not _differ(one, other, _Point(scale)), (gold, answer)
