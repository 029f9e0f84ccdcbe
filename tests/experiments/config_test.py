import dataclasses
import json

import jax
import ml_collections
import pytest

from experiments.configs import countdown_tiny
from experiments.setup import runtime
from experiments.setup.build import advantage_options, build, update_options
from experiments.setup.checks import check_divides
from experiments.setup.config_flags import config_dict, plain_config, read_config
from experiments.setup.optimizer import make_optimizer
from rspo_jax.objectives.mismatch import MismatchOptions
from rspo_jax.objectives.table import OBJECTIVES
from rspo_jax.objectives.token_level import grpo
from tests.support.configs import changed

LENGTH = {"name": "length", "options": {"max_length": 14, "buffer": 4}}
TERMS = {"terms": {"it": {"name": "countdown"}, "long": LENGTH}, "success": "it"}
LONG = {"name": "weighted", "options": TERMS}


def test_a_config_survives_the_way_through_ml_collections():
  config = read_config(countdown_tiny.get_config())
  assert read_config(config_dict(config)) == config


@pytest.mark.parametrize(
  ("key", "value", "message"),
  [
    ("rl__minibatch", 3, "config.rl.minibatch is unknown; did you mean config.rl.minibatches?"),
    ("rl__steps", 3, "config.rl.steps is now config.steps"),
    ("router", {"shift": False}, "config.router.shift is now config.shift.on"),
    ("sampling__stop_ids", (1,), "config.sampling.stop_ids follows from config.tokenizer"),
    ("model__hiden_size", 8, "did you mean config.model.hidden_size?"),
    ("steps", "ten", "config.steps is 'ten' .str.; want int"),
    ("steps", True, "want int"),
    ("shift__on", 1, "config.shift.on is 1; want true or false"),
    ("rl", 3, "config.rl is 3; want a group"),
    ("objective__name", "ppo", "want one of cispo, dapo, dr_grpo"),
    ("data__name", "countup", "config.data.name is 'countup'; did you mean countdown"),
    ("reward__name", "mth", "config.reward.name is 'mth'; did you mean math?"),
    (
      "reward__options",
      {"format_rewrd": 1},
      "config.reward.options.format_rewrd is unknown; did you mean format_reward?",
    ),
    ("reward", LONG, "long completions would be penalised twice"),
    ("sampling__samples_per_prompt", 1, "config.sampling.samples_per_prompt is 1; want 2 or more"),
    ("sampling__cache_sizes", 0, "config.sampling.cache_sizes is 0; want 1 or more"),
    ("sampling", {"max_new_tokens": 4, "rows": 4, "cache_sizes": 2}, "Set cache_sizes to 1, or rows to 0"),
    ("rl__minibatches", 7, "does not divide into 7 minibatches"),
    ("model__num_experts_per_tok", 99, "config.model.num_experts_per_tok is 99; want 1 to num_experts"),
    ("shift__floor", 1.5, "in .0, 1"),
    ("shift__placement", "late", "placement is 'late'; want one of"),
    ("loss__replay", "r2", "config.loss.replay is 'r2'; want one of"),
    ("objective__options__tau_pos", 2.0, "config.objective: .*gmpo.* has no option .tau_pos.; it has .*eps_low"),
    ("advantage__scale", "batch_std", "config.objective: scale is 'batch_std'.*sequence"),
    (
      "advantage__baseline",
      "grup",
      "config.advantage.baseline is 'grup'; want one of .*group_mean.*leave_one_out.*none",
    ),
    ("mismatch__correction", "ris", "want one of .*tis.*mis.*icepop"),
  ],
)
def test_mistakes_are_told_with_their_key_and_a_cure(key, value, message):
  with pytest.raises(ValueError, match=message):
    update_options(read_config(changed(collector__overlong_buffer=4, **{key: value})))


def test_a_config_survives_json():
  config = read_config(changed(mismatch__correction="icepop", objective__options__eps_low=0.3, shift__on=False))
  assert config.mismatch.correction == "icepop" and config.shift is None
  plain = json.loads(json.dumps(plain_config(config)))
  assert read_config(ml_collections.ConfigDict(plain)) == config


