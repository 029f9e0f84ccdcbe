"""Local files of every format, public benchmark files among them, and the errors for broken records."""

import ast
import dataclasses
import gzip
import inspect
import json
import logging
import re

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from rspo_jax.data.datasets import DATASETS, load_files
from rspo_jax.data.files import FilesSpec, field_of, parse_template
from rspo_jax.rewards.code.reward import task_from_record
from rspo_jax.rewards.math.reward import gold_answers
from tests.support import math_cases
from tests.support.paths import ROOT

ROWS = [{"question": f"{i} + 1?", "answer": f"One more.\n#### {i + 1}", "level": i / 4} for i in range(5)]
GSM = {"prompt": "question", "gold": "answer", "gold_from": "####"}


def lines(rows):
  return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write_arrow(path, rows):
  table = pyarrow.Table.from_pylist(rows)
  with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
    writer.write_table(table, max_chunksize=2)


def write_arrow_file(path, rows):
  table = pyarrow.Table.from_pylist(rows)
  with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_file(sink, table.schema) as writer:
    writer.write_table(table, max_chunksize=2)


def write_parquet(path, rows):
  path.parent.mkdir(parents=True, exist_ok=True)
  pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


WRITERS = {
  "rows.jsonl": lambda path, rows: path.write_bytes(lines(rows)),
  "bom.jsonl": lambda path, rows: path.write_bytes(b"\xef\xbb\xbf" + lines(rows).replace(b"\n", b"\r\n\n")),
  "rows.jsonl.gz": lambda path, rows: path.write_bytes(gzip.compress(lines(rows))),
  "rows.json": lambda path, rows: path.write_text(json.dumps(rows, indent=2)),
  "lines.json": lambda path, rows: path.write_bytes(lines(rows)),
  "rows.json.gz": lambda path, rows: path.write_bytes(gzip.compress(json.dumps(rows).encode())),
  "rows.parquet": write_parquet,
  "rows.arrow": write_arrow,
  "file.arrow": write_arrow_file,
}


