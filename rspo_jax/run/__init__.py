"""The files of a run: checkpoints and their fingerprints, the claimed and locked workdir, metrics.

Here belongs everything a run writes in order to resume or to be measured. Completions of an evaluation belong to
`rspo_jax.evaluation`; plots, reports and the progress display to the experiments.
"""

from rspo_jax.run.checkpoint import CheckpointError, CheckpointMismatchError, Checkpoints, Restored
from rspo_jax.run.fingerprints import fingerprints
from rspo_jax.run.host_state import RunState, abstract_bundle, bundle, unbundle
from rspo_jax.run.leaves import abstract
from rspo_jax.run.metrics import (
  METRICS,
  PATTERNS,
  TIMING_PREFIXES,
  MetricsWriter,
  deterministic,
  is_known,
  read_metrics,
)
from rspo_jax.run.workdir import claim_workdir, dump_json_atomic, lock_workdir, to_plain_json, write_text_atomic

__all__ = [
  "METRICS",
  "PATTERNS",
  "TIMING_PREFIXES",
  "CheckpointError",
  "CheckpointMismatchError",
  "Checkpoints",
  "MetricsWriter",
  "Restored",
  "RunState",
  "abstract",
  "abstract_bundle",
  "bundle",
  "claim_workdir",
  "deterministic",
  "dump_json_atomic",
  "fingerprints",
  "is_known",
  "lock_workdir",
  "read_metrics",
  "to_plain_json",
  "unbundle",
  "write_text_atomic",
]
