"""Mathematical answers, compared by math-verify in worker processes with a time limit.

`equivalence` and `shortcuts` run in the workers and import nothing of ours.
"""

from rspo_jax.rewards.math.reward import MathReward, MathVerdict, Reason, gold_answers

__all__ = ["MathReward", "MathVerdict", "Reason", "gold_answers"]
