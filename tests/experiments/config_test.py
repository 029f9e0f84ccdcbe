import dataclasses

import jax
import pytest

from experiments.configs import countdown_tiny
from experiments.setup import runtime
from experiments.setup.build import build, recipe, update_options
from experiments.setup.config_flags import check_divides, config_dict, read_config
from experiments.setup.optimizer import make_optimizer
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
    ("rl__step", 3, "config.rl.step is unknown; did you mean config.rl.steps?"),
    ("model__hiden_size", 8, "did you mean config.model.hidden_size?"),
    ("rl__steps", "ten", "config.rl.steps is 'ten' .str.; want int"),
    ("rl__steps", True, "want int"),
    ("router__shift", 1, "want bool"),
    ("rl", 3, "config.rl is 3; want a group"),
    ("objective__name", "ppo", "want one of cispo, dapo, dr_grpo"),
    ("data__name", "countup", "config.data.name is 'countup'; want one of countdown"),
    ("reward__name", "mth", "config.reward.name is 'mth'; did you mean math?"),
    (
      "reward__options",
      {"format_rewrd": 1},
      "config.reward.options.format_rewrd is unknown; did you mean format_reward?",
    ),
    ("reward", LONG, "long completions would be punished twice"),
    ("rl__samples_per_prompt", 1, "config.rl.samples_per_prompt is 1; want 2 or more"),
    ("sampling__cache_sizes", 0, "config.sampling.cache_sizes is 0; want 1 or more"),
    ("sampling", {"rows": 4, "cache_sizes": 2}, "Set cache_sizes to 1, or rows to 0"),
    ("rl__minibatches", 7, "does not divide into 7 minibatches"),
    ("model__num_experts_per_tok", 99, "want 1 to num_experts"),
    ("router__shift_floor", 1.5, "in .0, 1"),
    ("router__placement", "late", "placement is 'late'; want one of"),
    ("router__replay", "r2", "config.router.replay is 'r2'; want one of none, scoring, sampler"),
    ("objective__tau_pos", 2.0, "config.objective.tau_pos is 2.0, but gmpo has no such option; it has .*eps_low"),
    ("objective__scale", "batch_std", "config.objective.scale is 'batch_std'.*sequence"),
    ("objective__baseline", "grup", "config.objective.baseline is 'grup'; want one of group_mean, leave_one_out, none"),
    ("mismatch__correction", "ris", "want one of none, tis, mis, icepop"),
  ],
)
def test_mistakes_are_told_with_their_key_and_a_cure(key, value, message):
  with pytest.raises(ValueError, match=message):
    update_options(read_config(changed(rl__overlong_buffer=4, **{key: value})))


def test_missing_keys_are_named():
  given = countdown_tiny.get_config()
  with given.unlocked(), given.ignore_type():
    del given.model["hidden_size"]
  with pytest.raises(ValueError, match="config.model lacks hidden_size"):
    read_config(given)


@pytest.mark.parametrize(
  ("key", "value", "named"),
  [
    ("rl__prompts", 12, "config.rl.prompts"),
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
  options = update_options(read_config(changed(objective__name="grpo", objective__eps_low=0.1)))
  assert options.objective.func is grpo and options.objective.keywords == {"eps_low": 0.1}
  assert options.shift.floor == 0.8
  assert update_options(read_config(changed(router__shift=False))).shift is None
  rloo = {"objective__name": "rloo", "objective__scale": "batch_std"}
  assert recipe(read_config(changed(**rloo, objective__ratio="token"))).scale == "batch_std"
  with pytest.raises(ValueError, match="batch_std.*rloo"):
    recipe(read_config(changed(**rloo)))
  sapo = update_options(read_config(changed(objective__name="sapo", objective__tau_neg=1.2)))
  assert sapo.objective.keywords == {"tau_neg": 1.2}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_named_objective_makes_an_update_with_its_own_surroundings(name):
  config = read_config(changed(objective__name=name))
  options, chosen = update_options(config), recipe(config)
  named = OBJECTIVES[name]
  assert (options.aggregation, chosen.baseline, chosen.scale) == named[1:]
  assert options.norm_length == config.sampling.max_new_tokens


def test_the_floor_schedule_begins_with_rl():
  given = changed(router__shift_floor_updates=10, router__shift_floor_start=1.0, router__shift_floor=0.5)
  config = read_config(given)
  floor = update_options(config).shift.floor_at
  begin = config.warm_start.steps
  assert [float(floor(begin + step)) for step in (0, 5, 10, 99)] == [1.0, 0.75, 0.5, 0.5]


def test_an_option_without_a_default_can_be_set_by_a_flag_and_only_to_its_type():
  given = countdown_tiny.get_config()
  given.objective.eps_low = 0.3
  assert read_config(given).objective.eps_low == 0.3
  with pytest.raises(TypeError):
    given.objective.eps_low = "wide"


def test_the_schedule_warms_up_and_ends_at_its_final_fraction():
  config = dataclasses.replace(
    read_config(countdown_tiny.get_config()).rl.optimizer, learning_rate=1.0, warmup_steps=10, final_fraction=0.1
  )
  _, schedule = make_optimizer(config, 100)
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
