"""Our values against those of verl and TRL, computed by their own code in float64 (golden/objectives.json).

Definitions that differ: the value of a REINFORCE-like loss is -w A log pi there and -w A here (the gradients are
equal); TRL counts empty rows. `LEFT_OUT` lists features that this library does not have.
"""

import functools
import itertools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rspo_jax.objectives.advantages import group_advantages, token_advantages, whiten
from rspo_jax.objectives.aggregation import aggregate
from rspo_jax.objectives.mismatch import MismatchOptions, mismatch_weight
from rspo_jax.objectives.penalties import kl, overlong_penalty
from rspo_jax.objectives.sequence_level import gmpo, gspo, rloo
from rspo_jax.objectives.token_level import cispo, grpo, gspo_token, policy_gradient, sapo

GOLDEN = json.loads((pathlib.Path(__file__).parent / "golden" / "objectives.json").read_text())
INPUTS, CASES = GOLDEN["inputs"], GOLDEN["cases"]
TRL_LOSS, TRL_REWARD = "GRPOTrainer._compute_loss", "GRPOTrainer._generate_and_score_completions"
REJECTION, CORRECTION = "compute_rollout_rejection_mask", "compute_rollout_correction_weights"

# (function, options or fields of the case, reason for leaving it out)
LEFT_OUT = (
  ("compute_policy_loss_dppo_tv", {}, "DPPO bounds the change of a probability; not in this library"),
  ("compute_policy_loss_dppo_kl", {}, "DPPO bounds the change of a probability; not in this library"),
  ("compute_policy_loss_dro", {}, "DRO has a squared penalty on the ratio; not in this library"),
  ("compute_policy_loss_geo_mean", {"rollout_is_weights": {"rollout_is": "token", "rollout_is_threshold": 2}},
   "verl weighs the row by the geometric mean of its weights, this library every token by its own"),
  ("compute_opo_outcome_advantage", {}, "OPO's baseline is weighted by length"),
  ("compute_gpg_outcome_advantage", {}, "GPG rescales by the share of rows with a reward"),
  ("compute_reinforce_plus_plus_outcome_advantage", {"gamma": 0.9}, "returns of this library are not discounted"),
  ("kl_penalty", {"kl_penalty": "abs"}, "an absolute value estimates no divergence"),
  (CORRECTION, {"rollout_is_batch_normalize": True}, "weights divided by their batch mean"),
  (REJECTION, {"rollout_rs": "token_k2"}, "rejection by a divergence instead of a ratio"),
  (REJECTION, {"rollout_rs": "token_k3"}, "rejection by a divergence instead of a ratio"),
  (REJECTION, {"rollout_rs": "seq_mean_k3"}, "rejection by a divergence instead of a ratio"),
  (REJECTION, {"rollout_rs": "seq_max_k2"}, "rejection by a divergence instead of a ratio"),
  (TRL_LOSS, {"loss_type": "vespo"}, "VESPO; not in this library"),
  (TRL_LOSS, {"use_bias_correction_kl": True}, "k3 weighted by the importance ratio"),
  (TRL_LOSS, {"off_policy_mask_threshold": 0.1}, "a mask on negative rows with a large KL"),
  (TRL_REWARD, {"scale_rewards": "batch"}, "the deviation of the rewards; here that of the tokens' advantages"),
  (TRL_REWARD, {"multi_objective_aggregation": "normalize_then_sum"}, "GDPO normalises twice"),
  ("RLOOTrainer._generate_and_score_completions", {"normalize_advantages": True},
   "normalised over rows, epsilon added to the deviation; here over tokens, epsilon under the root"),
)  # fmt: skip


def left_out(case):
  """The rows of `LEFT_OUT` for a case; at most one is expected."""
  held = case | case["options"]
  return [
    row
    for row in LEFT_OUT
    if row[0] == case["function"] and all(held.get(key) == value for key, value in row[1].items())
  ]


