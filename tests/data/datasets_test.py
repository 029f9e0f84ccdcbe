"""Data sets by name and by dotted path, and checks on the splits that a user's loader returns."""

import contextlib
import io
import re
import sys

import pytest

from experiments.config import DataConfig
from experiments.setup.data import read_data
from rspo_jax.data.datasets import load_dataset, load_mixture
from rspo_jax.data.examples import Example, Split
from rspo_jax.tokenization.basic import ByteTokenizer
from tests.support.paths import ROOT

MODULE = """
from rspo_jax.data import Example, Split

def sums(data_dir, *, count=3):
  examples = tuple(Example(f"{i} + 1 =", str(i + 1), metadata={"data_dir": data_dir}) for i in range(count))
  return {"train": Split("sums/train", examples), "test": Split("sums/test", examples[:1])}

def train_only(data_dir):
  return {"train": sums(data_dir)["train"]}

def nothing(data_dir):
  return {}

def split(data_dir):
  return sums(data_dir)["train"]

def lists(data_dir):
  return {"train": list(sums(data_dir)["train"].examples)}

def numbered(data_dir):
  return {0: sums(data_dir)["train"]}

def empty(data_dir):
  return sums(data_dir) | {"test": Split("sums/test", ())}

def pairs(data_dir):
  return {"train": Split("pairs", (("1 + 1 =", "2"),))}

def fails(data_dir):
  raise ValueError("the data is elsewhere")
"""


@pytest.fixture(autouse=True)
def _module(tmp_path, monkeypatch):
  (tmp_path / "my_data.py").write_text(MODULE)
  monkeypatch.syspath_prepend(tmp_path)


def test_a_dotted_path_names_the_loader_of_a_user():
  splits = load_dataset("my_data:sums", "folder", count=2)
  assert splits["train"].examples == (
    Example("0 + 1 =", "1", metadata={"data_dir": "folder"}),
    Example("1 + 1 =", "2", metadata={"data_dir": "folder"}),
  )
  assert len(splits["test"]) == 1
  assert load_dataset("my_data:sums")["train"][0].metadata == {"data_dir": None}
  assert list(load_dataset("my_data:train_only")) == ["train"]


def test_a_name_in_the_table_selects_its_loader(tmp_path):
  (tmp_path / "x.jsonl").write_text('{"q": "1 + 1 =", "a": "2"}\n')
  splits = load_dataset("files", tmp_path, train="x.jsonl", prompt="q", gold="a")
  assert splits["train"].examples == (Example("1 + 1 =", "2"),)


def test_a_source_of_a_mixture_is_named_by_a_path():
  sources = {
    "mine": {"name": "my_data:sums", "weight": 2.0, "options": {"count": 4}},
    "train": {"name": "my_data:train_only", "data_dir": "b"},
  }
  splits = load_mixture("a", sources=sources)
  assert [(example.source, example.metadata["data_dir"]) for example in splits["train"].examples] == [
    *[("mine", "a")] * 4,
    *[("train", "b")] * 3,
  ]
  assert splits["train"].weights == {"mine": 2.0, "train": 1.0}
  assert [example.source for example in splits["test"].examples] == ["mine"]


def test_a_config_names_a_loader_by_its_path():
  splits = read_data(DataConfig(name="my_data:sums", data_dir="folder", options={"count": 2}), ByteTokenizer())
  assert splits["train"][1] == Example("1 + 1 =", "2", metadata={"data_dir": "folder"})
  assert isinstance(splits["test"], Split)
  with pytest.raises(ValueError, match="config.data.options do not fit my_data:sums: .*'size'"):
    read_data(DataConfig(name="my_data:sums", options={"size": 2}), ByteTokenizer())
  with pytest.raises(ValueError, match="config.data.name is 'my_data:sum': my_data has no callable sum; .*sums"):
    read_data(DataConfig(name="my_data:sum"), ByteTokenizer())


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("filed", "data set name is 'filed'; did you mean files. Your own is named by its path, package.module:function"),
    ("my_data:sum", "data set name is 'my_data:sum': my_data has no callable sum; did you mean sums"),
    ("no_such_module:sums", "no_such_module cannot be imported"),
    ("my_data:nothing", "my_data:nothing returned {}; want a mapping of split names to Split. Let my_data:nothing"),
    ("my_data:split", r"my_data:split returned Split\(name='sums/train'.*; want a mapping of split names"),
    ("my_data:lists", "my_data:lists returned 'train': list; want a str and a Split. Let my_data:lists return"),
    ("my_data:numbered", "my_data:numbered returned 0: Split; want a str and a Split"),
    ("my_data:empty", "my_data:empty returned no examples in split 'test'; leave that split out, or fill it"),
    ("my_data:pairs", "my_data:pairs returned examples of type tuple in split 'train'; want rspo_jax.data.Example"),
    ("my_data:fails", "the data is elsewhere"),
  ],
)
def test_unknown_names_and_malformed_splits_are_rejected_with_the_cure(name, message):
  with pytest.raises(ValueError, match=message):
    load_dataset(name)
  with pytest.raises(ValueError, match=f"Source x: .*{message.removeprefix('data set ')}"):
    load_mixture(sources={"x": {"name": name}})


def test_the_example_in_the_document_prints_the_documented_output(monkeypatch):
  text = (ROOT / "docs" / "data.md").read_text().partition("## A data set of your own")[2]
  example = r"```python\n(.*?)^```$\n\nprints\n\n```\n(.*?)^```$"
  source, printed = re.search(example, text, re.MULTILINE | re.DOTALL).groups()
  monkeypatch.setattr(sys, "path", [*sys.path])
  output = io.StringIO()
  with contextlib.redirect_stdout(output):
    exec(compile(source, "docs/data.md", "exec"), {})
  assert output.getvalue() == printed
