"""The benchmarks are not run by tests; their modules and the functions that workers call are checked to exist."""

import importlib
import re

import pytest

from benchmarks.run import SECTIONS
from tests.support.paths import ROOT

MODULES = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py") if path.stem != "__init__")
SOURCES = {name: (ROOT / "benchmarks" / f"{name}.py").read_text() for name in MODULES}


@pytest.mark.parametrize("name", MODULES)
def test_every_module_imports(name):
  importlib.import_module(f"benchmarks.{name}")


def test_functions_that_workers_call_exist():
  targets = {target for text in SOURCES.values() for target in re.findall(r'"benchmarks\.(\w+:\w+)"', text)}
  assert len(targets) > 5
  for target in targets:
    module, function = target.split(":")
    assert callable(getattr(importlib.import_module(f"benchmarks.{module}"), function)), target


def test_commands_of_the_document_exist():
  text = (ROOT / "BENCHMARKS.md").read_text()
  modules = set(re.findall(r"python -m benchmarks\.(\w+)", text))
  sections = set(re.findall(r"--only (\w+)", text))
  assert "run" in modules and modules <= set(MODULES)
  assert sections and sections <= set(SECTIONS)
