"""Programs run against tests in a sandbox.

`harness` and `sandbox_child` run inside the sandbox, from their source text, and import nothing of ours.
"""

from rspo_jax.rewards.code.reward import CodeReward, CodeTask, Verdict, extract_code, run_task, task_of

__all__ = ["CodeReward", "CodeTask", "Verdict", "extract_code", "run_task", "task_of"]
