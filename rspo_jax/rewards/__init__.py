"""Scores of completions: the reward protocol, the rewards and their table, and composed rewards.

`math` and `code` evaluate untrusted text in processes with a time limit; `worker_pool` runs those of `math` and of
user-defined rewards. A reward sees a text and an example. Token masks, penalties on tokens and advantages do not belong
here, but to `rspo_jax.objectives`.
"""

from rspo_jax.rewards.base import (
  BatchReward,
  Reward,
  RewardResult,
  Scores,
  ZeroOnError,
  close,
  outcomes,
  reason_counts,
  score_batch,
  score_completions,
)
from rspo_jax.rewards.composed import ANY_SOURCE, BySourceReward, WeightedReward
from rspo_jax.rewards.custom import CustomReward
from rspo_jax.rewards.puzzles import countdown_reward, knights_reward
from rspo_jax.rewards.table import ON_ERROR, REWARDS, by_source, check_reward, make_reward, reward_names, weighted
from rspo_jax.rewards.text import FormatReward, LengthReward, exact_match_reward, repetition_reward

__all__ = [
  "ANY_SOURCE",
  "ON_ERROR",
  "REWARDS",
  "BatchReward",
  "BySourceReward",
  "CustomReward",
  "FormatReward",
  "LengthReward",
  "Reward",
  "RewardResult",
  "Scores",
  "WeightedReward",
  "ZeroOnError",
  "by_source",
  "check_reward",
  "close",
  "countdown_reward",
  "exact_match_reward",
  "knights_reward",
  "make_reward",
  "outcomes",
  "reason_counts",
  "repetition_reward",
  "reward_names",
  "score_batch",
  "score_completions",
  "weighted",
]