def cases(*functions):
  """(name for messages, case) of all cases that are not left out."""
  for number, case in enumerate(CASES):
    if case["function"] in functions and not left_out(case):
      yield f"{number}: {case['function']} {case['case']} {case.get('mask')} {case['options']}", case


def array(case, name):
  return jnp.asarray(INPUTS[case["case"]][name])


def mask_of(case):
  return jnp.asarray(INPUTS["mask"][case["mask"]], bool)


def close(got, want, name, rtol=1e-6):
  np.testing.assert_allclose(got, want, rtol=rtol, atol=2e-9, err_msg=name)


def mismatch_options(options):
  """The weight that verl calls rollout_is and TRL vllm_importance_sampling."""
  if "rollout_is" in options:
    level, bounds = options["rollout_is"], options["rollout_is_threshold"]
    if isinstance(bounds, str):
      lower, upper = map(float, bounds.split("_"))
      return MismatchOptions("icepop", level, upper, lower)
    return MismatchOptions("tis", level, bounds)
  if "rollout_rs" in options:
    level = {"token_k1": "token", "seq_sum_k1": "sequence", "seq_mean_k1": "sequence_mean"}[options["rollout_rs"]]
    # There the bounds are on the inverse ratio; all of them are symmetric.
    lower, upper = map(float, options["rollout_rs_threshold"].split("_"))
    assert np.isclose(lower * upper, 1)
    return MismatchOptions("icepop", level, upper, lower)
  level, kind = options["vllm_importance_sampling_mode"].split("_")
  lower, upper = (options[f"vllm_importance_sampling_clip_{end}"] for end in ("min", "max"))
  if kind == "truncate":
    return MismatchOptions("tis", level, upper)
  return MismatchOptions("mis", level, upper) if lower is None else MismatchOptions("icepop", level, upper, lower)


def weight_of(case, options):
  return mismatch_weight(
    array(case, "old_log_prob"), array(case, "rollout_log_prob"), mask_of(case), mismatch_options(options)
  )


VERL_MODES = {
  "token-mean": "token_mean",
  "token-sum": "token_mean",
  "seq-mean-token-mean": "seq_mean_token_mean",
  "seq-mean-token-sum": "seq_mean_token_sum",
  "seq-mean-token-sum-norm": "seq_mean_token_sum_norm",
}


def verl_mean(values, mask, options):
  """verl's agg_loss from our sums; with global_batch_info, each of dp_size workers has a part of a larger batch."""
  info = options.get("global_batch_info", {})
  mode = options.get("loss_agg_mode", "seq-mean-token-mean")
  norm = info.get("loss_scale_factor", options.get("loss_scale_factor", mask.shape[1]))
  result = aggregate(values, mask, VERL_MODES[mode], norm_length=norm)
  weight = info.get("batch_num_tokens" if mode == "token-mean" else "global_batch_size", result.weight)
  return result.total / (1 if mode == "token-sum" else weight) * info.get("dp_size", 1)


def trl_mean(values, mask, options):
  kind = options.get("loss_type", "grpo")
  modes = {"grpo": "seq_mean_token_mean", "sapo": "seq_mean_token_mean", "luspo": "seq_mean_token_sum"}
  mode = modes.get(kind, "seq_mean_token_sum_norm" if kind == "dr_grpo" else "token_mean")
  result = aggregate(values, mask, mode, norm_length=options.get("max_completion_length"))
  # TRL counts rows without a token.
  weight = result.weight if mode == "token_mean" else mask.shape[0]
  return result.total / options.get("num_items_in_batch", weight)


