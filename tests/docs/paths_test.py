"""Every file, module, link and make target that the documents name exists."""

import importlib
import re

import pytest

from tests.support.paths import DOCS, ROOT

DOCUMENTS = [ROOT / "README.md", ROOT / "BUILD.md", ROOT / "BENCHMARKS.md", *sorted(DOCS.glob("*.md"))]
FOLDERS = r"(?:rspo_jax|models|experiments|benchmarks|tests|docs|\.ci)"
FILE = re.compile(rf"(?<![\w./-]){FOLDERS}/[\w./*-]*[\w*]|(?<=`)[\w-]+\.(?:py|md|toml|txt)(?=`)")
MODULE = re.compile(r"(?<=`)(?:rspo_jax|models|experiments|benchmarks|tests)(?:\.\w+)+(?=[`(])")
WRITTEN_BY_COMMANDS = {"results.md"}


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
  missing = [path for path in set(FILE.findall(document.read_text())) - WRITTEN_BY_COMMANDS if not list(ROOT.glob(path))]
  assert not missing


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


def test_every_document_is_checked():
  found = [path for path in FILE.findall("`rspo_jax/rl_step.py`, tests/docs/*.py, `BUILD.md`, x/models/config.py, a.py")]
  assert found == ["rspo_jax/rl_step.py", "tests/docs/*.py", "BUILD.md"]
  assert exists("rspo_jax.rl_step.rl_step") and exists("rspo_jax.types.Policy.init")
  assert not exists("rspo_jax.rl_step.rl_stp") and not exists("rspo_jax.absent")
