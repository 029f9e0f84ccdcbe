"""Imports go down only. The table is the house; a new module has to be given its floor here."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
FLOORS = {
  "types": 0,
  "routing": 1,
  "router_shift": 1,
  "terms": 1,
  "token_objectives": 1,
  "sequence_objectives": 1,
  "aggregation": 1,
  "objectives": 1,
  "penalties": 1,
  "mismatch": 1,
  "balance": 1,
  "parameters": 1,
  "advantages": 1,
  "reductions": 1,
  "minibatches": 1,
  "diagnostics": 1,
  "sampling": 2,
  "scoring": 2,
  "slots": 2,
  "train_step": 2,
  "probing": 2,
  "mesh": 3,
  "data": 3,
  "datasets": 3,
  "local_files": 3,
  "record_files": 3,
  "curriculum": 3,
  "countdown": 3,
  "countdown_problems": 3,
  "countdown_tfds": 3,
  "knights": 3,
  "knights_answers": 3,
  "knights_problems": 3,
  "knights_tfds": 3,
  "tfds_folders": 3,
  "tokenizer": 3,
  "hf_tokenizer": 3,
  "chat_template": 3,
  "rewards": 3,
  "judging": 3,
  "text_rewards": 3,
  "composed_rewards": 3,
  "custom_rewards": 3,
  "custom_guest": 3,
  "worker_pool": 3,
  "math_answers": 3,
  "math_shortcuts": 3,
  "math_rewards": 3,
  "sandbox": 3,
  "sandbox_process": 3,
  "sandbox_guest": 3,
  "code_rewards": 3,
  "code_guests": 3,
  "evaluation": 3,
  "estimators": 3,
  "completions": 3,
  "continuous": 3,
  "outside_engine": 3,
  "engine_protocol": 3,
  "checkpoint": 3,
  "workdir": 3,
  "metrics": 3,
  "__init__": 3,
}
HOST_ONLY = ("absl", "ml_collections")
DEVICE_SIDE = ("numpy", "os", "time", "pathlib", "orbax", "grain", "tensorflow_datasets")


def imports(path):
  """Dotted names a file imports, `from a import b` as a.b, at any depth."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path} has a relative import"
      yield from (f"{node.module}.{alias.name}" for alias in node.names)


def library_imports(path):
  """The modules of rspo_jax that a file imports."""
  for name in imports(path):
    top, *rest = name.split(".")
    if top == "rspo_jax" and rest:
      assert rest[:1] and (rest[0] in FLOORS), f"{path.name} imports {name}, which has no floor"
      yield rest[0]


def modules(folder):
  return sorted(path for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", modules("rspo_jax"), ids=lambda path: path.stem)
def test_library_modules_import_nothing_above_them(path):
  floor = FLOORS[path.stem]
  for name in library_imports(path):
    assert FLOORS[name] <= floor, f"{path.stem} (F{floor}) imports {name} (F{FLOORS[name]})"
  tops = {name.split(".")[0] for name in imports(path)}
  assert not tops & {"models", "experiments", "benchmarks", "tests", "torch", "transformers", *HOST_ONLY}
  if floor < 3:
    assert not tops & set(DEVICE_SIDE), "what is jitted knows no files, clocks or host arrays"


@pytest.mark.parametrize("path", modules("models"), ids=lambda path: path.stem)
def test_models_know_only_the_types_of_the_library(path):
  assert set(library_imports(path)) <= {"types"}
  tops = {name.split(".")[0] for name in imports(path)}
  assert not tops & {"experiments", "benchmarks", "tests", *HOST_ONLY}


def test_linen_modules_stay_inside_models():
  for path in modules("rspo_jax") + modules("experiments"):
    assert not any(name.startswith(("flax.linen", "flax.nnx")) for name in imports(path)), path


def test_experiments_import_nothing_that_is_only_for_tests():
  for path in modules("experiments"):
    tops = {name.split(".")[0] for name in imports(path)}
    assert not tops & {"tests", "benchmarks", "torch", "transformers", "pytest"}, path


def test_every_module_has_a_floor():
  assert {path.stem for path in modules("rspo_jax")} == set(FLOORS)
