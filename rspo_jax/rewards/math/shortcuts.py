"""Makes math-verify (0.9.0) faster, once imported, and changes nothing of what it finds. Needs nothing of ours.

Most of its time goes into ANTLR, which here builds a parse tree once for all texts of the same kinds of tokens, and
into simplifying and solving what differs, which here is seen at a point: what is equal, is so at every point.
"""

import contextlib
import functools
import itertools
import math
from typing import Any

import sympy
from antlr4 import CommonTokenStream, ParserRuleContext, PredictionContextCache, Token
from antlr4.atn.ATNDeserializer import ATNDeserializer
from antlr4.atn.PredictionMode import PredictionMode
from antlr4.dfa.DFA import DFA
from antlr4.error.Errors import ParseCancellationException
from antlr4.error.ErrorStrategy import BailErrorStrategy
from antlr4.ListTokenSource import ListTokenSource
from antlr4.Token import CommonToken
from latex2sympy2_extended.antlr_parser import PSParser
from latex2sympy2_extended.gen.antlr4_13_2.PSParser import serializedATN
from latex2sympy2_extended.latex2sympy2 import _Latex2Sympy
from math_verify import grader
from sympy.core.function import AppliedUndef
from sympy.functions.elementary.hyperbolic import HyperbolicFunction
from sympy.functions.elementary.trigonometric import InverseTrigonometricFunction, TrigonometricFunction
from sympy.solvers.solvers import solve_linear

# Reading


def _parts(kinds: tuple[int, ...]) -> tuple[bool, bool, bool]:
  r"""Whether a text of these kinds of tokens may have: a sum with \pm, an index after a power, a power after an index.

  An index or a power ends with a brace, or is one token, or ends with one of which this holds.
  """
  brace, index, power = PSParser.R_BRACE, PSParser.UNDERSCORE, PSParser.CARET
  ends = [last == brace or before in (index, power) for before, last in itertools.pairwise(kinds)]
  after = {kind for end, kind in zip(ends, kinds[2:], strict=False) if end}
  return PSParser.PLUS_MINUS in kinds, index in after, power in after


@functools.cache
def _parser(plus_minus: bool, power_index: bool, index_power: bool) -> type[PSParser]:
  r"""A parser for texts without the parts that are False; the whole one reads every sum to its end, after a \pm."""
  atn = ATNDeserializer().deserialize(serializedATN())
  (atom,) = (state for state in atn.decisionToState if state.ruleIndex == PSParser.RULE_atom_expr)
  starts = (atn.ruleToStartState[PSParser.RULE_plus_minus_expr], *(branch.target for branch in atom.transitions[:2]))
  for start, wanted in zip(starts, (plus_minus, power_index, index_power), strict=True):
    if not wanted:
      start.transitions.clear()
  learnt = [DFA(state, number) for number, state in enumerate(atn.decisionToState)]
  own = {"atn": atn, "decisionsToDFA": learnt, "sharedContextCache": PredictionContextCache()}
  return type("Parser", (PSParser,), own)


@functools.lru_cache(maxsize=256)
def _tree(kinds: tuple[int, ...]) -> tuple[list[Token], ParserRuleContext | None]:
  """The tokens of these kinds, the end among them, and their parse tree; no tree for a syntax error.

  ANTLR's SLL prediction finds the tree that LL does, or a syntax error, and takes a tenth of the time; then LL it is.
  Source: PredictionMode in ANTLR's documentation.
  """
  stream = CommonTokenStream(ListTokenSource([CommonToken(type=kind) for kind in kinds]))
  parser = _parser(*_parts(kinds))(stream)
  parser._errHandler = BailErrorStrategy()
  for mode in (PredictionMode.SLL, PredictionMode.LL):
    parser._interp.predictionMode = mode
    parser.reset()
    with contextlib.suppress(ParseCancellationException):
      return stream.tokens, _parse_exactly(parser)
  return stream.tokens, None


def _parse_by_kinds(parser: PSParser) -> ParserRuleContext:
  """Takes the place of `PSParser.math`: 2x+3 and 7y+9 share their tree, as the grammar sees kinds of tokens only."""
  stream = parser.getTokenStream()
  stream.fill()
  tokens, tree = _tree(tuple(token.type for token in stream.tokens))
  if tree is None:
    raise ValueError("a syntax error")
  for token, actual in zip(tokens, stream.tokens, strict=True):
    token.source, token.start, token.stop, token.text = actual.source, actual.start, actual.stop, actual.text
  return tree


def _whole_at_once(reader: _Latex2Sympy, text: str) -> sympy.Number:
  """Takes the place of `_Latex2Sympy.parse_number`, which has sympy parse and run each number as Python source."""
  return sympy.Integer(text) if text.isascii() and text.isdigit() else _parse_number_exactly(reader, text)


# Comparing

_MARGIN = 1e-3
_SCALES = (1.0, 9.0, 0.4)
_SMOOTH = (
  *(sympy.exp, sympy.log, TrigonometricFunction, InverseTrigonometricFunction, HyperbolicFunction),
  *(sympy.factorial, sympy.binomial, sympy.gamma, sympy.Abs, sympy.Max, sympy.Min),
)


