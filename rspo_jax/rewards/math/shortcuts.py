"""Importing this module makes math-verify (0.9.0) faster, with the same results. It imports nothing of ours.

math-verify spends most of its time in ANTLR, and in simplifying and solving unequal expressions. Here one parse tree is
built per sequence of token types, and unequal expressions are told apart by their values at a point: expressions that
are equal have equal values at every point.
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

# Parsing


def _parts(types: tuple[int, ...]) -> tuple[bool, bool, bool]:
  r"""Whether a text of these token types may contain: a sum with \pm, an index after a power, a power after an index.

  An index or a power ends with a brace, or is a single token, or ends with a nested index or power of this kind.
  """
  brace, index, power = PSParser.R_BRACE, PSParser.UNDERSCORE, PSParser.CARET
  ends = [last == brace or before in (index, power) for before, last in itertools.pairwise(types)]
  after = {type_ for end, type_ in zip(ends, types[2:], strict=False) if end}
  return PSParser.PLUS_MINUS in types, index in after, power in after


@functools.cache
def _parser(plus_minus: bool, power_index: bool, index_power: bool) -> type[PSParser]:
  r"""A parser for texts without the parts that are False.

  The complete grammar scans every sum to its end in search of a \pm.
  """
  atn = ATNDeserializer().deserialize(serializedATN())
  (atom,) = (state for state in atn.decisionToState if state.ruleIndex == PSParser.RULE_atom_expr)
  starts = (atn.ruleToStartState[PSParser.RULE_plus_minus_expr], *(branch.target for branch in atom.transitions[:2]))
  for start, present in zip(starts, (plus_minus, power_index, index_power), strict=True):
    if not present:
      start.transitions.clear()
  dfas = [DFA(state, number) for number, state in enumerate(atn.decisionToState)]
  attributes = {"atn": atn, "decisionsToDFA": dfas, "sharedContextCache": PredictionContextCache()}
  return type("Parser", (PSParser,), attributes)


@functools.lru_cache(maxsize=256)
def _tree(types: tuple[int, ...]) -> tuple[list[Token], ParserRuleContext | None]:
  """Tokens of these types, including the end token, and their parse tree; None for the tree if there is a syntax error.

  ANTLR's SLL prediction takes a tenth of the time of LL. It finds the same tree or reports a syntax error; LL runs only
  after such an error. Source: PredictionMode in ANTLR's documentation.
  """
  stream = CommonTokenStream(ListTokenSource([CommonToken(type=type_) for type_ in types]))
  parser = _parser(*_parts(types))(stream)
  parser._errHandler = BailErrorStrategy()
  for mode in (PredictionMode.SLL, PredictionMode.LL):
    parser._interp.predictionMode = mode
    parser.reset()
    with contextlib.suppress(ParseCancellationException):
      return stream.tokens, _parse_exactly(parser)
  return stream.tokens, None


def _parse_by_types(parser: PSParser) -> ParserRuleContext:
  """Replaces `PSParser.math`: 2x+3 and 7y+9 share their tree, as the grammar depends on token types only."""
  stream = parser.getTokenStream()
  stream.fill()
  tokens, tree = _tree(tuple(token.type for token in stream.tokens))
  if tree is None:
    raise ValueError("a syntax error")
  for token, actual in zip(tokens, stream.tokens, strict=True):
    token.source, token.start, token.stop, token.text = actual.source, actual.start, actual.stop, actual.text
  return tree


def _parse_number(reader: _Latex2Sympy, text: str) -> sympy.Number:
  """Replaces `_Latex2Sympy.parse_number`, in which sympy parses and evaluates each number as Python source."""
  return sympy.Integer(text) if text.isascii() and text.isdigit() else _parse_number_exactly(reader, text)


# Comparing

_MARGIN = 1e-3
_SCALES = (1.0, 9.0, 0.4)
_SMOOTH = (
  *(sympy.exp, sympy.log, TrigonometricFunction, InverseTrigonometricFunction, HyperbolicFunction),
  *(sympy.factorial, sympy.binomial, sympy.gamma, sympy.Abs, sympy.Max, sympy.Min),
)


class _Point(dict):
  """Values of symbols, by their names; names that math-verify treats as equal have the same value.

  math-verify ignores case, and reads a word as the product of its letters and e as Euler's number.
  """

  def __init__(self, scale: float):
    self.scale = scale

  def __missing__(self, symbol: sympy.Symbol) -> float:
    return math.prod(
      math.e if letter == "e" else self.scale * (0.2 + ord(letter) * 0.618034 % 1) for letter in symbol.name.lower()
    )


def _value_at(expr: Any, point: _Point) -> complex:
  """The value of an expression at a point, with a relative error far below `_MARGIN`.

  Raises:
    Exception: the value is unknown, or inexact because of rounding (a value near 0 may be 0).
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
  elif isinstance(expr, AppliedUndef) and real and size < 1e3:  # an equation for all functions holds for this one
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
  """Whether two expressions differ by more than rounding at a point. False if a value is unknown."""
  with contextlib.suppress(Exception):  # math-verify decides
    values = _value_at(one, point), _value_at(other, point)
    return abs(values[0] - values[1]) > _MARGIN * max(map(abs, values))
  return False


def _simplified_equal(gold: Any, answer: Any) -> bool:
  """Replaces `grader.sympy_symbolic_eq`: whether the simplified difference is 0."""
  both = isinstance(gold, sympy.Expr) and isinstance(answer, sympy.Expr)
  if both and any(_differ(gold, answer, _Point(scale)) for scale in _SCALES):
    return False
  return _simplified_equal_exactly(gold, answer)


def _solved_equal(gold: Any, answer: Any, *precision: int) -> bool:
  """Replaces `grader.sympy_solve_and_compare`: whether sympy's `solve` finds the same solutions for both equations.

  math-verify compares solutions by symbol. For equations in one symbol `solve` returns values without the symbol, which
  math-verify never finds equal.
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
    return True  # math-verify gives up on it too


@functools.lru_cache(maxsize=256)
def _solution(equation: sympy.Eq) -> tuple[sympy.Symbol, sympy.Expr] | None:
  """A symbol in which the equation is linear and its solution, the one `solve` finds first. None if there is none."""
  with contextlib.suppress(Exception):
    for symbol in sorted(equation.free_symbols, key=sympy.default_sort_key):
      solved, solution = solve_linear(equation.lhs - equation.rhs, symbols=[symbol])
      if solved == symbol:
        return None if solution.is_number else (symbol, solution)  # math-verify rounds numbers
  return None


def _misses(equation: sympy.Eq, symbol: sympy.Symbol, solution: sympy.Expr, point: _Point) -> bool:
  """Whether an equation clearly fails at a point where the symbol has the value of the solution, if that is real."""
  with contextlib.suppress(Exception):
    point[symbol] = float(_value_at(solution, point))
    return _differ(equation.lhs - equation.rhs, sympy.S.Zero, point)
  return False


_parse_exactly, PSParser.math = PSParser.math, _parse_by_types
_parse_number_exactly, _Latex2Sympy.parse_number = _Latex2Sympy.parse_number, _parse_number
_simplified_equal_exactly, grader.sympy_symbolic_eq = grader.sympy_symbolic_eq, _simplified_equal
_solved_equal_exactly, grader.sympy_solve_and_compare = grader.sympy_solve_and_compare, _solved_equal
