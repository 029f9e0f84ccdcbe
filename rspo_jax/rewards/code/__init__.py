"""The code reward: programs that a policy writes are run against tests in a sandbox.

Belongs here: the reward, the sandbox and its process limits, and the two modules that run inside the sandbox, `harness`
and `sandbox_child`, which are sent there as source text and must not import anything of this library. Does not belong
here: the reward protocol and the table of rewards (`rspo_jax.rewards`), and data sets of programming tasks
(`rspo_jax.data`).
"""

from rspo_jax.rewards.code.reward import CodeReward, CodeTask, Verdict, extract_code, run_task, task_from_record
from rspo_jax.rewards.code.sandbox import Sandbox, find_sandbox, make_sandbox
from rspo_jax.rewards.code.sandbox_process import Limits, Run

__all__ = [
  "CodeReward",
  "CodeTask",
  "Limits",
  "Run",
  "Sandbox",
  "Verdict",
  "extract_code",
  "find_sandbox",
  "make_sandbox",
  "run_task",
  "task_from_record",
]
