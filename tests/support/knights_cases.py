"""An independent solver of Knights and Knaves, and renaming of islanders, for comparison with the library."""

import itertools


def truth_value(statement, roles):
  operator, *parts = statement
  if operator == "is":
    return roles[parts[0]]
  if operator == "#":
    return sum(roles) == parts[0]
  values = [truth_value(part, roles) for part in parts]
  if operator == "!":
    return not values[0]
  if operator == "&":
    return all(values)
  if operator == "|":
    return any(values)
  return values[0] == values[1] or (operator == ">" and values[1])


def brute_force(statements):
  return [
    roles
    for roles in itertools.product((False, True), repeat=len(statements))
    if all(truth_value(statement, roles) == role for statement, role in zip(statements, roles, strict=True))
  ]


def renamed(statement, order):
  operator, *parts = statement
  if operator == "is":
    return ("is", order[parts[0]])
  return statement if operator == "#" else (operator, *(renamed(part, order) for part in parts))


def rename(statements, order):
  """The statements after islander i has become islander order[i]."""
  result = [None] * len(statements)
  for person, statement in enumerate(statements):
    result[order[person]] = renamed(statement, order)
  return tuple(result)


def truth_tables(statements):
  """For each islander the truth values of the statement in all assignments."""
  assignments = list(itertools.product((False, True), repeat=len(statements)))
  return tuple(tuple(truth_value(statement, roles) for roles in assignments) for statement in statements)