def objective_of(case):
  """(objective, whether its value there is -w A log pi)"""
  function, options = case["function"], case["options"]
  name = function.removeprefix("compute_policy_loss_")
  if function.startswith("RLOO"):
    return functools.partial(rloo, eps_low=options["epsilon"], eps_high=options["epsilon_high"]), False
  if function == TRL_LOSS:
    if options["loss_type"] == "sapo":
      taus = {f"tau_{sign}": options[f"sapo_temperature_{sign}"] for sign in ("pos", "neg")}
      return functools.partial(sapo, **taus), False
    if options["loss_type"] == "cispo":
      return functools.partial(cispo, bounds="absolute", eps_high=options["epsilon_high"]), True
    bounds = dict(eps_low=options["epsilon"], eps_high=options["epsilon_high"])
    if options["importance_sampling_level"] == "sequence":
      return functools.partial(gspo, **bounds), False
    return functools.partial(grpo, dual_clip=options.get("delta"), **bounds), False
  if name == "gpg":
    return policy_gradient, True
  if name == "sapo":
    return functools.partial(sapo, tau_pos=options["tau_pos"], tau_neg=options["tau_neg"]), False
  bounds = dict(eps_low=options["clip_ratio_low"], eps_high=options["clip_ratio_high"])
  if name == "bypass_mode" and options["loss_type"] == "reinforce":
    return functools.partial(cispo, bounds="absolute", eps_high=options["rollout_is_threshold"]), True
  if name == "cispo":
    return functools.partial(cispo, **bounds), True
  if name == "geo_mean":
    return functools.partial(gmpo, length_epsilon=1e-8, **bounds), False
  if name == "gspo":
    return functools.partial(gspo, **bounds), False
  return functools.partial(grpo, dual_clip=options["clip_ratio_c"], **bounds), False


def check_loss(name, case, objective, reinforce):
  options, verl = case["options"], case["project"] == "verl"
  mask, advantage = mask_of(case), jnp.asarray(INPUTS["advantage"], float)
  old = array(case, "rollout_log_prob" if "old_log_prob" in options else "old_log_prob")
  weight = 1.0
  if "rollout_is_weights" in case or "importance_sampling_ratio" in case:
    weight = weight_of(case, case.get("rollout_is_weights") or case["importance_sampling_ratio"])
  if "rollout_rs" in options:
    rejection = {key: options[key] for key in ("rollout_rs", "rollout_rs_threshold")}
    # Rejected tokens leave the mask; in bypass mode the trained policy itself is compared with the sampler.
    trained = array(case, "log_prob") if "old_log_prob" in options else old
    mask = mask & (mismatch_weight(trained, array(case, "rollout_log_prob"), mask, mismatch_options(rejection)) > 0)

  def loss(log_prob, as_printed=False):
    values = objective(log_prob - old, advantage, mask).objective * weight
    if as_printed:
      values = values * jnp.where(mask, log_prob, 0)
    if "beta" in options:
      values = values - options["beta"] * jnp.where(mask, kl(log_prob, array(case, "ref_log_prob")), 0)
    return -(verl_mean if verl else trl_mean)(values, mask, options)

  value, gradient = jax.value_and_grad(loss)(array(case, "log_prob"))
  assert value.dtype == gradient.dtype == np.float64
  if case["function"].endswith("geo_mean"):  # the mean there is over all rows
    share = float(mask.any(axis=1).mean())
    value, gradient = value * share, gradient * share
  close(loss(array(case, "log_prob"), True) if reinforce else value, case["loss"], name)
  close(gradient, case["gradient"], name)


LOSSES = (
  *(f"compute_policy_loss_{name}" for name in ("vanilla", "gspo", "geo_mean", "cispo", "sapo", "gpg", "bypass_mode")),
  TRL_LOSS,
  "RLOOTrainer._compute_loss",
)


@pytest.mark.parametrize("function", LOSSES)
def test_losses_and_gradients(function):
  with jax.enable_x64(True):
    for name, case in cases(function):
      check_loss(name, case, *objective_of(case))


