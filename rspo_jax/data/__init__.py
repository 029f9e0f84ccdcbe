"""Examples in memory: read from files or generated, mixed, and returned in batches by step, optionally by a curriculum.

A loader returns {split: Split} and checks every record before training starts. The generators of problems belong to
`rspo_jax.tasks`, scoring of completions to `rspo_jax.rewards`.
"""

from rspo_jax.data.curriculum import Curriculum, CurriculumOptions
from rspo_jax.data.datasets import (
  ALPHABETS,
  DATASETS,
  cache_dir,
  load_countdown,
  load_dataset,
  load_files,
  load_knights,
  load_mixture,
)
from rspo_jax.data.examples import Batches, Example, Split, batches, index_stream, read_split

__all__ = [
  "ALPHABETS",
  "DATASETS",
  "Batches",
  "Curriculum",
  "CurriculumOptions",
  "Example",
  "Split",
  "batches",
  "cache_dir",
  "index_stream",
  "load_countdown",
  "load_dataset",
  "load_files",
  "load_knights",
  "load_mixture",
  "read_split",
]