def saved(folder, rows, shards=1, **state):
  """A folder as `Dataset.save_to_disk` of `datasets` 5.2.0 writes it."""
  folder.mkdir(parents=True)
  names = [f"data-{i:05d}-of-{shards:05d}.arrow" for i in range(shards)]
  for i, name in enumerate(names):
    write_arrow(folder / name, rows[i * len(rows) // shards : (i + 1) * len(rows) // shards])
  (folder / "dataset_info.json").write_text("{}")
  (folder / "state.json").write_text(
    json.dumps({"_data_files": [{"filename": n} for n in names], "_split": None} | state)
  )


def golds(split):
  return [example.gold for example in split.examples]


@pytest.mark.parametrize("name", WRITERS)
def test_every_file_format_gives_the_same_examples(tmp_path, name):
  WRITERS[name](tmp_path / name, ROWS)
  splits = DATASETS["files"](tmp_path, train=name, demonstration="answer", metadata=("level",), **GSM)
  (split,) = splits.values()
  assert golds(split) == ["1", "2", "3", "4", "5"]
  assert [example.prompt for example in split.examples] == [row["question"] for row in ROWS]
  assert split[2].demonstration == "One more.\n#### 3"
  assert split[2].metadata == {"level": 0.5}
  assert split[2].source == "" and split.skipped == ()


def test_folders_saved_by_datasets_are_read_through_their_lists_of_files(tmp_path):
  saved(tmp_path / "one", ROWS, shards=2)
  (tmp_path / "one" / "data-00009-of-00009.arrow").write_bytes(b"left over")
  assert golds(load_files(tmp_path / "one", **GSM)["train"]) == ["1", "2", "3", "4", "5"]
  assert list(load_files(tmp_path, test="one", **GSM)) == ["test"]
  for split, rows in (("train", ROWS[:3]), ("test", ROWS[3:4]), ("validation", ROWS[4:])):
    saved(tmp_path / "dict" / split, rows)
  (tmp_path / "dict" / "dataset_dict.json").write_text('{"splits": ["train", "test", "validation"]}')
  for options in ({}, {"train": ".", "test": "."}, {"train": "train", "test": ["test"]}):
    splits = load_files(tmp_path / "dict", **GSM, **options)
    assert [golds(splits[split]) for split in ("train", "test")] == [["1", "2", "3"], ["4"]]
  assert golds(load_files(tmp_path, test="dict/validation", **GSM)["test"]) == ["5"]
  saved(tmp_path / "selected", ROWS, _indices_data_files=[{"filename": "indices.arrow"}])
  with pytest.raises(ValueError, match=r"selected stores a selection.*flatten_indices"):
    load_files(tmp_path / "selected", **GSM)


def test_a_snapshot_of_the_hub_is_split_by_the_paths_of_its_files(tmp_path):
  for config in ("main", "socratic"):
    write_parquet(tmp_path / config / "train-00000-of-00002.parquet", ROWS[:2])
    write_parquet(tmp_path / config / "train-00001-of-00002.parquet", ROWS[2:4])
    write_parquet(tmp_path / config / "test-00000-of-00001.parquet", ROWS[4:])
  (tmp_path / "README.md").write_text("train test")
  write_parquet(tmp_path / "main" / ".cache" / "train.parquet", ROWS)
  splits = load_files(tmp_path / "main", **GSM)
  assert [golds(splits[split]) for split in ("train", "test")] == [["1", "2", "3", "4"], ["5"]]
  assert golds(load_files(tmp_path, train="main/train-*.parquet", **GSM)["train"]) == ["1", "2", "3", "4"]
  assert golds(load_files(tmp_path, test="**/main/test-*", **GSM)["test"]) == ["5"]
  with pytest.raises(ValueError, match=r"files of train in several folders: .*main, .*socratic. Name one"):
    load_files(tmp_path, **GSM)


def test_a_folder_given_as_a_split_needs_no_split_names_in_its_paths(tmp_path):
  write_parquet(tmp_path / "part" / "0000.parquet", ROWS[:2])
  write_parquet(tmp_path / "part" / "0001.parquet", ROWS[2:])
  assert golds(load_files(tmp_path, train="part", **GSM)["train"]) == ["1", "2", "3", "4", "5"]
  with pytest.raises(ValueError, match=r"No path in .*part names train or test; .* has 0000.parquet, 0001.parquet"):
    load_files(tmp_path / "part", **GSM)
  (tmp_path / "contrast").mkdir()
  (tmp_path / "contrast" / "trainer.jsonl").write_bytes(lines(ROWS))  # train is only part of a word
  with pytest.raises(ValueError, match="No path in"):
    load_files(tmp_path / "contrast", **GSM)


def test_files_are_read_in_the_order_they_are_listed(tmp_path):
  for name, rows in (("a.jsonl", ROWS[:2]), ("b[1].jsonl", ROWS[2:3]), ("c.json", ROWS[3:])):
    WRITERS["rows.json" if name.endswith("json") else "rows.jsonl"](tmp_path / name, rows)
  train = ["c.json", str(tmp_path / "a.jsonl"), "b[1].jsonl"]
  assert golds(load_files(tmp_path, train=train, **GSM)["train"]) == ["4", "5", "1", "2", "3"]
  assert golds(load_files(tmp_path, train="?.js*", limit=3, **GSM)["train"]) == ["1", "2", "4"]
  with pytest.raises(ValueError, match=r"a.jsonl twice; name it once"):
    load_files(tmp_path, train=("a.jsonl", "?.jsonl"), **GSM)


def test_relative_paths_start_from_the_working_directory_without_data_dir(tmp_path, monkeypatch):
  (tmp_path / "x.jsonl").write_bytes(lines(ROWS))
  monkeypatch.chdir(tmp_path)
  assert len(load_files(train="x.jsonl", **GSM)["train"]) == 5


@pytest.mark.parametrize(
  ("fields", "options", "prompt", "gold"),
  [
    ({"q": "x?", "a": "1"}, {"prompt": "{q}\nIn \\boxed{{}}."}, "x?\nIn \\boxed{}.", "1"),
    ({"q": "x?", "a": 27.0}, {"prompt": "Q: {q} {a}"}, "Q: x? 27", "27"),
    ({"q": "x?", "a": 0.5}, {}, "x?", "0.5"),
    ({"q": "x?", "a": -3}, {}, "x?", "-3"),
    ({"q": "x?", "a": ["1", "2"]}, {}, "x?", (("1", "2"),)),
    ({"q": "x?", "a": ["1", 2.0]}, {"gold_list": "any"}, "x?", ("1", "2")),
    ({"q": "x?", "a": ["1"]}, {}, "x?", "1"),
    ({"q": "x?", "a": r"so $\boxed{\frac{1}{2}}$."}, {"gold_from": "boxed"}, "x?", r"\frac{1}{2}"),
    ({"q": "x?", "a": "3 and 4 make 7."}, {"gold_from": "number"}, "x?", "7"),
    ({"q": "x?", "a": {"test": "t"}}, {}, "x?", {"test": "t"}),
    ({"q": "x?", "a": "1"}, {"gold": ""}, "x?", {"q": "x?", "a": "1"}),
    (
      {"prompt": [{"content": "x?"}], "reward_model": {"ground_truth": "1"}, "a.b": "dotted"},
      {"prompt": "{prompt.0.content} {a.b}", "gold": "reward_model.ground_truth"},
      "x? dotted",
      "1",
    ),
  ],
)
def test_prompts_and_gold_answers_are_filled_from_fields(tmp_path, fields, options, prompt, gold):
  (tmp_path / "x.jsonl").write_bytes(lines([fields]))
  (example,) = load_files(tmp_path, train="x.jsonl", **{"prompt": "q", "gold": "a"} | options)["train"].examples
  assert (example.prompt, example.gold) == (prompt, gold)
  if isinstance(gold, tuple):
    assert gold_answers(gold) == (("1", "2") if "gold_list" in options else ("1, 2",))


BROKEN = [  # (line, cause in the message)
  (b'{"question": "x"', "not JSON"),
  (b"version https://git-lfs", "not JSON: .*it begins with b'version"),
  (b"[1, 2]", "a list; want an object with fields"),
  (b"null", "a NoneType; want an object"),
  (b"\xff\xfe", "not JSON: 'utf-8' codec"),
  (b'{"question": "x"}', "there is no field 'answer'; it has question"),
  (b'{"answer": "#### 1", "q": 2}', "there is no field 'question'; it has answer, q"),
  (b"{}", "it has none"),
  (b'{"question": null, "answer": "#### 1"}', "'question' is 'None' .NoneType.; want text or a number"),
  (b'{"question": ["x"], "answer": "#### 1"}', "'question' is .* .list.; want text"),
  (b'{"question": true, "answer": "#### 1"}', "'question' is 'True' .bool."),
  (b'{"question": " \\n", "answer": "#### 1"}', "'question' is empty"),
  (b'{"question": "\\ud800", "answer": "#### 1"}', "UnicodeEncodeError"),
  (b'{"question": "x", "answer": "no hashes"}', "no answer in the form '####'; it ends with 'no hashes'"),
  (b'{"question": "x", "answer": ["#### 1"]}', "'answer' is .* .list."),
  (b'{"question": "x", "answer": NaN}', "'answer' is 'nan'"),
  (b"[" * 100_000, "RecursionError|not JSON|recursion"),
]


@pytest.mark.parametrize(("line", "cause"), BROKEN, ids=[cause[:30] for _, cause in BROKEN])
def test_a_broken_line_is_reported_by_number_or_dropped_and_counted(tmp_path, caplog, line, cause):
  good = lines(ROWS).splitlines()
  (tmp_path / "x.jsonl").write_bytes(b"\n".join([good[0], b"", line, good[1]]))
  with pytest.raises(ValueError, match=f"(?s)x.jsonl, line 3 is broken .*{cause}.*on_broken='skip'"):
    load_files(tmp_path, train="x.jsonl", **GSM)
  with caplog.at_level(logging.WARNING):
    split = load_files(tmp_path, train="x.jsonl", on_broken="skip", **GSM)["train"]
  assert golds(split) == ["1", "2"]
  assert split.skipped == (1,)
  (warning,) = caplog.messages
  assert "1 of 3 records are broken and dropped" in warning and "x.jsonl, line 3" in warning


@pytest.mark.parametrize(
  ("gold", "value"), [("", {}), ("a", ""), ("a", []), ("a", [" "]), ("a", None), ("a", {}), ("a", [["1"]])]
)
def test_a_record_without_an_answer_is_broken(tmp_path, gold, value):
  (tmp_path / "x.jsonl").write_bytes(lines([{"q": "x?", "a": value}]))
  if gold:
    with pytest.raises(ValueError, match="x.jsonl, line 1 is broken"):
      load_files(tmp_path, train="x.jsonl", prompt="q", gold=gold)


def test_many_broken_lines_give_one_warning_with_the_first_three(tmp_path, caplog):
  (tmp_path / "x.jsonl").write_bytes(lines(ROWS) + b"?\n" * 50)
  split = load_files(tmp_path, train="x.jsonl", on_broken="skip", **GSM)["train"]
  assert len(split.skipped) == 50
  (warning,) = caplog.messages
  assert "50 of 55" in warning and "line 6" in warning and "line 8" in warning and "line 9" not in warning


def test_a_truncated_archive_fails_or_yields_its_complete_lines(tmp_path):
  rows = [{**ROWS[0], "noise": str(hash((i, "x")))} for i in range(5000)]
  archive = gzip.compress(lines(rows))
  (tmp_path / "x.jsonl.gz").write_bytes(archive[: len(archive) // 2])
  with pytest.raises(ValueError, match=r"x.jsonl.gz, after line \d+ is broken .*cannot be decompressed"):
    load_files(tmp_path, train="x.jsonl.gz", **GSM)
  split = load_files(tmp_path, train="x.jsonl.gz", on_broken="skip", **GSM)["train"]
  assert 1000 < len(split) < 4000
  assert split.skipped == (len(split),)
  (tmp_path / "y.jsonl.gz").write_bytes(lines(rows))
  with pytest.raises(ValueError, match="(?s)y.jsonl.gz, after line 0.*Not a gzipped file"):
    load_files(tmp_path, train="y.jsonl.gz", on_broken="skip", **GSM)


@pytest.mark.parametrize("on_broken", ["fail", "skip"])
@pytest.mark.parametrize(
  ("name", "content", "message"),
  [
    ("x.jsonl", b"\n \n", "x.jsonl is empty: 0 records, 0 of them broken. Name files with records"),
    ("x.parquet", b"version https://git-lfs", "x.parquet cannot be read as parquet: .*pointer of Git LFS"),
    ("x.arrow", b"version https://git-lfs", "x.arrow cannot be read as Arrow"),
    ("x.arrow", b"", "x.arrow cannot be read as Arrow"),
    ("x.json", b'[{"question": 1},\n]', "x.json is not a JSON list: .*line 2"),
    ("x.csv", b"question,answer", "x.csv has an unknown format; want one of .jsonl, .jsonl.gz"),
  ],
)
def test_an_unreadable_file_is_an_error_even_if_broken_records_are_skipped(tmp_path, name, content, message, on_broken):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(ValueError, match=message):
    load_files(tmp_path, train=name, on_broken=on_broken, **GSM)


def test_a_field_that_no_record_has_is_an_error_even_if_broken_records_are_skipped(tmp_path):
  (tmp_path / "x.jsonl").write_bytes(lines(ROWS))
  with pytest.raises(ValueError, match=r"is empty: 5 records, 5 of them broken: .*no field 'problem'; it has question"):
    load_files(tmp_path, train="x.jsonl", on_broken="skip", prompt="problem", gold="answer")


def test_holdout_moves_records_chosen_by_the_seed_to_the_test_split(tmp_path):
  (tmp_path / "x.jsonl").write_bytes(lines(ROWS))
  test_splits = set()
  for seed in range(20):
    splits = load_files(tmp_path, train="x.jsonl", holdout=2, seed=seed, **GSM)
    train, test = golds(splits["train"]), golds(splits["test"])
    assert sorted(train + test) == ["1", "2", "3", "4", "5"]
    assert (train, test) == (sorted(train), sorted(test)) and len(test) == 2
    test_splits.add(tuple(test))
  assert len(test_splits) > 3
  assert load_files(tmp_path, train="x.jsonl", holdout=2, seed=1, **GSM) == load_files(
    tmp_path, train="x.jsonl", holdout=2, seed=1, **GSM
  )
  with pytest.raises(ValueError, match="holdout is 5, but .* has 5 examples; hold out fewer"):
    load_files(tmp_path, train="x.jsonl", holdout=5, **GSM)
  assert list(load_files(tmp_path, train="x.jsonl", **GSM)) == ["train"]


def test_the_difficulty_band_filters_training_records_only(tmp_path):
  (tmp_path / "x.jsonl").write_bytes(lines(ROWS))
  splits = load_files(tmp_path, train="x.jsonl", test="x.json*", difficulty="level", band=(0.25, 0.75), **GSM)
  assert golds(splits["train"]) == ["2", "3", "4"]
  assert splits["train"][0].metadata == {"level": 0.25}
  assert len(splits["test"]) == 5
  held = load_files(tmp_path, train="x.jsonl", holdout=4, difficulty="level", band=(0, 1), **GSM)
  assert len(held["test"]) == 4
  with pytest.raises(ValueError, match=r"no example with level in \[2, 3\]; its values are from 0 to 1. Widen band"):
    load_files(tmp_path, train="x.jsonl", difficulty="level", band=(2, 3), **GSM)
  with pytest.raises(ValueError, match="'question' is '0 . 1.' .str.; want a number"):
    load_files(tmp_path, train="x.jsonl", difficulty="question", **GSM)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"promt": "q"}, "A data set of files has no setting promt; it has prompt, gold"),
    ({"prompt": None}, "the template is None"),
    ({"prompt": "{question"}, "is broken: expected '}'.*{{ and }} for braces"),
    ({"prompt": r"{question} \boxed{}"}, "braces around something other than a field"),
    ({"prompt": "{question:>3}"}, "braces around something other"),
    ({"prompt": "{question!r}"}, "braces around something other"),
    ({"prompt": "all {{the}} same"}, "has no field"),
    ({"demonstration": "{answer"}, "is broken"),
    ({"gold_from": "hashes"}, "gold_from is 'hashes'; want one of '', 'boxed', '####', 'number'"),
    ({"gold_list": "some"}, "gold_list is 'some'; want one of 'all', 'any'"),
    ({"limit": -1}, "limit is -1"),
    ({"holdout": 1.5}, "holdout is 1.5"),
    ({"holdout": 1, "test": "x.jsonl"}, "holdout is 1 and test is 'x.jsonl'; want one of them"),
    ({"metadata": "level"}, r"metadata is 'level'; want a sequence of fields, such as \('level',\)"),
    ({"band": (0, 1)}, "but difficulty is empty; name the field with difficulty="),
    ({"difficulty": "level", "band": (1, 0)}, "want .low, high. with low <= high"),
    ({"on_broken": "ignore"}, "on_broken is 'ignore'"),
    ({"train": "y.jsonl"}, r"y.jsonl is no file, folder or pattern that matches one; .* has x.jsonl\."),
    ({"train": "none/y.jsonl"}, "there is no folder .*none"),
  ],
)
def test_impossible_settings_are_rejected_with_the_cure(tmp_path, options, message):
  (tmp_path / "x.jsonl").write_bytes(lines(ROWS))
  with pytest.raises(ValueError, match=message):
    load_files(tmp_path, **{"train": "x.jsonl", **GSM, **options})


