"""Imports go down only, by folder. A folder's floor is written here, and nowhere else."""

import ast

import pytest

from tests.support.paths import ROOT

FLOORS = (
  ("types", "lookup", "files"),
  ("masked", "mesh", "tokenization", "tasks"),
  ("objectives", "router", "run", "data"),
  ("training", "rewards"),
  ("rollout", "evaluation", "rl_functions"),
  ("rl_step",),
  ("rl_programs",),
)
FLOOR = {subject: floor for floor, subjects in enumerate(FLOORS) for subject in subjects}
# What is jitted knows no files, clocks or host arrays.
DEVICE_SIDE = (
  "types",
  "masked",
  "objectives",
  "router",
  "training",
  "rollout/sampling",
  "rollout/token_sampling",
  "rollout/decode_rows",
  "rollout/cacheless",
)
HOST_SIDE = {"numpy", "os", "time", "pathlib", "orbax", "grain", "tensorflow_datasets"}
COMMANDS_ONLY = {"absl", "ml_collections", "models", "experiments", "benchmarks", "tests", "torch", "transformers"}


def imports(path):
  """Dotted names a file imports, `from a import b` as a.b, at any depth."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path} has a relative import"
      yield from (f"{node.module}.{alias.name}" for alias in node.names)


def subjects(path):
  """The subjects of the library that a file imports."""
  return {name.split(".")[1] for name in imports(path) if name.startswith("rspo_jax.")}


def modules(folder):
  return sorted(path for path in (ROOT / folder).rglob("*.py"))


def name(path):
  return str(path.relative_to(ROOT).with_suffix(""))


@pytest.mark.parametrize("path", modules("rspo_jax"), ids=name)
def test_library_modules_import_nothing_above_their_folder(path):
  module = name(path).removeprefix("rspo_jax/")
  tops = {imported.split(".")[0] for imported in imports(path)}
  assert not tops & COMMANDS_ONLY
  if module == "__init__":
    return
  own = module.split("/")[0]
  above = {subject for subject in subjects(path) - {own} if FLOOR[subject] >= FLOOR[own]}
  assert not above, f"{own} (floor {FLOOR[own]}) imports {above}"
  if module.startswith(DEVICE_SIDE):
    assert not tops & HOST_SIDE


@pytest.mark.parametrize("path", modules("models"), ids=name)
def test_models_know_only_types_and_files_of_the_library(path):
  assert subjects(path) <= {"types", "files"}
  assert not {imported.split(".")[0] for imported in imports(path)} & (COMMANDS_ONLY - {"models"})


def test_linen_modules_stay_inside_models():
  for path in modules("rspo_jax") + modules("experiments"):
    assert not any(imported.startswith(("flax.linen", "flax.nnx")) for imported in imports(path)), path


def test_experiments_import_nothing_that_is_only_for_tests():
  for path in modules("experiments"):
    tops = {imported.split(".")[0] for imported in imports(path)}
    assert not tops & {"tests", "benchmarks", "torch", "transformers", "pytest"}, path


@pytest.mark.parametrize("folder", ["rspo_jax", "models", "experiments"])
def test_every_folder_says_what_belongs_in_it(folder):
  for package in {path.parent for path in modules(folder)}:
    assert ast.get_docstring(ast.parse((package / "__init__.py").read_text())), f"{package} has no docstring"
