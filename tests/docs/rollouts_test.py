"""Code, flags and metrics of docs/rollouts.md and docs/remote_engine.md exist and run."""

import re

import pytest

from benchmarks.run import SECTIONS
from rspo_jax.run.metrics import is_known
from tests.support.documents import FLAG, resolve
from tests.support.paths import DOCS

ROLLOUTS, REMOTE = ((DOCS / f"{name}.md").read_text() for name in ("rollouts", "remote_engine"))


def test_the_code_of_the_document_runs():
  (block,) = re.findall(r"^```python\n(.*?)^```$", ROLLOUTS, re.MULTILINE | re.DOTALL)
  exec(compile(block, "docs/rollouts.md", "exec"), {})


@pytest.mark.parametrize("text", [ROLLOUTS, REMOTE], ids=["rollouts", "remote_engine"])
def test_every_flag_exists(text):
  flags = [path for path, _ in re.findall(FLAG, text)] + re.findall(r"`config\.(?!json`)([\w.]+)`", text)
  assert len(flags) > 6
  for path in flags:
    resolve(path)


def test_metrics_and_benchmarks_exist():
  prose = re.sub(r"```.*?```", "", ROLLOUTS, flags=re.DOTALL)
  metrics = re.findall(r"`(\w+/\w+)`", prose)
  assert len(metrics) > 3 and all(map(is_known, metrics))
  assert set(re.findall(r"--only (\w+)", ROLLOUTS)) <= set(SECTIONS)
