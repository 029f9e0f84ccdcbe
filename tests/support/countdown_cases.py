"""Countdown expression trees, (operator, left, right) or a number, and their exact values without the library."""

import operator
from fractions import Fraction

from rspo_jax.tasks.countdown.problem import Problem

PROBLEM = Problem((3, 7, 12), 22)
PYTHON = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


def value_of(tree):
  return Fraction(tree) if isinstance(tree, int) else PYTHON[tree[0]](value_of(tree[1]), value_of(tree[2]))
