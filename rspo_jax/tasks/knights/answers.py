r"""Reads who is what out of English prose that answers a Knights and Knaves problem.

A claim gives islanders a role: 'Bob is a knave', 'Bob must be a knave', 'Bob isn't a knight', 'Bob: knave', 'Alice and
Bob are knights'. Upper and lower case, and marks such as ** or \text{}, make no difference.
"""

import functools
import re
from collections.abc import Sequence

from rspo_jax.tasks.answers import balanced_boxes

READ = 8192  # characters at the end of an answer; what stands before them is not read

_MARKS = re.compile(r"\\[a-zA-Z]+|\\.|[*_`$~{}]", re.DOTALL)
_SEPARATORS = re.compile(r"(?:[\s,;.&]|\band\b)*", re.IGNORECASE)
# A sentence with one of these beside its claims does not say that they are so.
_REASONING = re.compile(
  r"""["“”?]|\b(?:if|or|either|neither|nor|not|never|cannot|can't|whether|unless|suppose|assume|assuming|imagine|consider
  |case|would|could|might|may|maybe|perhaps|possibly|say|says|said|saying|claims?|claimed|states?|statement|implies
  |false|untrue|wrong|impossible|contradiction|contradicts?|contradictory)\b""",
  re.IGNORECASE | re.VERBOSE,
)


def read(text: str, names: Sequence[str]) -> tuple[tuple[bool, ...] | None, str]:
  r"""(the roles, '') or (None, why there are none).

  What counts is the last \boxed{} whose braces balance, the outer one where boxes are nested. It must hold claims and
  nothing else: anybody else's name, or 'a knight or a knave', spoils it. A text without a box is read sentence by
  sentence from its end, and the last claim about each islander counts; sentences that suppose, quote, negate or ask are
  left out.

  Args:
    text: of any length; READ characters of it are read, in time linear in their number.
    names: of the islanders, in order.
  Returns:
    The roles in the order of the names, True for a knight. Else why: 'no answer'; 'not an answer', a box with
    something else in it; 'names missing'; 'contradictory', one islander called both in the box or in one sentence.
  """
  text = text[-READ:]
  box = _last_box(text)
  if box is not None:
    claims, rest = _claims(box, names)
    if any(not _SEPARATORS.fullmatch(piece) for piece in rest):
      return None, "not an answer"
    sentences = [claims]
  else:
    sentences = _sentences_from_the_end(text, names)
  roles: dict[str, bool] = {}
  for claims in sentences:
    said = set(claims)
    if any((name, True) in said and (name, False) in said and name not in roles for name, _ in said):
      return None, "contradictory"
    roles = dict(claims) | roles
  if len(roles) < len(names):
    return None, "names missing" if roles else "no answer"
  return tuple(roles[name] for name in names), ""


def _last_box(text):
  r"""The content of the \boxed{} that closes last, or None."""
  spans = [(opening.end(), end) for opening, end in balanced_boxes(text) if opening[0].startswith(r"\boxed")]
  return text[slice(*spans[-1])] if spans else None


def _sentences_from_the_end(text, names):
  for sentence in reversed(re.split(r"[.!;\n]|(?<=\?)", text)):
    claims, rest = _claims(sentence, names) if sentence else ([], [])
    if claims and not any(_REASONING.search(piece) for piece in rest):
      yield claims


def _claims(text, names):
  """([(name, is a knight)], the pieces of text between the claims)."""
  pattern = _claim(tuple(names))
  text = _MARKS.sub(" ", text)
  claims, rest, end = [], [], 0
  for match in pattern.finditer(text):
    rest.append(text[end : match.start()])
    end = match.end()
    who = match["group"] or match["name"]
    knight = (match["role"].lower() == "knight") != bool(match["negation"])
    claims += [(name, knight) for name in names if re.search(rf"\b{name}\b", who, re.IGNORECASE)]
  return claims, [*rest, text[end:]]


@functools.cache
def _claim(names):
  name = "|".join(names)
  return re.compile(
    rf"""\b(?:
      (?P<group>(?:{name})(?:(?:\s{{0,9}},\s{{0,9}}(?:and\s{{1,9}})?|\s{{1,9}}and\s{{1,9}})(?:{name})){{0,7}})
      \s{{1,9}}(?:is|are|must\sbe)(?P<negation>n['’]t|\s{{1,9}}not)?\s{{1,9}}(?:both\s{{1,9}})?
     |(?P<name>{name})\s{{0,9}}(?::|=|->?|→|–)\s{{0,9}}
    )(?:an?\s{{1,9}}|the\s{{1,9}})?(?P<role>knight|knave)s?\b""",
    re.IGNORECASE | re.VERBOSE,
  )
