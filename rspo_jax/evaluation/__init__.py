"""How good a policy is: estimators with confidence intervals, the log of completions, and the summary of a run.

Drawing completions is `rspo_jax.rollout`, scoring them `rspo_jax.rewards`.
"""

from rspo_jax.evaluation.completion_log import (
  CompletionLog,
  Completions,
  Generate,
  complete_in_batches,
  completions_of,
  digest,
  join,
  read_lines,
)
from rspo_jax.evaluation.estimators import (
  OVER,
  avg_at_k,
  bootstrap,
  interval,
  macro_average,
  maj_at_k,
  pass_at_k,
  powers_of_two,
  vote,
)
from rspo_jax.evaluation.summary import (
  Estimates,
  curve_rows,
  describe,
  estimates,
  group_name,
  k_of,
  markdown,
  note,
  percent,
  summarize,
  table_rows,
  write_up,
)

__all__ = [
  "OVER",
  "CompletionLog",
  "Completions",
  "Estimates",
  "Generate",
  "avg_at_k",
  "bootstrap",
  "complete_in_batches",
  "completions_of",
  "curve_rows",
  "describe",
  "digest",
  "estimates",
  "group_name",
  "interval",
  "join",
  "k_of",
  "macro_average",
  "maj_at_k",
  "markdown",
  "note",
  "pass_at_k",
  "percent",
  "powers_of_two",
  "read_lines",
  "summarize",
  "table_rows",
  "vote",
  "write_up",
]
