"""The built wheel: its contents, its page, and that it works without the checkout."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.support.paths import DOCS, ROOT

PAGE = (DOCS / "package.md").read_text()
FILES = ("pyproject.toml", "requirements.txt", "LICENSE", "docs/package.md")
CODE, OUTPUT = re.search(r"^```python\n(.*?)^```\n\nprints\n\n```\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE).groups()

IMPORT = """
loaded = {".".join(name.split(".")[:2]) for name in sys.modules}
assert not loaded & {"rspo_jax.rewards", "rspo_jax.data", "rspo_jax.run"}, loaded
"""
# The workers load equivalence.py and shortcuts.py by their files.
MATH = r"""
from rspo_jax.data import Example
from rspo_jax.rewards import make_reward, score_completions

with make_reward("math", workers=1) as reward:
  scores = score_completions(reward, [r"\boxed{x^2+2x}", r"\boxed{x^2}", "#### x"], [Example("?", "x(x+2)")] * 3)
assert scores.reason == ("right", "wrong", "wrong"), scores
"""
CUSTOM = """
from rspo_jax.data import Example
from rspo_jax.rewards import make_reward, score_completions

with make_reward("user_rewards:root", scale=2.0, timeout=2.0, workers=1) as reward:
  scores = score_completions(reward, ["abcd", "hang"], [Example("?", None)] * 2)
assert scores.reward.tolist() == [4.0, 0.0], scores
assert scores.reason == ("", "timeout"), scores
"""
# The harness and the sandbox's child run from their source text.
PROGRAM = """
from rspo_jax.rewards.code import CodeTask, make_sandbox, run_task

task = CodeTask(asserts=("assert double(2) == 4", "assert double(-1) == -2"), entry_point="double")
for body, reason in (("x + x", "right"), ("x * x", "wrong answer")):
  verdict = run_task(f"def double(x): return {body}", task, sandbox=make_sandbox("rlimits"))
  assert verdict.reason == reason, verdict
"""
POOL = """
from rspo_jax.rewards import worker_pool

with worker_pool.WorkerPool("user_rewards:describe", workers=1, timeout=5.0) as pool:
  (outcome,) = pool.map([9.0])
assert outcome.value == (3.0, "code", worker_pool.__file__), outcome
"""
USER_REWARDS = """
import code, math, sys  # two subpackages of rspo_jax.rewards have these names too

def root(text, example, *, scale):
  while text == "hang":
    pass
  return scale * math.sqrt(len(text))

def describe(item):
  return math.sqrt(item), code.InteractiveConsole.__module__, sys.modules["__main__"].__file__
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
  """A folder with the installed wheel, built from a copy of the sources."""
  source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("target")
  shutil.copytree(ROOT / "rspo_jax", source / "rspo_jax", ignore=shutil.ignore_patterns("__pycache__"))
  for name in FILES:
    (source / name).parent.mkdir(exist_ok=True)
    shutil.copy(ROOT / name, source / name)
  for name in ("models", "experiments", "benchmarks", "tests"):
    (source / name).mkdir()
    (source / name / "__init__.py").touch()
  options = ["--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check", "--quiet"]
  command = [sys.executable, "-m", "pip", "install", *options, "--target", str(target), str(source)]
  subprocess.run(command, check=True, cwd=source)
  return target


def run(installed, folder, code):
  """Runs code with the installed package and without the checkout; returns its standard output."""
  start = f"import sys, rspo_jax\nassert rspo_jax.__file__.startswith({str(installed)!r}), rspo_jax.__file__\n"
  environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(installed), str(folder)])}
  command = [sys.executable, "-P", "-c", start + code]
  done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
  assert done.returncode == 0, done.stderr
  return done.stdout


def test_wheel_contains_only_the_library(installed):
  packages = {path.name for path in installed.iterdir() if path.suffix != ".dist-info"}
  assert packages == {"rspo_jax"}
  sources = {path.relative_to(ROOT) for path in (ROOT / "rspo_jax").rglob("*.py")}
  assert sources == {path.relative_to(installed) for path in (installed / "rspo_jax").rglob("*.py")}


@pytest.mark.parametrize(
  "code",
  [
    pytest.param(IMPORT, id="import_loads_no_rewards_data_or_run"),
    pytest.param(MATH, id="math_reward_scores"),
    pytest.param(CUSTOM, id="custom_reward_has_a_time_limit"),
    pytest.param(PROGRAM, id="code_reward_runs_programs"),
    pytest.param(POOL, id="worker_pool_runs_its_installed_file"),
  ],
)
def test_installed_package_works(installed, tmp_path, code):
  (tmp_path / "user_rewards.py").write_text(USER_REWARDS)
  run(installed, tmp_path, code)


def test_code_of_the_package_page_prints_the_shown_output(installed, tmp_path):
  assert run(installed, tmp_path, CODE) == OUTPUT


def test_program_of_the_library_document_learns_with_the_installed_package_alone(installed, tmp_path):
  data, program = re.findall(r"^```python\n(.*?)^```$", (DOCS / "library.md").read_text(), re.DOTALL | re.MULTILINE)
  assert sum(bool(line.strip()) for line in program.splitlines()) <= 60
  output = run(installed, tmp_path, data + program)
  success = [float(value) for value in re.findall(r"success ([\d.]+)", output)]
  assert len(success) == 6 and success[0] < 0.15 and min(success[-2:]) > 0.4, output


def test_package_page_names_no_make_target_and_links_no_local_file(installed):
  (metadata,) = installed.glob("*.dist-info/METADATA")
  assert metadata.read_text().endswith(PAGE)
  assert not re.search(r"\bmake \w+`|^make ", PAGE, re.MULTILINE)
  assert not re.search(r"\]\((?!https?:)", PAGE)
