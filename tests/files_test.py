"""The reader of JSON objects returns the object or names the file and the cure."""

import re

import pytest

from rspo_jax.files import read_json


def test_an_object_is_read_from_a_path_or_its_text(tmp_path):
  path = tmp_path / "x.json"
  path.write_text('{"a": ["é", 1.5, null]}', encoding="utf-8")
  assert read_json(path) == read_json(str(path)) == {"a": ["é", 1.5, None]}


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"", "x.json cannot be read: it is not JSON (Expecting value"),
    (b"version https://git-lfs", "x.json cannot be read: it is not JSON (Expecting value"),
    (b'{"a": 1', "x.json cannot be read: it is not JSON (Expecting ',' delimiter"),
    (b'{"a": "\xff"}', "x.json cannot be read: it is not JSON ('utf-8' codec"),
    (b'{"a": ' + b"[" * 100_000, "x.json cannot be read: it is not JSON ("),
    (b"[1]", "x.json cannot be read: it holds a list, not an object."),
    (b"null", "x.json cannot be read: it holds a NoneType, not an object."),
  ],
)
@pytest.mark.parametrize("absent_ok", [False, True])
def test_a_malformed_file_is_named_with_the_cure(tmp_path, content, message, absent_ok):
  (tmp_path / "x.json").write_bytes(content)
  with pytest.raises(ValueError, match=f"{re.escape(message)}.* Download it again.$"):
    read_json(tmp_path / "x.json", absent_ok=absent_ok)
  with pytest.raises(ValueError, match=f"{re.escape(message)}.* Save it again.$"):
    read_json(tmp_path / "x.json", absent_ok=absent_ok, cure="Save it again.")


def test_an_absent_file_is_an_error_unless_it_is_optional(tmp_path):
  with pytest.raises(ValueError, match="x.json is absent. Download it again.$"):
    read_json(tmp_path / "x.json")
  assert read_json(tmp_path / "x.json", absent_ok=True) == {}
