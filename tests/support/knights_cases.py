"""A solver of Knights and Knaves that shares nothing with ours, and what renaming islanders means."""

import itertools


def spoken_truth(statement, roles):
  operator, *parts = statement
  if operator == "is":
    return roles[parts[0]]
  if operator == "#":
    return sum(roles) == parts[0]
  said = [spoken_truth(part, roles) for part in parts]
  if operator == "!":
    return not said[0]
  if operator == "&":
    return all(said)
  if operator == "|":
    return any(said)
  return said[0] == said[1] or (operator == ">" and said[1])


def brute_force(statements):
  return [
    roles
    for roles in itertools.product((False, True), repeat=len(statements))
    if all(spoken_truth(statement, roles) == role for statement, role in zip(statements, roles, strict=True))
  ]


def renamed(statement, order):
  operator, *parts = statement
  if operator == "is":
    return ("is", order[parts[0]])
  return statement if operator == "#" else (operator, *(renamed(part, order) for part in parts))


def rename(statements, order):
  """The same scene where islander i is called order[i]."""
  moved = [None] * len(statements)
  for person, statement in enumerate(statements):
    moved[order[person]] = renamed(statement, order)
  return tuple(moved)


def meaning(statements):
  """Per islander what is said, as the truth in every assignment."""
  cases = list(itertools.product((False, True), repeat=len(statements)))
  return tuple(tuple(spoken_truth(statement, roles) for roles in cases) for statement in statements)
