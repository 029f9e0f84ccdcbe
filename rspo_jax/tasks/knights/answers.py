r"""Parses the roles of the islanders in an English answer to a Knights and Knaves problem.

A claim assigns a role to islanders: 'Bob is a knave', 'Bob must be a knave', 'Bob isn't a knight', 'Bob: knave', 'Alice
and Bob are knights'. Case and markup such as ** or \text{} are ignored.
"""

import functools
import re
from collections.abc import Sequence

from rspo_jax.tasks.answers import balanced_boxes

MAX_LENGTH = 8192  # characters; of a longer answer only the end is parsed

_MARKUP = re.compile(r"\\[a-zA-Z]+|\\.|[*_`$~{}]", re.DOTALL)
_SEPARATORS = re.compile(r"(?:[\s,;.&]|\band\b)*", re.IGNORECASE)
# A sentence that contains one of these outside its claims does not assert them.
_REASONING = re.compile(
  r"""["“”?]|\b(?:if|or|either|neither|nor|not|never|cannot|can't|whether|unless|suppose|assume|assuming|imagine|consider
  |case|would|could|might|may|maybe|perhaps|possibly|say|says|said|saying|claims?|claimed|states?|statement|implies
  |false|untrue|wrong|impossible|contradiction|contradicts?|contradictory)\b""",
  re.IGNORECASE | re.VERBOSE,
)


def roles_from_english(text: str, names: Sequence[str]) -> tuple[tuple[bool, ...] | None, str]:
  r"""Parses the roles that a text claims.

  The last \boxed{} with balanced braces is used, the outer one of nested boxes. It must contain claims only: another
  name, or 'a knight or a knave', invalidates it. In a text without a box, the last claim about each islander is used;
  sentences that suppose, quote, negate or ask are ignored.

  Args:
    text: of any length; its last MAX_LENGTH characters are parsed, in linear time.
    names: of the islanders, in order.
  Returns:
    (roles, ''): the roles in the order of the names, True for a knight; or (None, reason): 'no answer'; 'not an
    answer', a box with other content; 'names missing'; 'contradictory', both roles for an islander in the box or in one
    sentence.
  """
  text = text[-MAX_LENGTH:]
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
    claimed = set(claims)
    if any((name, True) in claimed and (name, False) in claimed and name not in roles for name, _ in claimed):
      return None, "contradictory"
    roles = dict(claims) | roles
  if len(roles) < len(names):
    return None, "names missing" if roles else "no answer"
  return tuple(roles[name] for name in names), ""


def _last_box(text):
  r"""The content of the \boxed{} whose closing brace is the last one, or None."""
  spans = [(opening.end(), end) for opening, end in balanced_boxes(text) if opening[0].startswith(r"\boxed")]
  return text[slice(*spans[-1])] if spans else None


def _sentences_from_the_end(text, names):
  for sentence in reversed(re.split(r"[.!;\n]|(?<=\?)", text)):
    claims, rest = _claims(sentence, names) if sentence else ([], [])
    if claims and not any(_REASONING.search(piece) for piece in rest):
      yield claims


def _claims(text, names):
  """([(name, whether a knight)], pieces of text between the claims)."""
  pattern = _claim_pattern(tuple(names))
  text = _MARKUP.sub(" ", text)
  claims, rest, end = [], [], 0
  for match in pattern.finditer(text):
    rest.append(text[end : match.start()])
    end = match.end()
    subject = match["group"] or match["name"]
    knight = (match["role"].lower() == "knight") != bool(match["negation"])
    claims += [(name, knight) for name in names if re.search(rf"\b{name}\b", subject, re.IGNORECASE)]
  return claims, [*rest, text[end:]]


@functools.cache
def _claim_pattern(names):
  name = "|".join(names)
  return re.compile(
    rf"""\b(?:
      (?P<group>(?:{name})(?:(?:\s{{0,9}},\s{{0,9}}(?:and\s{{1,9}})?|\s{{1,9}}and\s{{1,9}})(?:{name})){{0,7}})
      \s{{1,9}}(?:is|are|must\sbe)(?P<negation>n['’]t|\s{{1,9}}not)?\s{{1,9}}(?:both\s{{1,9}})?
     |(?P<name>{name})\s{{0,9}}(?::|=|->?|→|–)\s{{0,9}}
    )(?:an?\s{{1,9}}|the\s{{1,9}})?(?P<role>knight|knave)s?\b""",
    re.IGNORECASE | re.VERBOSE,
  )
