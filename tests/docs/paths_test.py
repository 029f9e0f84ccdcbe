"""Every file, module, link and make target that the documents name exists."""

import importlib
import re

import pytest

from tests.floors_test import FLOORS
from tests.support.paths import DOCS, ROOT

DOCUMENTS = [ROOT / "README.md", ROOT / "BUILD.md", ROOT / "BENCHMARKS.md", *sorted(DOCS.glob("*.md"))]
FOLDERS = ("rspo_jax", "models", "experiments", "benchmarks", "tests", "docs", ".ci")
FILE = re.compile(
  rf"(?<![\w./-])(?:{'|'.join(map(re.escape, FOLDERS))})/[\w./*-]*[\w*]"  # with its folder
  r"|(?<=`)[\w-]+\.(?:py|md|toml|txt|jinja)(?=`)"
)
MODULE = re.compile(r"(?:(?<=`)|(?<=-m ))(?:rspo_jax|models|experiments|benchmarks|tests)(?:\.\w+)+(?![\w.])")
FILE_NAMES = {path.name for folder in FOLDERS for path in (ROOT / folder).rglob("*")}  # for names without a folder
OUTSIDE = {"results.md", "chat_template.jinja"}  # written by a command, or part of a checkpoint


def exists(dotted):
  """Whether a dotted name is a module, or an attribute of one."""
  parts = dotted.split(".")
  for length in range(len(parts), 0, -1):
    try:
      value = importlib.import_module(".".join(parts[:length]))
    except ModuleNotFoundError:
      continue
    for name in parts[length:]:
      fields = getattr(value, "__dataclass_fields__", {})
      if not hasattr(value, name) and name not in fields:
        return False
      value = getattr(value, name, None)
    return True
  return False


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_every_file_exists(document):
  named = set(FILE.findall(document.read_text())) - OUTSIDE
  assert not [path for path in named if not (list(ROOT.glob(path)) or path in FILE_NAMES)]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_every_dotted_name_exists(document):
  assert not [name for name in set(MODULE.findall(document.read_text())) if not exists(name)]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_every_link_leads_to_a_file(document):
  links = re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text())
  assert not [link for link in links if not (document.parent / link).exists()]


def test_every_make_target_exists():
  makefile = (ROOT / "Makefile").read_text()
  for document in DOCUMENTS:
    for target in re.findall(r"`make (\w+)`", document.read_text()):
      assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{document.name} names make {target}"


def test_absent_names_are_found():
  text = "`rspo_jax/rl_step.py`, tests/docs/*.py, `BUILD.md`, x/models/config.py, a.py"
  assert FILE.findall(text) == ["rspo_jax/rl_step.py", "tests/docs/*.py", "BUILD.md"]
  assert exists("rspo_jax.rl_step.rl_step") and exists("rspo_jax.types.Policy.init")
  assert not exists("rspo_jax.rl_step.rl_stp") and not exists("rspo_jax.absent")


def test_build_shows_the_floors_of_the_library():
  lines = re.findall(r"^  (\d)  (.*)$", (ROOT / "BUILD.md").read_text(), re.MULTILINE)
  assert [(int(floor), tuple(subjects.split())) for floor, subjects in lines] == list(enumerate(FLOORS))


def test_every_change_names_one_file():
  section = (ROOT / "BUILD.md").read_text().split("## Where do I change ...?")[1].split("\n## ")[0]
  rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")][1:]
  assert len(rows) >= 20
  for change, file, *_ in rows:
    assert re.fullmatch(r"`[\w./]+`", file) and (ROOT / file.strip("`")).is_file(), change
