"""Samples completions: one contract for batch-synchronous sampling, continuous batching and remote engines.

Two modules are imported by their own names, which keeps `import rspo_jax` light: `collector` (the groups of completions
that an RL step trains on; needs data and rewards) and `remote_engine` (HTTP). Scoring given tokens is
`rspo_jax.training`'s.
"""

from rspo_jax.rollout.cacheless import policy_from_forward, with_cache
from rspo_jax.rollout.completions import (
  Completion,
  from_arrays,
  from_rollout,
  new_completion,
  new_completions,
  to_arrays,
  to_rollout,
)
from rspo_jax.rollout.continuous import ContinuousSampler
from rspo_jax.rollout.samplers import BatchSampler, OnFinished, Sampler, draw_rollout, make_sampler
from rspo_jax.rollout.sampling import sample
from rspo_jax.rollout.token_sampling import SamplingOptions, truncated_log_prob

__all__ = [
  "BatchSampler",
  "Completion",
  "ContinuousSampler",
  "OnFinished",
  "Sampler",
  "SamplingOptions",
  "draw_rollout",
  "from_arrays",
  "from_rollout",
  "make_sampler",
  "new_completion",
  "new_completions",
  "policy_from_forward",
  "sample",
  "to_arrays",
  "to_rollout",
  "truncated_log_prob",
  "with_cache",
]
