"""The main loop with every strategy switched on, in one process on tiny models."""

import functools

import jax
import numpy as np
import pytest

from experiments.setup.build import build, build_collector, build_diagnostics, build_update, optimizers
from experiments.setup.config_flags import read_config
from rspo_jax.rewards.base import RewardResult
from rspo_jax.rl_step import rl_step
from rspo_jax.run.metrics import is_known
from rspo_jax.training.state import init_state
from tests.support.configs import SETTINGS, changed

STRATEGIES = {
  "reinforce_pp with KL in the reward, dynamic sampling, overlong penalty": {
    "objective.name": "reinforce_pp",
    "rl.reward_kl_coefficient": 0.1,
    "loss.kl_estimator": "k1",
    "collector.dynamic_sampling_rounds": 3,
    "collector.overlong_buffer": 4,
  },
  "cispo, continuous batching, sampler replay, TIS, KL in the loss, frozen router, probes": {
    "objective.name": "cispo",
    "sampling.rows": 16,
    "loss.kl_coefficient": 0.1,
    "loss.replay": "sampler",
    "shift.deviation": "kl",
    "shift.placement": "weight",
    "optimizer.freeze_router": True,
    "loss.router_z_coefficient": 0.001,
    "mismatch.correction": "tis",
    "diagnostics.every": 1,
    "diagnostics.pieces": 2,
  },
}


@functools.cache
def setup(name, data_dir):
  keys = {
    key: value for key, value in SETTINGS.items() if key.startswith(("model.", "data.", "rl.minib", "sampling.samples"))
  } | {
    "collector.prompts": 16,
    "data.data_dir": data_dir,
    "runtime.mesh": {"data": 8},
    "warm_start.batch_size": 8,
  }
  given = keys | STRATEGIES[name]
  config = read_config(changed(**{key.replace(".", "__"): value for key, value in given.items()}))
  components = build(config)
  optimizer, _ = optimizers(config)["rl"]
  return components, optimizer, build_collector(components), build_update(components, optimizer)


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_step_runs_reports_documented_metrics_and_repeats_itself(name, tmp_path_factory):
  components, optimizer, collector, functions = setup(name, str(tmp_path_factory.getbasetemp() / "data"))
  config = components.config
  diagnose = build_diagnostics(components) if config.diagnostics.every else None
  results = []
  for _ in range(2):
    state = init_state(components.policy, optimizer, 0, components.layout)
    reference = jax.tree.map(lambda leaf: leaf * 1.01, state.params)
    before = jax.device_get(state.params)
    state, metrics = rl_step(state, 0, collector=collector, functions=functions, reference=reference, diagnose=diagnose)
    results.append((jax.device_get(state.params), metrics))
  assert all(map(is_known, metrics))
  for one, other in zip(jax.tree.leaves(results[0][0]), jax.tree.leaves(results[1][0]), strict=True):
    np.testing.assert_array_equal(one, other)
  assert not np.array_equal(before["embedding"], state.params["embedding"])
  router = "layers_0", "moe", "router"
  moved = not np.array_equal(
    functools.reduce(lambda tree, key: tree[key], router, before),
    functools.reduce(lambda tree, key: tree[key], router, state.params),
  )
  assert moved != config.optimizer.freeze_router
  if config.collector.dynamic_sampling_rounds > 1:
    assert 1 <= metrics["groups/sampled"] <= 3 and metrics["reward/overlong"] <= 0
  if config.diagnostics.every:
    assert metrics["mismatch/weight_mean"] == pytest.approx(1.0, abs=1e-3)
    assert metrics["kl/reference"] >= 0 and metrics["noise/all"] > 0 and metrics["noise/router"] == 0
    assert metrics["router/overlap"] == 1 and metrics["replay/log_ratio_square"] > 0


def test_dynamic_sampling_trains_on_groups_whose_rewards_differ(tmp_path_factory):
  name = next(iter(STRATEGIES))
  components, *_ = setup(name, str(tmp_path_factory.getbasetemp() / "data"))
  seen = []

  def reward(text, example):
    """Alike within a group but for one prompt in four, so that a batch alone never suffices."""
    has_signal = sum(map(ord, example.prompt)) % 4 == 0
    seen.append(has_signal)
    return RewardResult(float(len(seen) % 2) * 2 if has_signal else 0.0, False, True)

  collector = build_collector(components._replace(reward=reward))
  params = jax.jit(components.policy.init)(jax.random.key(0))
  sampled = collector.collect(params, 0)
  size = components.config.sampling.samples_per_prompt
  has_signal = np.array(seen).reshape(-1, size)[:, 0].sum()
  groups = (sampled.reward > 0).reshape(-1, size)  # 2 less an overlong penalty of at most 1
  spread = (groups.max(1) > groups.min(1)).sum()
  assert sampled.metrics["groups/sampled"] > 1 and spread > 0
  assert spread == min(has_signal, components.config.collector.prompts)
  # Rows and rewards moved together: every kept row's tokens are those of one sampled prompt, its group's.
  tokens, valid = np.asarray(sampled.rollout.tokens), np.asarray(sampled.rollout.valid)
  prompts = np.where(valid, tokens, -1)[:, : components.prompt_length].reshape(len(groups), size, -1)
  assert (prompts == prompts[:, :1]).all()
  texts = [components.tokenizer.decode([t for t in row[0].tolist() if t >= 0]) for row in prompts]
  expected = [sum(map(ord, text)) % 4 == 0 for text in texts]
  np.testing.assert_array_equal(expected, groups.max(1) > groups.min(1))
