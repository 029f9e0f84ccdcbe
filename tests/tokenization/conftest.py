"""Fixtures of the tests of checkpoints' tokenizers and chat templates."""

import pytest

from rspo_jax.tokenization.hf import load_tokenizer
from tests.support.tokenizer_cases import write_checkpoint


@pytest.fixture
def load(tmp_path):
  """(files) -> the tokenizer of a checkpoint with these files."""
  return lambda files: load_tokenizer(write_checkpoint(tmp_path, files))