def test_setting_a_field_of_a_group_that_is_off_switches_it_on_unless_it_is_switched_off():
  assert read_config(changed()).mismatch is None
  assert read_config(changed(mismatch__on=True)).mismatch == MismatchOptions()
  assert read_config(changed(mismatch__correction="tis")).mismatch == MismatchOptions()
  assert read_config(changed(mismatch__correction="tis", mismatch__on=False)).mismatch is None
  assert read_config(changed(curriculum__high=0.9)).curriculum.high == 0.9
  with pytest.raises(ValueError, match=r"config.curriculum.low is 0.9 and high 0.5"):
    read_config(changed(curriculum__low=0.9, curriculum__high=0.5))


def test_the_norm_length_is_the_longest_completion_by_default():
  config = read_config(changed(loss__aggregation="seq_mean_token_sum_norm"))
  assert update_options(config).norm_length == config.sampling.max_new_tokens


def test_missing_keys_are_named():
  given = countdown_tiny.get_config()
  with given.unlocked(), given.ignore_type():
    del given.model["hidden_size"]
  with pytest.raises(ValueError, match="config.model lacks hidden_size"):
    read_config(given)


@pytest.mark.parametrize(
  ("key", "value", "named"),
  [
    ("collector__prompts", 12, "config.collector.prompts"),
    ("warm_start__batch_size", 12, "config.warm_start.batch_size"),
    ("evaluation__batch_problems", 12, "config.evaluation.batch_problems"),
  ],
)
def test_batches_that_do_not_divide_over_the_mesh_are_told_before_compiling(key, value, named):
  config = read_config(changed(**{key: value}))
  with pytest.raises(ValueError, match=f"{named}.* 8 batch shards"):
    check_divides(config, 8)


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(tmp_path):
  with pytest.raises(ValueError, match="config.model.vocab_size is 8 but the tokenizer has 20"):
    build(read_config(changed(model__vocab_size=8, data__data_dir=str(tmp_path))))


def test_objective_settings_reach_the_update():
  options = update_options(read_config(changed(objective__name="grpo", objective__options__eps_low=0.1)))
  assert options.objective.func is grpo and options.objective.keywords == {"eps_low": 0.1}
  assert options.shift.floor == 0.8
  assert update_options(read_config(changed(shift__on=False))).shift is None
  rloo = {"objective__name": "rloo", "advantage__scale": "batch_std"}
  assert advantage_options(read_config(changed(**rloo, objective__options={"ratio": "token"}))).scale == "batch_std"
  with pytest.raises(ValueError, match="batch_std.*rloo"):
    read_config(changed(**rloo))
  sapo = update_options(read_config(changed(objective__name="sapo", objective__options__tau_neg=1.2)))
  assert sapo.objective.keywords == {"tau_neg": 1.2}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_named_objective_makes_an_update_with_its_own_surroundings(name):
  config = read_config(changed(objective__name=name))
  options, chosen = update_options(config), advantage_options(config)
  named = OBJECTIVES[name]
  assert (options.aggregation, chosen.baseline, chosen.scale) == named[1:]
  assert options.norm_length == config.sampling.max_new_tokens


def test_the_floor_schedule_begins_with_rl():
  given = changed(shift__floor_updates=10, shift__floor_start=1.0, shift__floor=0.5)
  config = read_config(given)
  floor = update_options(config).shift.floor_at
  begin = config.warm_start.steps
  assert [float(floor(begin + step)) for step in (0, 5, 10, 99)] == [1.0, 0.75, 0.5, 0.5]


def test_an_option_without_a_default_can_be_set_by_a_flag_and_only_to_its_type():
  given = countdown_tiny.get_config()
  given.objective.options.eps_low = 0.3
  assert read_config(given).objective.options == {"eps_low": 0.3}
  with pytest.raises(TypeError):
    given.objective.options.eps_low = "wide"


def test_the_schedule_warms_up_and_ends_at_its_final_fraction():
  config = dataclasses.replace(
    read_config(countdown_tiny.get_config()).optimizer, learning_rate=1.0, warmup_steps=10, final_fraction=0.1
  )
  _, schedule = make_optimizer(config, 100, None)
  assert 0 < schedule(0) < schedule(5) < schedule(10) == 1.0
  assert schedule(100) == pytest.approx(0.1)


def test_the_compilation_cache_is_on_by_default_in_the_users_cache_folder(monkeypatch, tmp_path):
  before = jax.config.jax_compilation_cache_dir
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  try:
    runtime.start_cache(read_config(countdown_tiny.get_config()).runtime)
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "rspo_jax" / "xla")
  finally:
    jax.config.update("jax_compilation_cache_dir", before)
