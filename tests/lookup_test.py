"""Names from a config: similar words, dotted paths, and every way in which they fail."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rspo_jax.lookup import is_path, load_path, look_up, near

TABLE = {"grpo": 1, "gspo": 2, "cispo": 3}


@pytest.fixture(autouse=True)
def _modules(tmp_path, monkeypatch):
  (tmp_path / "lookup_user.py").write_text("def square(x):\n  return x * x\n\nclass Cube:\n  pass\n\nLIMIT = 3\n")
  (tmp_path / "lookup_syntax.py").write_text("def\n")
  (tmp_path / "lookup_raises.py").write_text("raise OSError('no disk')\n")
  (tmp_path / "lookup_exits.py").write_text("import sys\nsys.exit(3)\n")
  (tmp_path / "lookup_empty.py").write_text("")
  (tmp_path / "lookup_large.py").write_text("".join(f"def function_{i}(): pass\n" for i in range(50)))
  monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize(
  ("word", "cure"),
  [
    ("grop", "did you mean grpo?"),
    ("cisop", "did you mean cispo?"),
    ("reinforce", "want one of cispo, grpo, gspo."),
    ("", "want one of cispo, grpo, gspo."),
  ],
)
def test_near_suggests_a_similar_word_or_lists_all(word, cure):
  assert near(word, TABLE) == cure


def test_near_takes_any_iterable_and_none_at_all():
  assert near("grop", iter(TABLE)) == "did you mean grpo?"
  assert near("grpo", []) == "want one of (none)."


@given(st.text(), st.lists(st.text()))
def test_near_has_an_answer_for_every_word(word, known):
  assert near(word, known).startswith(("did you mean ", "want one of "))


@pytest.mark.parametrize("name", ["a:b", "package.module:function", "_a._b:_c", "größe:maß"])
def test_paths_are_recognised(name):
  assert is_path(name)


@pytest.mark.parametrize(
  "name",
  ["", "math", "module.function", "module:", ":x", "a:b:c", "a b:c", ".a:b", "a.:b", "a..b:c", "1a:b", "a:1", "a:b.c"],
)
def test_other_names_are_not_paths(name):
  assert not is_path(name)
  with pytest.raises(ValueError, match=r"want package\.module:function"):
    load_path(name)


def test_functions_and_classes_are_loaded():
  assert load_path("lookup_user:square")(3) == 9
  assert load_path("lookup_user:Cube").__name__ == "Cube"
  assert load_path("os.path:join") is __import__("os").path.join


@pytest.mark.parametrize(
  ("path", "message"),
  [
    ("lookup_user:sqare", "lookup_user has no callable sqare; did you mean square?"),
    ("lookup_user:LIMIT", "lookup_user has no callable LIMIT; it has square, Cube."),
    ("lookup_empty:square", "lookup_empty has no callable square; it has none."),
    ("lookup_usr:square", r"module lookup_usr cannot be imported \(ModuleNotFoundError: .*PYTHONPATH"),
    ("lookup_user.inner:square", r"cannot be imported \(ModuleNotFoundError: .*not a package"),
    ("lookup_syntax:square", r"cannot be imported \(SyntaxError"),
    ("lookup_raises:square", r"cannot be imported \(OSError: no disk\)"),
    ("lookup_exits:square", r"cannot be imported \(SystemExit: 3\)"),
  ],
)
def test_a_path_that_cannot_be_loaded_is_an_error_with_the_cause(path, message):
  with pytest.raises(ValueError, match=message) as error:
    load_path(path)
  assert str(error.value).startswith(repr(path))


def test_long_lists_of_names_are_cut():
  with pytest.raises(ValueError, match=r"it has function_0, .*function_19, \.\.\.$"):
    load_path("lookup_large:x")


def test_look_up_prefers_the_table_to_a_path():
  assert look_up("config.name", "gspo", TABLE) == 2
  assert look_up("config.name", "lookup_user:square", TABLE)(2) == 4
  assert look_up("config.name", "lookup_user:square", {"lookup_user:square": 5}) == 5


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("gsop", r"config\.name is 'gsop'; did you mean gspo\? .*package\.module:function"),
    ("x", r"config\.name is 'x'; want one of cispo, grpo, gspo\. .*package\.module:function"),
    (3, r"config\.name is 3; want one of"),
    (None, r"config\.name is None; want one of"),
    (["grpo"], r"config\.name is \['grpo'\]; "),
    ("lookup_user:sqare", r"config\.name is 'lookup_user:sqare': lookup_user has no callable .*square\?"),
  ],
)
def test_look_up_names_the_key_and_a_cure(name, message):
  with pytest.raises(ValueError, match=message):
    look_up("config.name", name, TABLE)
