"""The main job as a user runs it: in processes of its own, stopped, killed and continued."""

import json
import os
import signal
import subprocess
import sys
import time

import ml_collections
import pytest

from experiments.setup.build import build, optimizers
from experiments.setup.config_flags import read_config
from rspo_jax.run.checkpoint import Checkpoints
from rspo_jax.run.fingerprints import fingerprints
from rspo_jax.run.host_state import abstract_bundle
from rspo_jax.run.metrics import METRICS, deterministic, read_metrics
from rspo_jax.training.state import abstract_state
from tests.support.configs import SETTINGS
from tests.support.paths import ROOT

CONFIG = "experiments/configs/countdown_tiny.py"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
  """One home for data and compiled programs, so that only the first start compiles."""
  return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def reference(cache, tmp_path_factory):
  """A run that nothing disturbed, and what it printed."""
  workdir = tmp_path_factory.mktemp("runs") / "reference"
  process = start(workdir, cache)
  output, _ = process.communicate(timeout=500)
  assert process.returncode == 0, output
  return workdir, output


def start(workdir, cache, **changed):
  flags = [f"--config.{key}={value}" for key, value in (SETTINGS | changed).items()]
  command = [sys.executable, "-m", "experiments.train", f"--config={CONFIG}", f"--workdir={workdir}", *flags]
  environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "XLA_FLAGS": ""}  # compiled as users compile
  return subprocess.Popen(
    command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
  )


def wait_for_row(process, workdir, phase, step):
  """Blocks until the run has written that row of metrics, or has ended."""
  path = workdir / "metrics.jsonl"
  while process.poll() is None:
    if path.exists() and f'"phase": "{phase}", "step": {step},' in path.read_text():
      return
    time.sleep(0.005)


def results(workdir):
  """Everything a clock does not decide: the rows of metrics, and a fingerprint of every array of the last state."""
  given = ml_collections.ConfigDict(json.loads((workdir / "config.json").read_text()))
  with given.unlocked(), given.ignore_type():
    given.runtime.mesh = {"data": 8}
    given.sampling.samples_per_prompt, given.collector.prompts = (
      8,
      16,
    )  # rows that divide over the test's own eight devices
  parts = build(read_config(given))
  optimizer, _ = optimizers(parts.config)["rl"]
  with Checkpoints(workdir, read_only=True) as checkpoints:
    state = abstract_state(parts.policy, optimizer, parts.layout)
    restored = checkpoints.restore(lambda meta: abstract_bundle(state, meta, parts.layout))
  return [deterministic(row) for row in read_metrics(workdir / "metrics.jsonl")], fingerprints(restored.state)


def test_a_run_leaves_everything_the_readme_promises(reference):
  workdir, output = reference
  for name in (
    "config.json",
    "metrics.jsonl",
    "summary.json",
    "report.html",
    "answers_before.jsonl",
    "answers_after.jsonl",
  ):
    assert (workdir / name).stat().st_size > 0, name
  assert list((workdir / "plots").glob("*.png"))
  assert list((workdir / "tensorboard").rglob("events.out.tfevents.*"))
  assert "warm_start" in output and "rl" in output
  assert "to compile: decode 8 rows" in output
  summary = json.loads((workdir / "summary.json").read_text())
  assert summary["held_out"]["distinct_problems"] == 20
  rows = read_metrics(workdir / "metrics.jsonl")
  assert [row["step"] for row in rows if row["phase"] == "warm_start"] == [1, 2, 3, 4]
  written = set().union(*rows) - {"phase", "step", "time"}
  reasons = {name for name in written if name.startswith("reward/reason/")}
  assert reasons and written - reasons - {"memory/peak_bytes"} == set(METRICS) - {"memory/peak_bytes"}


def test_a_run_killed_anywhere_continues_to_bitwise_the_same_end(reference, cache, tmp_path):
  workdir = tmp_path / "killed"
  for phase, step, delay in (("warm_start", 1, 0.0), ("warm_start", 4, 0.05), ("rl", 1, 0.0), ("rl", 3, 0.02)):
    process = start(workdir, cache)
    wait_for_row(process, workdir, phase, step)
    time.sleep(delay)  # a save of this step is on its way: kill before, in or after it
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
  process = start(workdir, cache)
  output, _ = process.communicate(timeout=500)
  assert process.returncode == 0, output
  assert "continuing" in output
  assert results(workdir) == results(reference[0])


def test_sigterm_saves_and_ends_well_and_the_same_command_continues(reference, cache, tmp_path):
  workdir = tmp_path / "terminated"
  process = start(workdir, cache, **{"checkpoint.every": 1000})
  wait_for_row(process, workdir, "rl", 1)
  process.terminate()
  output, _ = process.communicate(timeout=500)
  assert process.returncode == 0 and "the same command continues" in output, output
  process = start(workdir, cache, **{"checkpoint.every": 1000})
  output, _ = process.communicate(timeout=500)
  assert process.returncode == 0 and "continuing" in output, output
  assert results(workdir) == results(reference[0])


def test_another_config_in_an_old_workdir_is_refused_with_the_differing_keys(reference, cache):
  process = start(reference[0], cache, **{"steps": 5, "shift.floor": 0.5})
  output, _ = process.communicate(timeout=500)
  assert process.returncode == 1
  assert "steps: 4 -> 5" in output and "shift.floor: 0.8 -> 0.5" in output
  assert "Traceback" not in output


@pytest.mark.parametrize(
  ("key", "value", "message"),
  [
    ("rl.minibatch", "3", 'Did you mean "minibatches"'),
    ("rl.steps", "3", "config.rl.steps is now config.steps"),
    ("steps", "ten", "config.steps"),
    ("collector.prompts", "6", "config.collector.prompts"),
    ("objective.name", "ppo", "want one of cispo"),
    ("data.options.test", "10000000", "distinct Countdown problems"),
  ],
)
def test_a_mistaken_flag_gets_one_line_and_no_trace(cache, tmp_path, key, value, message):
  process = start(tmp_path / "never", cache, **{key: value, "runtime.cpu_devices": 4})
  output, _ = process.communicate(timeout=100)
  assert process.returncode == 1
  assert message in output and "Traceback" not in output, output