def test_missing_options_folders_and_fields_are_reported(tmp_path):
  with pytest.raises(ValueError, match="Files need gold; name the fields"):
    load_files(tmp_path, train="x.jsonl", prompt="q")
  with pytest.raises(ValueError, match=r"none is not a folder"):
    load_files(tmp_path / "none", **GSM)
  with pytest.raises(ValueError, match=r"names train or test; .* has no files"):
    load_files(tmp_path, **GSM)
  assert field_of({"a": [{"b": 1}]}, "a.0.b") == 1
  with pytest.raises(ValueError, match="no field 'a.1.b'; it has a"):
    field_of({"a": [{"b": 1}]}, "a.1.b")
  assert parse_template("a") == [("", "a")]
  assert FilesSpec("q", "a").band == FilesSpec.band


# Public files, with the options in docs/data.md.

DOCUMENT = (ROOT / "docs" / "data.md").read_text()
TABLE = re.findall(r"^\| `([\w.]+)` \| (\d+) \| `(\{.*\})` \| `(\w+)` \|$", DOCUMENT, re.MULTILINE)


def test_the_document_has_options_for_every_public_file():
  assert [name.partition(".")[0] for name, *_ in TABLE] == [*math_cases.FILES, "humaneval"]


@pytest.mark.parametrize(("name", "rows", "options", "reward"), TABLE, ids=[name for name, *_ in TABLE])
def test_a_public_file_is_read_with_the_options_in_the_document(name, rows, options, reward):
  if not (math_cases.DATA / name).exists():
    pytest.skip(f"{math_cases.DATA / name} is absent; it is a public benchmark file that is not part of the project")
  split = load_files(math_cases.DATA, test=name, **ast.literal_eval(options))["test"]
  assert len(split) == int(rows)
  if reward == "code":
    assert all(task_from_record(example.gold).prompt == example.prompt for example in split.examples)
    return
  answers = [gold.answer for gold in math_cases.golds(name.partition(".")[0])]
  if name == "amc23.jsonl":
    answers = [str(int(float(answer))) for answer in answers]
  assert [answer for gold in golds(split) for answer in gold_answers(gold)] == answers


def test_the_document_lists_every_option_with_its_default():
  (table,) = re.findall(r"^\| option \|.*\n((?:\|.*\n)+)", DOCUMENT, re.MULTILINE)
  documented = {}
  for line in table.splitlines()[1:]:
    names, default, _ = (cell.strip() for cell in line.strip("|").split("|"))
    documented |= dict.fromkeys(re.findall(r"`(\w+)`", names), default.strip("`"))
  on_broken = inspect.signature(load_files).parameters["on_broken"].default
  fields = {name: field.default for name, field in FilesSpec.__dataclass_fields__.items()} | {"on_broken": on_broken}
  assert documented.keys() == fields.keys()
  for name, default in documented.items():
    if name != "band":  # the table describes it in words
      assert default == "" if fields[name] is dataclasses.MISSING else ast.literal_eval(default) == fields[name], name
