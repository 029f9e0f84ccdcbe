"""What a completion is worth: the reward protocol, the table of rewards, and how they are composed.

`math` and `code` run untrusted text in processes that can be killed; `worker_pool` is what they share. A reward sees
text and an example; token masks and advantages are the train step's.
"""

from rspo_jax.rewards.base import (
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
