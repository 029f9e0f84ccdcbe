"""Mixtures keep their weights, give the same batch for a step in any order, and read every example once per epoch."""

import json
from collections import Counter

import pytest

from rspo_jax.data.datasets import DATASETS, load_mixture
from rspo_jax.data.examples import Example, Split, batches, index_stream

FILES = {"name": "files", "options": {"prompt": "q", "gold": "a"}}


def mixed(sizes, weights):
  examples = (Example(f"{source}{i}", str(i), source=source) for source, size in sizes.items() for i in range(size))
  return Split("mixed", tuple(examples), weights=weights)


def prompts(examples):
  return [example.prompt for example in examples]


@pytest.fixture
def folder(tmp_path):
  for name, count in (("a_train", 5), ("a_test", 2), ("b_train", 3), ("c_test", 4)):
    rows = [{"q": f"{name}{i}", "a": "1"} for i in range(count)]
    (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  return tmp_path


def files(weight=1.0, **options):
  return {"name": "files", "weight": weight, "options": {"prompt": "q", "gold": "a", **options}}


@pytest.mark.parametrize(
  "weights",
  [
    {"a": 1.0, "b": 1.0},
    {"a": 3.0, "b": 1.0},
    {"a": 0.7, "b": 0.2, "c": 0.1},
    {"a": 0.1, "b": 0.3},  # 0.3 / 0.1 is a little less than 3
    {"a": 1e-3, "b": 5e-3, "c": 2e-3},
  ],
)
def test_shares_among_the_first_n_equal_the_weights_within_one_example_per_source(weights):
  split = mixed(dict.fromkeys(weights, 300), weights)
  stream, counts = index_stream(split, 1), Counter()
  total = sum(weights.values())
  for n in range(1, 401):
    counts[split[stream[n - 1]].source] += 1
    if n % 20 == 0:
      for source, weight in weights.items():
        assert abs(counts[source] - n * weight / total) <= len(weights)
  assert counts == {source: round(400 * weight / total) for source, weight in weights.items()}


def test_a_source_is_read_once_per_epoch_in_a_new_order():
  split = mixed({"a": 6, "b": 6, "c": 4}, {"a": 2.0, "b": 1.0, "c": 1.0})
  stream = [example for step in range(20) for example in batches(split, 8, seed=2).at(step)]
  epochs = {}
  for source, size in (("a", 6), ("b", 6), ("c", 4)):
    own = [example.gold for example in stream if example.source == source]
    epochs[source] = [own[i : i + size] for i in range(0, len(own) - size + 1, size)]
    assert len(epochs[source]) >= 6
    assert all(sorted(epoch) == [str(i) for i in range(size)] for epoch in epochs[source])
    assert len({tuple(epoch) for epoch in epochs[source]}) > 1
  assert epochs["a"][: len(epochs["b"])] != epochs["b"]  # equal lengths, different shuffles


def test_the_batch_of_a_step_does_not_depend_on_how_it_is_reached():
  split = mixed({"a": 5, "b": 9}, {"a": 0.3, "b": 0.7})
  iterator = batches(split, 4, seed=3)
  first = [next(iterator) for _ in range(9)]
  for start in range(9):
    resumed = batches(split, 4, seed=3, start=start)
    assert [next(resumed) for _ in range(9 - start)] == first[start:]
  assert first != [batches(split, 4, seed=4).at(step) for step in range(9)]


def test_a_mixture_concatenates_its_sources(folder):
  sources = {
    "first": files(3.0, train="a_train.jsonl", test="a_test.jsonl"),
    "second": {**files(train="b_train.jsonl"), "data_dir": str(folder)},
    "held": files(0.0, train="a_train.jsonl", test="c_test.jsonl"),
  }
  splits = DATASETS["mixture"](folder, sources=sources)
  assert Counter(example.source for example in splits["train"].examples) == {"first": 5, "second": 3}
  assert splits["train"].weights == {"first": 3.0, "second": 1.0}
  assert prompts(splits["test"].examples) == ["a_test0", "a_test1", "c_test0", "c_test1", "c_test2", "c_test3"]
  assert [example.source for example in splits["test"].examples] == ["first"] * 2 + ["held"] * 4
  assert splits["test"].weights == {}
  sampled = [example for step in range(4) for example in batches(splits["train"], 4, seed=0).at(step)]
  assert Counter(example.source for example in sampled) == {"first": 12, "second": 4}
  assert list(load_mixture(folder, sources={"held": sources["held"]})) == ["test"]


def test_indices_of_broken_records_count_the_records_of_earlier_sources(folder):
  for name in ("a_train", "b_train"):
    with open(folder / f"{name}.jsonl", "a") as file:
      file.write("?\n")
  sources = {key: files(train=f"{key}_train.jsonl", on_broken="skip") for key in ("a", "b")}
  assert load_mixture(folder, sources=sources)["train"].skipped == (5, 9)


@pytest.mark.parametrize(
  ("sources", "message"),
  [
    ({}, "A mixture has no sources"),
    ({"x": {"name": "filed"}}, "Source x: name is 'filed'; did you mean files. Your own is named by its path"),
    (
      {"x": {"name": "mixture", "options": {"sources": {}}}},
      "name is 'mixture'; want one of countdown, files",
    ),
    ({"x": {}}, "Source x: name is ''; want one of countdown, files, knights"),
    ({"x": {**files(), "wieght": 2}}, "Source x has wieght; want name, weight, data_dir and options"),
    ({"x": files(-1.0, train="a_train.jsonl")}, "Source x has weight -1.0; want a number, 0 or more"),
    ({"x": files(float("nan"), train="a_train.jsonl")}, "weight nan"),
    ({"x": files("1", train="a_train.jsonl")}, "weight '1'"),
    ({"x": files(train="none.jsonl")}, "Source x: .*none.jsonl is no file"),
    ({"x": files(trian="a_train.jsonl")}, "Source x: A data set of files has no setting trian"),
    ({"x": 3}, "Source x is 3; want a group of settings"),
  ],
)
def test_impossible_sources_are_rejected_by_name(folder, sources, message):
  with pytest.raises(ValueError, match=message):
    load_mixture(folder, sources=sources)


def test_a_weight_for_a_source_without_examples_is_rejected():
  with pytest.raises(ValueError, match="mixed has no example of b; take it out"):
    batches(mixed({"a": 3}, {"a": 1.0, "b": 1.0}), 2, seed=0)
