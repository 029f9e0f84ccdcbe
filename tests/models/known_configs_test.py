"""Parameter counts of public models, from abstract shapes."""

import jax
import numpy as np
import pytest

from models.huggingface.known_configs import PUBLISHED, known_config
from models.huggingface.tensor_map import tensor_map
from models.policy import build_policy

# Total parameters: half the `total_size` of the published bfloat16 index, or the model card's figure (gpt-oss, whose
# weights are packed: 20.91 billion; Moonlight, arXiv 2502.16982 table 6: 15.29 billion without embedding and head).
TOTALS = {
  "Qwen3-30B-A3B": 30_532_122_624,
  "OLMoE-1B-7B-0924": 6_919_161_856,
  "Qwen1.5-MoE-A2.7B": 14_315_784_192,
  "Mixtral-8x7B-v0.1": 46_702_792_704,
  "DeepSeek-V2-Lite": 15_706_484_224,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_policy_and_checkpoint_have_the_published_parameter_count(name):
  config = known_config(name)
  shapes = jax.eval_shape(build_policy(config).init, jax.random.key(0))
  total = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes))
  from_tensors = sum(int(np.prod(slices[0].tensor_shape)) for slices in tensor_map(config).values())
  assert total == from_tensors
  if name in TOTALS:
    assert total == TOTALS[name]


def test_rounded_parameter_counts_are_the_published_ones():
  def total(name):
    shapes = jax.eval_shape(build_policy(known_config(name)).init, jax.random.key(0))
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes))

  assert round(total("gpt-oss-20b") / 1e9, 2) == 20.91
  moonlight = known_config("Moonlight-16B-A3B")
  embeddings = 2 * moonlight.vocab_size * moonlight.hidden_size
  assert round((total("Moonlight-16B-A3B") - embeddings) / 1e9, 2) == 15.29


def test_error_of_an_unknown_name_lists_the_known_ones():
  with pytest.raises(ValueError, match=r"Qwen3-30B-A3B.*gpt-oss-20b"):
    known_config("Qwen9")
