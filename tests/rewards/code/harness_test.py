"""Encoding of the values that a candidate and its checker exchange."""

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
  """A value with the types of all its parts, because True == 1 == 1.0."""
  if isinstance(value, dict):
    return [(shape(key), shape(item)) for key, item in value.items()]
  if isinstance(value, (list, tuple)):
    return type(value), [shape(item) for item in value]
  if isinstance(value, (set, frozenset)):
    return type(value), sorted(repr(shape(item)) for item in value)
  return type(value), repr(value)


@settings(max_examples=60, deadline=None)
@given(VALUES)
def test_decoding_inverts_encoding(value):
  assert shape(decode(json.loads(json.dumps(encode(value))))) == shape(value)


def test_iterables_become_iterators_and_ranges_stay_ranges():
  def transmit(value):
    return decode(json.loads(json.dumps(encode(value))))

  assert list(transmit(character for character in "abc")) == ["a", "b", "c"]
  assert sorted(transmit({1: "x", 2: "y"}.keys())) == [1, 2]
  assert transmit(range(10**18)) == range(10**18)
  assert next(transmit(zip([1], [2.0], strict=True))) == (1, 2.0)


def test_instances_of_subclasses_become_instances_of_the_builtin_base():
  class Same(str):
    def __eq__(self, other):
      return True

    __hash__ = str.__hash__

  received = decode(json.loads(json.dumps(encode(Same("a")))))
  assert type(received) is str and received != "b"


def test_a_handle_reveals_nothing_about_its_object():
  objects = []
  handle = decode(encode(object(), lambda value: objects.append(value) or 0))
  for operation in (bool, hash, lambda it: it == 1, lambda it: it != 1, lambda it: it in [1], len, list, float):
    with pytest.raises(TypeError):
      operation(handle)
  assert decode(encode(handle), objects.__getitem__) is objects[0]
  with pytest.raises(TypeError, match="function cannot be passed"):
    encode(lambda: None)
  assert isinstance(handle, Handle)
