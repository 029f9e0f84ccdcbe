"""Every config key of the earlier version still exists, or is answered with the current key."""

import re

import ml_collections
import pytest

from experiments.configs import countdown_tiny
from experiments.setup.config_flags import read_config
from experiments.setup.renamed_keys import RENAMED, renamed_key
from tests.support.documents import resolve

# Group -> its keys, at revision 2482258, before the library's option dataclasses became the groups of the config.
OLD_KEYS = {
  "": "seed pretrained tokenizer",
  "model": """
    vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim num_experts
    num_experts_per_tok moe_intermediate_size model_type intermediate_size mlp_only_layers decoder_sparse_step
    qk_norm qkv_bias attention_out_bias clip_qkv sliding_window sliding_layers attention_sinks kv_lora_rank
    q_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim rope_theta rope_interleave scoring_func
    norm_topk_prob routed_scaling_factor router_bias router_logit_bias n_group topk_group group_score
    shared_expert_intermediate_size shared_expert_gate expert_bias swiglu_limit rms_norm_eps tie_word_embeddings
    dtype cache_dtype remat scan_layers expert_backend
  """,
  "model.rope_scaling": """
    rope_type factor original_max_position_embeddings beta_fast beta_slow truncate attention_factor mscale
    mscale_all_dim
  """,
  "model.lora": "rank alpha targets",
  "data": "name data_dir options chat system max_prompt_tokens",
  "reward": "name options",
  "sampling": """
    max_new_tokens rows cache_sizes temperature top_k top_p engine engine_kind engine_folder engine_model
    engine_timeout
  """,
  "objective": """
    name eps_low eps_high dual_clip tau_pos tau_neg bounds ratio length_epsilon aggregation norm_length baseline
    scale ddof std_epsilon kl_coefficient kl_estimator kl_in entropy_coefficient
  """,
  "router": """
    shift shift_floor shift_floor_start shift_floor_updates placement deviation layers level replay replay_gates
    freeze learning_rate_multiplier load_balance z_loss bias_rate
  """,
  "mismatch": "correction level upper lower",
  "warm_start": "steps batch_size wrong_fraction",
  "warm_start.optimizer": "learning_rate warmup_steps final_fraction b1 b2 weight_decay max_grad_norm",
  "rl": """
    steps prompts samples_per_prompt minibatches epochs microbatches logits_chunk dynamic_sampling_rounds
    oversampling carry_over mask_truncated overlong_buffer overlong_penalty frozen
  """,
  "rl.optimizer": "learning_rate warmup_steps final_fraction b1 b2 weight_decay max_grad_norm",
  "curriculum": "low high memory retry_epochs max_skipped",
  "diagnostics": "every pieces",
  "evaluation": """
    every benchmarks problems samples k greedy batch_problems temperature top_k top_p max_new_tokens level
    resamples
  """,
  "evaluation.benchmarks.any": """
    group problems samples k greedy batch_problems temperature top_k top_p max_new_tokens
  """,
  "evaluation.benchmarks.any.data": "name data_dir options chat system max_prompt_tokens",
  "evaluation.benchmarks.any.reward": "name options",
  "checkpoint": "every keep",
  "runtime": "mesh cpu_devices distributed compilation_cache",
}
ALL = [f"{group}.{name}".strip(".") for group, names in OLD_KEYS.items() for name in names.split()]


def exists(key):
  try:
    resolve(key)
  except AttributeError:
    return False
  return True


def test_every_key_of_the_earlier_version_either_exists_or_is_renamed_to_one_that_exists():
  assert len(ALL) == len(set(ALL)) > 175
  for key in ALL:
    assert exists(key) == (not renamed_key(key)), key


def test_only_keys_and_groups_of_the_earlier_version_are_renamed():
  assert RENAMED.keys() <= {*ALL, *OLD_KEYS}


@pytest.mark.parametrize("old", [key for key in ALL if renamed_key(key)])
def test_a_config_with_a_key_of_the_earlier_version_is_refused_with_the_renamed_key(old):
  settings = countdown_tiny.get_config()
  *groups, last = old.split(".")
  node = settings
  with settings.unlocked(), settings.ignore_type():
    for group in groups:
      if group not in node:
        node[group] = ml_collections.ConfigDict()
      node = node[group]
    node[last] = 1
    with pytest.raises(ValueError, match=r"config\.[\w.]+ is now config\.") as raised:
      read_config(settings)
  earlier, current = str(raised.value).split(" is now ", 1)
  assert f"config.{old}".startswith(earlier)
  assert all(exists(key) for key in re.findall(r"config\.([\w.]+\w)", current))
