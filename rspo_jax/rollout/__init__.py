"""Draws completions: one sampler contract for batch-synchronous and continuous sampling and for remote engines.

Three modules are imported by their own names, to keep `import rspo_jax` light: `collector` (which groups of completions
an RL step trains on; needs data and rewards), `remote_engine` and `remote_protocol` (HTTP).
"""

from rspo_jax.rollout.completions import Completion, begin, from_arrays, pack, to_arrays, unpack
from rspo_jax.rollout.continuous import ContinuousSampler
from rspo_jax.rollout.sampling import SamplingOptions, sample

__all__ = [
  "Completion",
  "ContinuousSampler",
  "SamplingOptions",
  "begin",
  "from_arrays",
  "pack",
  "sample",
  "to_arrays",
  "unpack",
]
