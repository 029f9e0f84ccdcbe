"""Policy, objective, reward and data set of a user's own, named by dotted paths in a config."""

import dataclasses

import ml_collections
import pytest

from experiments.config import DataConfig, EvaluationConfig, ExperimentConfig, Named
from experiments.reporting.progress import Progress
from experiments.setup.build import build, make_policy, update_options
from experiments.setup.config_flags import config_dict, plain_config, read_config
from experiments.setup.model_files import initial_state, read_model
from experiments.setup.runtime import RuntimeConfig
from experiments.train import train
from rspo_jax.rl_step import RLOptions
from rspo_jax.rollout import SamplingOptions
from rspo_jax.rollout.collector import CollectorOptions
from tests.support import user_module

MODULE = "tests.support.user_module"
CONFIG = ExperimentConfig(
  seed=0,
  model=None,
  steps=2,
  tokenizer="bytes",
  policy=Named(f"{MODULE}:make_policy", {"vocab": 257}),
  data=DataConfig(f"{MODULE}:letters", options={"count": 16}),
  reward=Named(f"{MODULE}:longest", {"per_letter": 0.5}),
  objective=Named(f"{MODULE}:unclipped", {"power": 0.5}),
  sampling=SamplingOptions(3, samples_per_prompt=2),
  collector=CollectorOptions(prompts=8),
  rl=RLOptions(minibatches=1),
  evaluation=EvaluationConfig(samples=2, batch_problems=8),
  runtime=RuntimeConfig(compilation_cache=""),
)


def test_a_run_of_nothing_but_the_users_own_trains_and_continues(tmp_path):
  given = config_dict(CONFIG)
  given.objective.options.power = 0.25  # a flag
  config = read_config(given)
  assert update_options(config).objective.func is user_module.unclipped
  assert update_options(config).objective.keywords == {"power": 0.25}
  with Progress() as progress:
    summary = train(config, tmp_path, progress)
    assert summary["after"]["success"] is not None
    again = read_config(ml_collections.ConfigDict(plain_config(config)))
    assert again == config
    assert train(again, tmp_path, progress)["after"] == summary["after"]  # nothing is left to do
  with pytest.raises(ValueError, match="is a run whose policy is tests.support.user_module:make_policy"):
    read_model(tmp_path)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"policy": Named(f"{MODULE}:make_polcy")}, "config.policy.name is .*did you mean make_policy"),
    ({"policy": Named("transfomer")}, "config.policy.name is 'transfomer'; did you mean transformer"),
    ({"policy": Named("transformer")}, "config.model is None; describe the model there"),
    ({"objective": Named(f"{MODULE}:unclipped", {"powr": 1.0})}, "config.objective: .*powr.*did you mean power"),
    ({"objective": Named(f"{MODULE}:longest")}, "config.objective: .*want a function .log_ratio, advantage, mask"),
    ({"data": DataConfig("nowhere:letters")}, "config.data.name is .*module nowhere cannot be imported"),
    ({"reward": Named(f"{MODULE}:longest", {"per_leter": 1.0})}, "per_leter is unknown; did you mean per_letter"),
  ],
)  # fmt: skip
def test_mistakes_in_paths_and_options_are_reported_with_their_key(changes, message):
  with pytest.raises(ValueError, match=message):
    read_config(config_dict(dataclasses.replace(CONFIG, **changes)))


def test_a_policy_that_does_not_fit_is_refused_before_anything_compiles(tmp_path):
  def changed(**changes):
    return dataclasses.replace(CONFIG, **changes)

  with pytest.raises(ValueError, match=r"config.policy.options do not fit .*vocab"):
    make_policy(changed(policy=Named(f"{MODULE}:make_policy")))
  with pytest.raises(ValueError, match=r"user_module:letters returned a dict; want a rspo_jax.Policy"):
    make_policy(changed(policy=Named(f"{MODULE}:letters", {"count": 2})))
  with pytest.raises(ValueError, match="vocab_size is 100 but the tokenizer has 257 tokens"):
    build(changed(policy=Named(f"{MODULE}:make_policy", {"vocab": 100})))
  with pytest.raises(ValueError, match="only our own models are read from folders"):
    initial_state(build(changed(pretrained=str(tmp_path))), None)
