"""Shared by the tests of code rewards: programs run with small limits in a sandbox that works on this machine."""

import textwrap

import pytest

from rspo_jax.rewards.code.reward import CodeTask, run_task, task_from_record
from rspo_jax.rewards.code.sandbox import find_sandbox, make_sandbox
from rspo_jax.rewards.code.sandbox_process import Limits

MIB = 2**20
LIMITS = Limits(wall_seconds=30.0, cpu_seconds=1, memory_bytes=256 * MIB, output_bytes=200_000)
SMALL = Limits(wall_seconds=20.0, cpu_seconds=2, memory_bytes=256 * MIB, output_bytes=10_000, file_bytes=100_000)
STRONG = ("bubblewrap", "namespaces")


def sandbox_or_skip(isolation=None, **options):
  """The sandbox with this isolation, or the strongest one; skips the test if there is none on this machine."""
  try:
    return make_sandbox(isolation) if isolation else find_sandbox(**options)
  except RuntimeError as error:
    pytest.skip(str(error)[:300])


def run(box, program, **changes):
  """Runs an indented program; changes: fields of `Limits` that differ from SMALL, or options of `Sandbox.run`."""
  limits = {name: value for name, value in changes.items() if name in Limits.__dataclass_fields__}
  options = {name: value for name, value in changes.items() if name not in limits}
  settings = {**{name: getattr(SMALL, name) for name in Limits.__dataclass_fields__}, **limits}
  return box.run(textwrap.dedent(program), limits=Limits(**settings), **options)


def words(box, program, **changes):
  """The words that a program prints; it must end with status 'ok'."""
  result = run(box, program, **changes)
  assert result.status == "ok", result
  return result.stdout.decode().split()


def verdict(box, completion, task):
  """The verdict for a completion; task: a `CodeTask` or a record."""
  task = task if isinstance(task, CodeTask) else task_from_record(task)
  return run_task(completion, task, sandbox=box, limits=LIMITS)
