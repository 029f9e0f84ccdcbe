"""The code, the flags and the names of docs/rollouts.md are there and run."""

import re

from benchmarks.run import SECTIONS
from rspo_jax.run.metrics import is_known
from tests.support.documents import FLAG, resolve
from tests.support.paths import ROOT

TEXT = (ROOT / "docs" / "rollouts.md").read_text()


def test_the_code_runs_as_it_stands():
  (block,) = re.findall(r"^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
  exec(compile(block, "docs/rollouts.md", "exec"), {})


def test_flags_metrics_and_benchmarks_exist():
  flags = [path for path, _ in re.findall(FLAG, TEXT)] + re.findall(r"`config\.([\w.]+)`", TEXT)
  assert len(flags) > 6
  for path in flags:
    resolve(path)
  prose = re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL)
  metrics = re.findall(r"`(\w+/\w+)`", prose)
  assert len(metrics) > 3 and all(map(is_known, metrics))
  assert set(re.findall(r"--only (\w+)", TEXT)) <= set(SECTIONS)