def test_gspo_token_equals_their_gspo():
  with jax.enable_x64(True):
    for name, case in cases("compute_policy_loss_gspo", TRL_LOSS):
      objective, _ = objective_of(case)
      if objective.func is gspo:
        check_loss(name, case, functools.partial(gspo_token, **objective.keywords), False)


def test_clip_fractions():
  with jax.enable_x64(True):
    for name, case in cases("compute_policy_loss_vanilla"):
      if "rollout_rs" in case["options"]:
        continue
      dual, _ = objective_of(case)
      mask = mask_of(case)
      arguments = array(case, "log_prob") - array(case, "old_log_prob"), jnp.asarray(INPUTS["advantage"], float), mask
      share = lambda terms, mask=mask: float((terms.clipped_low | terms.clipped_high).sum() / mask.sum())
      inner, both = share(functools.partial(dual, dual_clip=None)(*arguments)), share(dual(*arguments))
      close(inner, case["metrics"]["pg_clipfrac"], name)
      close(both - inner, case["metrics"]["pg_clipfrac_lower"], name)


def test_aggregations():
  with jax.enable_x64(True):
    for name, case in cases("agg_loss"):
      mask = mask_of(case)
      mean = lambda values, mask=mask, case=case: verl_mean(jnp.where(mask, values, 0), mask, case["options"])
      value, gradient = jax.value_and_grad(mean)(array(case, "log_prob"))
      close(value, case["loss"], name)
      if "gradient" in case:
        close(gradient, case["gradient"], name)


def test_kl_estimators_at_values_they_do_not_clamp():
  """verl clamps the log-ratio of k3 to 20 nats and k3 itself to 10."""
  clamped = {"near": 0, "far": 0, "kl_extreme": 0}
  with jax.enable_x64(True):
    for name, case in cases("kl_penalty"):
      estimator = case["options"]["kl_penalty"]
      arguments = array(case, "log_prob"), array(case, "ref_log_prob")
      # With a "+" the value keeps its estimator and the gradient is k2's.
      of_gradient = "k2" if estimator.endswith("+") else estimator
      value = np.asarray(kl(*arguments, estimator.rstrip("+")))
      gradient = jax.grad(lambda x: kl(x, arguments[1], of_gradient).sum())(arguments[0])  # noqa: B023
      free = np.ones(value.shape, bool)
      if estimator == "k3":
        free = (np.abs(np.subtract(*map(np.asarray, arguments))) < 20) & (value < 10)
        clamped[case["case"]] += int((~free).sum())
      if "value" in case:
        close(value[free], np.asarray(case["value"])[free], name)
      if "gradient" in case:
        close(np.asarray(gradient)[free], np.asarray(case["gradient"])[free], name)
  assert clamped == {"near": 0, "far": 4, "kl_extreme": 3}


VERL_ADVANTAGES = {
  "grpo": dict(),
  "grpo_vectorized": dict(),
  "rloo": dict(baseline="leave_one_out", scale="none"),
  "rloo_vectorized": dict(baseline="leave_one_out", scale="none"),
  "reinforce_plus_plus_baseline": dict(baseline="group_mean", scale="none"),
  "reinforce_plus_plus": dict(baseline="none", scale="none"),
}


@pytest.mark.parametrize("estimator", VERL_ADVANTAGES)
def test_verls_advantages(estimator):
  group, near = jnp.asarray(INPUTS["group"]), INPUTS["near"]
  with jax.enable_x64(True):
    for name, case in cases(f"compute_{estimator}_outcome_advantage"):
      options, mask = case["options"], mask_of(case)
      scale = {} if options.get("norm_adv_by_std_in_grpo", True) else dict(scale="none")
      reward = jnp.asarray(INPUTS[case["case"]], float)
      advantage = group_advantages(reward, group, **{**VERL_ADVANTAGES[estimator], **scale})
      if estimator.startswith("reinforce"):
        cost = kl(jnp.asarray(near["old_log_prob"]), jnp.asarray(near["ref_log_prob"]), "k1")
        penalty = options["kl_coef"] * cost if "kl_coef" in options else None
        advantage = whiten(token_advantages(advantage, mask, penalty=penalty), mask)
      want = np.asarray(case["advantage"])
      if want.ndim == 1 and advantage.ndim == 2:
        want = np.where(mask, want[:, None], 0)
      # The vectorised function works in float32.
      close(advantage, want, name, rtol=1e-5 if estimator.endswith("vectorized") else 1e-6)


