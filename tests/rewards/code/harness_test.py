"""What travels between a candidate and its checker."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rspo_jax.rewards.code.harness import Handle, decode, encode

HASHABLE = st.recursive(
  st.none() | st.booleans() | st.integers() | st.integers(-(10**40), 10**40) | st.text() | st.binary()
  | st.floats(allow_nan=False) | st.complex_numbers(allow_nan=False),
  lambda inner: st.lists(inner, max_size=4).map(tuple) | st.frozensets(inner, max_size=4),
  max_leaves=6,
)  # fmt: skip
VALUES = st.recursive(
  HASHABLE,
  lambda inner: (
    st.lists(inner, max_size=4) | st.dictionaries(HASHABLE, inner, max_size=4) | st.sets(HASHABLE, max_size=4)
  ),
  max_leaves=12,
)


def shape(value):
  """A value with the types of all that is in it, for True == 1 == 1.0."""
  if isinstance(value, dict):
    return [(shape(key), shape(item)) for key, item in value.items()]
  if isinstance(value, (list, tuple)):
    return type(value), [shape(item) for item in value]
  if isinstance(value, (set, frozenset)):
    return type(value), sorted(repr(shape(item)) for item in value)
  return type(value), repr(value)


@settings(max_examples=60, deadline=None)
@given(VALUES)
def test_values_arrive_as_they_were(value):
  assert shape(decode(json.loads(json.dumps(encode(value))))) == shape(value)


def test_iterables_arrive_as_iterators_and_ranges_as_ranges():
  def sent(value):
    return decode(json.loads(json.dumps(encode(value))))

  assert list(sent(character for character in "abc")) == ["a", "b", "c"]
  assert sorted(sent({1: "x", 2: "y"}.keys())) == [1, 2]
  assert sent(range(10**18)) == range(10**18)
  assert next(sent(zip([1], [2.0], strict=True))) == (1, 2.0)


def test_objects_of_a_class_arrive_as_what_they_are_made_of():
  class Same(str):
    def __eq__(self, other):
      return True

    __hash__ = str.__hash__

  received = decode(json.loads(json.dumps(encode(Same("a")))))
  assert type(received) is str and received != "b"


def test_a_handle_says_nothing_about_its_object():
  kept = []
  handle = decode(encode(object(), lambda value: kept.append(value) or 0))
  for question in (bool, hash, lambda it: it == 1, lambda it: it != 1, lambda it: it in [1], len, list, float):
    with pytest.raises(TypeError):
      question(handle)
  assert decode(encode(handle), kept.__getitem__) is kept[0]
  with pytest.raises(TypeError, match="function cannot be handed"):
    encode(lambda: None)
  assert isinstance(handle, Handle)
