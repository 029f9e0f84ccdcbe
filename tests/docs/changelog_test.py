"""The tables of CHANGELOG.md are complete, and today's names in them exist."""

import dataclasses
import re
import typing

from experiments.config import ExperimentConfig
from experiments.setup.renamed_keys import RENAMED
from tests.docs.paths_test import MODULE, exists
from tests.support.documents import plain_type
from tests.support.paths import ROOT

TEXT = (ROOT / "CHANGELOG.md").read_text()
CHANGED = TEXT.split("### Changed: layout, names and configuration")[1].split("\n### ")[0]
ROWS = [tuple(cell.strip() for cell in row) for row in re.findall(r"^\| (.*?) \| (.*?) \|$", CHANGED, re.MULTILINE)]


def test_every_renamed_key_is_listed_with_the_new_one():
  listed = {(old.strip("`"), new.replace("`", "")) for old, new in ROWS}
  assert {(old, new.replace("config.", "")) for old, new in RENAMED.items()} <= listed


def test_every_group_is_listed_with_its_class():
  kinds = {name: plain_type(kind) for name, kind in typing.get_type_hints(ExperimentConfig).items()}
  of_library = {name: kind for name, kind in kinds.items() if kind.__module__.startswith("rspo_jax.")}
  assert all(map(dataclasses.is_dataclass, of_library.values()))
  listed = {old.strip("`"): new.strip("`").split(".")[-1] for old, new in ROWS}
  assert {name: listed.get(name) for name in of_library} == {name: kind.__name__ for name, kind in of_library.items()}


def test_every_new_module_exists():
  names = [name for _, new in ROWS for name in MODULE.findall(new)]
  assert len(names) > 30
  assert not [name for name in names if not exists(name)]