def test_trls_advantages():
  group, near, total = jnp.asarray(INPUTS["group"]), INPUTS["near"], 0
  with jax.enable_x64(True):
    for name, case in cases(TRL_REWARD, "RLOOTrainer._generate_and_score_completions"):
      if "advantage" not in case:
        continue
      options, reward = case["options"], jnp.asarray(INPUTS[case["case"]], float)
      if "beta" in options:
        cost = kl(jnp.asarray(near["old_log_prob"]), jnp.asarray(near["ref_log_prob"]), "k1")
        reward = reward - options["beta"] * jnp.where(mask_of(case), cost, 0).sum(axis=1)
        advantage = group_advantages(reward, 3, baseline="leave_one_out", scale="none")
      else:
        scale = {"group": "group_std", "none": "none"}[options["scale_rewards"]]
        advantage = group_advantages(reward, group, scale=scale, epsilon=1e-4)
      close(advantage, case["advantage"], name)
      total += 1
  assert total == 8


@pytest.mark.parametrize("function", [CORRECTION, REJECTION, TRL_REWARD])
def test_mismatch_weights(function):
  """Inside the mask; outside it, our weight is 0 and TRL's is 1."""
  for name, case in cases(function):
    if "advantage" in case:
      continue
    mask = np.asarray(mask_of(case))
    weight = np.asarray(weight_of(case, case["options"]))
    assert not weight[~mask].any()
    if function == REJECTION:
      weight = (weight > 0).astype(float)
    if "weight" in case or "kept_mask" in case:
      want = np.asarray(case.get("weight", case.get("kept_mask")))
    else:
      want = np.broadcast_to(np.asarray(case.get("weight_per_row", case.get("kept_rows")))[:, None], mask.shape)
    close(weight[mask], want[mask], name, rtol=5e-6)


def test_overlong_penalty_and_its_floor():
  for name, case in cases("DAPORewardManager"):
    options, length = case["options"], jnp.asarray(case["length"])
    limit, buffer, most = options["max_resp_len"], options["overlong_buffer_len"], options["penalty_factor"]
    penalty = functools.partial(overlong_penalty, max_length=limit, buffer=buffer, penalty=most)
    close(1 + penalty(length), case["reward"], name)
    assert max(case["length"]) <= limit
    assert (penalty(limit + jnp.arange(20)) == -most).all(), "verl's penalty continues to fall"


COMPARED = {
  *LOSSES,
  *(f"compute_{estimator}_outcome_advantage" for estimator in VERL_ADVANTAGES),
  *("agg_loss", "kl_penalty", CORRECTION, REJECTION, TRL_REWARD, "DAPORewardManager"),
  "RLOOTrainer._generate_and_score_completions",
}


def test_every_case_is_compared_or_left_out_for_one_reason():
  reasons = [left_out(case) for case in CASES]
  assert all(len(rows) <= 1 for rows in reasons)
  used = [rows[0] for rows in reasons if rows]
  assert all(row in used for row in LEFT_OUT)
  compared = list(itertools.chain.from_iterable(cases(function) for function in COMPARED))
  assert len(compared) + len(used) == len(CASES)
  assert (len(compared), len(used)) == (187, 37)


def test_the_golden_values_are_from_the_documented_versions():
  made_with = GOLDEN["made_with"]
  assert (made_with["verl"], made_with["trl"]) == ("0.9.1", "1.16.0")
