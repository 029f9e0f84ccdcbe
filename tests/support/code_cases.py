"""What the tests of code rewards share."""

from rspo_jax.rewards.code.reward import CodeTask, run_task, task_of
from rspo_jax.rewards.code.sandbox_process import Limits

LIMITS = Limits(wall_seconds=30.0, cpu_seconds=1, memory_bytes=256 * 2**20, output_bytes=200_000)


def verdict(box, completion, task):
  """Of a completion in the sandbox `box`; task: a `CodeTask` or a record."""
  return run_task(completion, task if isinstance(task, CodeTask) else task_of(task), sandbox=box, limits=LIMITS)
