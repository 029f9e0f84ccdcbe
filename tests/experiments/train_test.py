"""The training command as a user runs it: in processes of its own, stopped, killed and continued."""

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
from tests.support.commands import Command
from tests.support.configs import SETTINGS
from tests.support.paths import ROOT

MODULE, CONFIG = "experiments.train", "experiments/configs/countdown_tiny.py"


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
  """One cache folder for data and compiled programs, so that only the first run compiles; with XLA's default flags."""
  return {"XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache")), "XLA_FLAGS": ""}


@pytest.fixture(scope="module")
def start(environment):
  """Starts training: (workdir, settings that differ from `SETTINGS`) -> `Command`."""

  def start(workdir, **changed):
    log = workdir.with_name(f"{workdir.name}.log")
    return Command(MODULE, arguments(workdir, changed), environment, log)

  return start


@pytest.fixture(scope="module")
def reference(environment, tmp_path_factory):
  """The workdir and the output of an undisturbed run, started from a shell's command line."""
  workdir = tmp_path_factory.mktemp("runs") / "reference"
  run = subprocess.run(
    [sys.executable, "-m", MODULE, *arguments(workdir)],
    cwd=ROOT,
    env={**os.environ, **environment},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    timeout=500,
  )
  assert run.returncode == 0, run.stdout
  return workdir, run.stdout


@pytest.fixture(scope="module")
def expected(reference):
  return results(reference[0])


def arguments(workdir, changed=None):
  flags = [f"--config.{key}={value}" for key, value in (SETTINGS | (changed or {})).items()]
  return [f"--config={CONFIG}", f"--workdir={workdir}", *flags]


def wait_for_row(command, workdir, phase, step):
  """Blocks until the run has written that row of metrics, or has ended."""
  path = workdir / "metrics.jsonl"
  while command.process.is_alive():
    if path.exists() and f'"phase": "{phase}", "step": {step},' in path.read_text():
      return
    time.sleep(0.005)


def results(workdir):
  """All results of a run that no clock decides: the rows of metrics, and fingerprints of the arrays of its state."""
  settings = ml_collections.ConfigDict(json.loads((workdir / "config.json").read_text()))
  with settings.unlocked(), settings.ignore_type():
    # Batches that divide over the eight devices of this process.
    settings.runtime.mesh = {"data": 8}
    settings.sampling.samples_per_prompt, settings.collector.prompts = 8, 16
  components = build(read_config(settings))
  optimizer, _ = optimizers(components.config)["rl"]
  with Checkpoints(workdir, read_only=True) as checkpoints:
    state = abstract_state(components.policy, optimizer, components.layout)
    restored = checkpoints.restore(lambda meta: abstract_bundle(state, meta, components.layout))
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


def test_a_run_killed_anywhere_continues_to_bitwise_the_same_results(expected, start, tmp_path):
  workdir = tmp_path / "killed"
  for phase, step, delay in (("warm_start", 1, 0.0), ("warm_start", 4, 0.05), ("rl", 1, 0.0), ("rl", 3, 0.02)):
    command = start(workdir)
    wait_for_row(command, workdir, phase, step)
    time.sleep(delay)  # the checkpoint of this step is being saved: kill before, during or after that
    command.process.kill()
    assert command.finish(10)[0] == -signal.SIGKILL
  status, output = start(workdir).finish(500)
  assert status == 0, output
  assert "continuing" in output
  assert results(workdir) == expected


def test_sigterm_saves_and_exits_with_status_0_and_the_same_command_continues(expected, start, tmp_path):
  workdir = tmp_path / "terminated"
  command = start(workdir, **{"checkpoint.every": 1000})
  wait_for_row(command, workdir, "rl", 1)
  command.process.terminate()
  status, output = command.finish(500)
  assert status == 0 and "the same command continues" in output, output
  status, output = start(workdir, **{"checkpoint.every": 1000}).finish(500)
  assert status == 0 and "continuing" in output, output
  assert results(workdir) == expected


def test_another_config_in_an_old_workdir_is_refused_with_the_differing_keys(reference, start):
  status, output = start(reference[0], **{"steps": 5, "shift.floor": 0.5}).finish(100)
  assert status == 1
  assert "steps: 4 -> 5" in output and "shift.floor: 0.8 -> 0.5" in output
  assert "Traceback" not in output


@pytest.mark.parametrize(
  ("key", "value", "message"),
  [
    ("rl.minibatch", "3", 'Did you mean "minibatches"'),
    ("rl.steps", "3", "config.rl.steps is now config.steps"),
    ("rl.optimizer.b1", "0.8", "config.rl.optimizer.b1 is now config.optimizer.b1"),
    ("steps", "ten", "config.steps"),
    ("collector.prompts", "6", "config.collector.prompts"),
    ("objective.name", "ppo", "want one of cispo"),
    ("data.options.test", "10000000", "distinct Countdown problems"),
  ],
)
def test_a_mistaken_flag_gets_one_line_and_no_traceback(start, tmp_path, key, value, message):
  status, output = start(tmp_path / "never", **{key: value, "runtime.cpu_devices": 4}).finish(100)
  assert status == 1
  assert message in output and "Traceback" not in output, output
