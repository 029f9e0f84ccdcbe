"""What a run leaves on disk: checkpoints, the claimed workdir, metrics, and the host's share of a checkpoint."""

from rspo_jax.run.checkpoint import CheckpointError, CheckpointMismatchError, Checkpoints, Restored, fingerprints
from rspo_jax.run.host_state import RunState, bundle, unbundle
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
