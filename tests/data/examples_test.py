"""Countdown through TFDS, broken records, and batches by step."""

import dataclasses
import json
import os
import subprocess
import sys
from collections import Counter

import pytest

from rspo_jax.data.datasets import DATASETS, cache_dir, load_countdown
from rspo_jax.data.examples import Example, Split, batches, read_split
from rspo_jax.tasks.countdown import dataset
from rspo_jax.tasks.countdown.dataset import CountdownConfig
from rspo_jax.tasks.countdown.generate import CountdownSpec, make_problems
from rspo_jax.tasks.countdown.problem import check, prompt_text

SPEC = {"train": 120, "test": 40, "seed": 5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tfds")
  load_countdown(folder, **SPEC)
  return folder


def numbered(count):
  return Split("numbered", tuple(Example(str(i), i) for i in range(count)))


def golds(examples):
  return [example.gold for example in examples]


def version_folder(folder):
  (path,) = folder.glob("countdown/*/1.0.0")
  return path


def test_examples_equal_the_generated_problems(folder):
  splits = DATASETS["countdown"](folder, **SPEC)
  problems = make_problems(CountdownSpec(**SPEC))
  assert set(splits) == {"train", "test"}
  for name, split in splits.items():
    assert split.skipped == ()
    assert [(e.gold, e.demonstration, e.wrong_demonstration) for e in split.examples] == problems[name]
    for example in split.examples:
      assert example.prompt == prompt_text(example.gold)
      assert example.metadata == {"operators": "+-*/"}
      assert check(example.demonstration, example.gold).correct
      assert check(example.wrong_demonstration, example.gold).reason == "wrong value"
  keys = [{example.gold.key for example in splits[name].examples} for name in ("train", "test")]
  assert not keys[0] & keys[1]
  assert [len(k) for k in keys] == [120, 40]


def test_a_prepared_data_set_is_read_without_generating_it_again(folder, monkeypatch, capfd):
  monkeypatch.setattr(dataset, "make_problems", lambda spec: pytest.fail("generated again"))
  before = sorted(path.stat().st_mtime_ns for path in folder.rglob("*"))
  assert len(load_countdown(folder, **SPEC)["train"]) == 120
  assert sorted(path.stat().st_mtime_ns for path in folder.rglob("*")) == before
  assert capfd.readouterr() == ("", "")


def test_every_field_of_the_spec_is_part_of_the_folders_name():
  base = CountdownSpec()
  for field in dataclasses.fields(base):
    other = "+-" if field.name == "operators" else getattr(base, field.name) + 1
    changed = dataclasses.replace(base, **{field.name: other})
    assert CountdownConfig.from_spec(changed).name != CountdownConfig.from_spec(base).name, field.name


def test_operators_in_any_order_are_one_data_set():
  assert CountdownSpec(operators="*-+") == CountdownSpec(operators="+-*")


def test_two_processes_that_prepare_concurrently_both_read_the_complete_data_set(tmp_path):
  code = (
    "import sys; from rspo_jax.data.datasets import load_countdown;"
    "s = load_countdown(sys.argv[1], train=300, test=30);"
    "print(len(s['train']), len(s['test']), s['test'][7].prompt, any(m.startswith('tensorflow.') for m in sys.modules))"
  )
  command = [sys.executable, "-c", code, str(tmp_path)]
  running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
  outputs = [process.communicate(timeout=120) for process in running]
  assert [process.returncode for process in running] == [0, 0], outputs
  assert outputs[0][0] == outputs[1][0]
  assert outputs[0][0].startswith("300 30 ")
  assert outputs[0][0].strip().endswith("False")  # TensorFlow is not imported
  assert len(list(tmp_path.glob("countdown/*/*"))) == 1


def test_the_cache_folder_follows_the_users_setting(monkeypatch, tmp_path):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  assert cache_dir() == tmp_path / "rspo_jax" / "tfds"
  monkeypatch.delenv("XDG_CACHE_HOME")
  monkeypatch.setenv("HOME", str(tmp_path / "home"))
  assert cache_dir() == tmp_path / "home" / ".cache" / "rspo_jax" / "tfds"


def break_info(version):
  (version / "dataset_info.json").write_text("{")


def lose_info(version):
  (version / "dataset_info.json").unlink()


def lose_records(version):
  for path in version.glob("*train*"):
    path.unlink()


@pytest.mark.parametrize("damage", [break_info, lose_info, lose_records])
def test_a_damaged_folder_is_reported_with_a_cure_that_works(tmp_path, damage):
  load_countdown(tmp_path, **SPEC)
  version = version_folder(tmp_path)
  damage(version)
  with pytest.raises(ValueError, match=rf"(?s){version} (cannot be read|is broken) .*Delete"):
    load_countdown(tmp_path, **SPEC)
  for path in version.iterdir():
    path.unlink()
  version.rmdir()
  assert len(load_countdown(tmp_path, **SPEC)["train"]) == 120


@pytest.mark.parametrize(
  ("spec", "message"),
  [
    ({"numbres": 3}, "no setting numbres; it has numbers"),
    ({"operators": "+"}, "Add another operator"),
    ({"high": 2, "target_high": 5}, "Found only"),
  ],
)
def test_an_impossible_spec_is_rejected_and_leaves_no_files(tmp_path, spec, message):
  with pytest.raises(ValueError, match=message):
    load_countdown(tmp_path, **spec)
  assert not list(tmp_path.glob("countdown/*/*.0.0"))


def parse_even(record):
  if record % 2:
    raise ValueError("odd")
  return Example(str(record), record)


def test_a_broken_record_is_reported_or_skipped_and_counted():
  with pytest.raises(ValueError, match=r"Record 2 of toy/train is broken \(ValueError: odd\).*on_broken='skip'"):
    read_split("toy/train", [0, 2, 3, 4, 5], parse_even)
  split = read_split("toy/train", [0, 2, 3, 4, 5], parse_even, on_broken="skip")
  assert golds(split.examples) == [0, 2, 4]
  assert split.skipped == (2, 4)
  with pytest.raises(ValueError, match="'fail' or 'skip'"):
    read_split("toy/train", [0], parse_even, on_broken="ignore")


@pytest.mark.parametrize(("records", "message"), [([], "0 records, 0 of them"), ([1, 3], "2 records, 2 of them")])
def test_an_empty_split_is_rejected_with_the_cure(records, message):
  with pytest.raises(ValueError, match=f"toy/test is empty: {message}.*Ask the data set for more"):
    read_split("toy/test", records, parse_even, on_broken="skip")


class Damaged:
  """Generated records, some of them changed."""

  def __init__(self, records, changes):
    self.records, self.changes = records, changes

  def __len__(self):
    return len(self.records)

  def __getitem__(self, index):
    record = dict(self.records[index])
    for field, value in self.changes.get(index, {}).items():
      if value is None:
        del record[field]
      else:
        record[field] = value
    return record


@pytest.mark.parametrize(
  ("field", "value", "cause"),
  [
    ("numbers", [3], "2 to 6 positive integers"),
    ("numbers", [3, 0, 4], "positive integers"),
    ("numbers", [3.5, 1.0, 4.0], "positive integers"),
    ("numbers", None, "KeyError: 'numbers'"),
    ("target", -4, "target has -4"),
    ("target", None, "KeyError: 'target'"),
    ("demonstration", None, "KeyError: 'demonstration'"),
    ("demonstration", b"\xff", "UnicodeDecodeError"),
    ("demonstration", b"3++4", "'not an expression', 'wrong value'"),
  ],
)
def test_a_broken_countdown_record_is_detected_on_reading(folder, monkeypatch, field, value, cause):
  prepare = dataset.prepare
  monkeypatch.setattr(
    dataset,
    "prepare",
    lambda *args: {name: Damaged(records, {7: {field: value}}) for name, records in prepare(*args).items()},
  )
  with pytest.raises(ValueError, match=f"Record 7 of countdown/train in .*{cause}"):
    load_countdown(folder, **SPEC)
  splits = load_countdown(folder, on_broken="skip", **SPEC)
  assert splits["train"].skipped == splits["test"].skipped == (7,)
  assert len(splits["train"]) == 119


def test_corrupted_bytes_on_disk_are_detected(tmp_path):
  load_countdown(tmp_path, **SPEC)
  (path,) = version_folder(tmp_path).glob("*train*")
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 0xFF
  path.write_bytes(content)
  with pytest.raises(ValueError, match=r"countdown/train in .* is broken|cannot be read"):
    load_countdown(tmp_path, **SPEC)


def test_the_batch_of_a_step_does_not_depend_on_how_it_is_reached():
  split = numbered(11)
  iterator = batches(split, 4, seed=3)
  first = [next(iterator) for _ in range(9)]
  assert iterator.position == 9
  for start in range(9):
    resumed = batches(split, 4, seed=3, start=start)
    assert [next(resumed) for _ in range(9 - start)] == first[start:]
  iterator.position = 2
  assert next(iterator) == first[2]
  assert [iterator.at(step) for step in range(9)] == first
  assert iterator.position == 3
  assert json.loads(json.dumps(iterator.position)) == iterator.position
  assert [batch for batch, _ in zip(batches(split, 4, seed=3), range(9), strict=False)] == first


@pytest.mark.parametrize(("count", "batch_size"), [(12, 4), (11, 4), (5, 8), (1, 3)])
def test_every_epoch_contains_every_example_once(count, batch_size):
  data = batches(numbered(count), batch_size, seed=1)
  stream = [gold for step in range(4 * count) for gold in golds(data.at(step))]
  epochs = [stream[i : i + count] for i in range(0, 4 * count, count)]
  assert all(Counter(epoch) == Counter(range(count)) for epoch in epochs)
  if count > 4:
    assert epochs[0] != epochs[1] != list(range(count))


def test_the_order_depends_on_the_seed_alone_in_every_process():
  split = numbered(200)
  order = golds(batches(split, 200, seed=4).at(0))
  assert order != golds(batches(split, 200, seed=5).at(0))
  code = (
    "from rspo_jax.data import *; s = Split('n', tuple(Example(str(i), i) for i in range(200)));"
    "print([e.gold for e in batches(s, 200, seed=4).at(0)])"
  )
  environment = {**os.environ, "PYTHONHASHSEED": "77"}
  completed = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
  assert json.loads(completed.stdout) == order


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"batch_size": 0}, "batch_size is 0"),
    ({"batch_size": 4, "seed": -1}, "seed is -1"),
    ({"batch_size": 4, "start": -1}, "start is -1"),
  ],
)
def test_arguments_of_batches_out_of_range_are_rejected(arguments, message):
  with pytest.raises(ValueError, match=message):
    batches(numbered(8), **{"seed": 0, **arguments})
  with pytest.raises(ValueError, match="step is -1"):
    batches(numbered(8), 4, seed=0).at(-1)