class _Point(dict):
  """Values of symbols, by their names; names that math-verify holds for the same have the same value.

  It overlooks capitals, and takes a word for the product of its letters and e for Euler's number.
  """

  def __init__(self, scale: float):
    self.scale = scale

  def __missing__(self, symbol: sympy.Symbol) -> float:
    return math.prod(
      math.e if sign == "e" else self.scale * (0.2 + ord(sign) * 0.618034 % 1) for sign in symbol.name.lower()
    )


def _value_at(expr: Any, point: _Point) -> complex:
  """Right to far less than `_MARGIN`, relatively.

  Raises:
    Exception: it is unsure, for rounding may have spoiled the value (what nearly vanishes may be 0), or does not know.
  """
  if expr.is_Symbol:
    return point[expr]
  if expr is sympy.I:
    return 1j
  if expr.is_Number or expr.is_NumberSymbol:
    return float(expr)
  values = [_value_at(part, point) for part in expr.args]
  size = max(map(abs, values))
  real = not any(isinstance(value, complex) for value in values)
  lowest, highest = 1e-100, 1e100
  if expr.is_Add:
    value, lowest = sum(values), _MARGIN * size
  elif expr.is_Mul:
    value = math.prod(values)
  elif expr.is_Pow and abs(values[1]) < 99 and (real or values[1] % 1 == 0):
    value = values[0] ** values[1]
  elif isinstance(expr, AppliedUndef) and real and size < 1e3:  # what holds for every function holds for this one
    value = 2 + math.sin(sum(map(ord, expr.func.__name__)) + sum(map(math.prod, enumerate(values, 2))))
  elif isinstance(expr, sympy.floor | sympy.ceiling) and abs(values[0] - round(values[0])) > _MARGIN:
    return float(expr.func(values[0]))
  elif isinstance(expr, _SMOOTH) and real and size < 1e3:
    value, lowest, highest = float(expr.func(*map(sympy.Float, values))), 1e-3, 1e3
  else:
    raise NotImplementedError(f"the value of a {type(expr).__name__}")
  if not lowest < abs(value) < highest:
    raise ArithmeticError(f"{expr} may be 0 or infinite")
  return value


def _differ(one: Any, other: Any, point: _Point) -> bool:
  """Whether they do, clearly. False if that is unsure."""
  with contextlib.suppress(Exception):  # then it is for math-verify to say
    values = _value_at(one, point), _value_at(other, point)
    return abs(values[0] - values[1]) > _MARGIN * max(map(abs, values))
  return False


def _simplified_equal(gold: Any, answer: Any) -> bool:
  """Takes the place of `grader.sympy_symbolic_eq`: whether the difference is 0 when simplified."""
  both = isinstance(gold, sympy.Expr) and isinstance(answer, sympy.Expr)
  if both and any(_differ(gold, answer, _Point(scale)) for scale in _SCALES):
    return False
  return _simplified_equal_exactly(gold, answer)


def _solved_equal(gold: Any, answer: Any, *precision: int) -> bool:
  """Takes the place of `grader.sympy_solve_and_compare`: whether sympy's `solve` finds the same solutions for both.

  It compares what symbols are equal to. For one symbol `solve` gives values only, which it never finds equal.
  """
  if isinstance(gold, sympy.Eq) and isinstance(answer, sympy.Eq):
    if len(gold.free_symbols) == 1 and _has_solutions(gold):
      return False
    if (solution := _solution(gold)) and any(_misses(answer, *solution, _Point(scale)) for scale in _SCALES):
      return False
  return _solved_equal_exactly(gold, answer, *precision)


@functools.lru_cache(maxsize=256)
def _has_solutions(equation: sympy.Eq) -> bool:
  try:
    return bool(sympy.solve(equation, equation.free_symbols))
  except Exception:
    return True  # math-verify too gives up on it


@functools.lru_cache(maxsize=256)
def _solution(equation: sympy.Eq) -> tuple[sympy.Symbol, sympy.Expr] | None:
  """A symbol and its solution, which `solve` finds first: the equation is linear in it. None if there is none."""
  with contextlib.suppress(Exception):
    for symbol in sorted(equation.free_symbols, key=sympy.default_sort_key):
      found, solution = solve_linear(equation.lhs - equation.rhs, symbols=[symbol])
      if found == symbol:
        return None if solution.is_number else (symbol, solution)  # math-verify rounds numbers
  return None


def _misses(equation: sympy.Eq, symbol: sympy.Symbol, solution: sympy.Expr, point: _Point) -> bool:
  """Whether it does not hold, clearly, where the symbol has the value of the solution and that is real."""
  with contextlib.suppress(Exception):
    point[symbol] = float(_value_at(solution, point))
    return _differ(equation.lhs - equation.rhs, sympy.S.Zero, point)
  return False


_parse_exactly, PSParser.math = PSParser.math, _parse_by_kinds
_parse_number_exactly, _Latex2Sympy.parse_number = _Latex2Sympy.parse_number, _whole_at_once
_simplified_equal_exactly, grader.sympy_symbolic_eq = grader.sympy_symbolic_eq, _simplified_equal
_solved_equal_exactly, grader.sympy_solve_and_compare = grader.sympy_solve_and_compare, _solved_equal
