"""Objectives by name with their options: `make_objective`, `objective_options`, `check_recipe`."""

import numpy as np
import pytest

from rspo_jax.objectives.sequence_level import gmpo
from rspo_jax.objectives.table import OBJECTIVES, Recipe, check_recipe, make_objective, objective_options
from rspo_jax.objectives.token_level import cispo, grpo
from tests.support import user_objectives
from tests.support.objective_cases import batch

OURS = "tests.support.user_objectives:"


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_name_alone_gives_the_recipe_of_the_table(name):
  recipe = make_objective(name)
  assert recipe[1:] == OBJECTIVES[name][1:]
  got, want = (r.objective(*batch()[:3]) for r in (recipe, OBJECTIVES[name]))
  np.testing.assert_array_equal(got.objective, want.objective)


def test_options_are_bound_over_those_of_the_recipe_and_none_keeps_the_default():
  dapo = make_objective("dapo", dual_clip=3.0, eps_low=None)
  assert dapo.objective.func is grpo and dapo.objective.keywords == {"eps_high": 0.28, "dual_clip": 3.0}
  assert make_objective("dapo", eps_high=0.1).objective.keywords == {"eps_high": 0.1}


def test_an_objective_of_the_user_is_named_by_its_path():
  recipe = make_objective(f"{OURS}linear", slope=2.0)
  assert recipe[1:] == Recipe(gmpo)[1:]
  log_ratio, advantage, mask, _ = batch()
  want = np.where(mask, 2 * log_ratio * advantage[:, None], 0)
  np.testing.assert_allclose(recipe.objective(log_ratio, advantage, mask).objective, want, rtol=1e-6)


def test_an_unknown_name_or_option_is_reported_with_the_nearest():
  with pytest.raises(ValueError, match=r"objective is 'gmp'; did you mean gmpo\?"):
    make_objective("gmp")
  with pytest.raises(ValueError, match="user_objectives has no callable liner; did you mean linear"):
    make_objective(f"{OURS}liner")
  with pytest.raises(ValueError, match="'grpo' has no option 'eps_lo'; it has .*dual_clip; did you mean eps_low"):
    make_objective("grpo", eps_lo=0.1)
  with pytest.raises(ValueError, match="'policy_gradient' has no option 'eps_low'; it has none"):
    make_objective("policy_gradient", eps_low=0.1)
  with pytest.raises(ValueError, match="has no option 'placement'"):
    make_objective("gmpo", placement="weight")


def test_a_function_of_another_signature_is_refused():
  with pytest.raises(ValueError, match="without_shift': got an unexpected .*'log_shift'; want a function"):
    make_objective(f"{OURS}without_shift")
  with pytest.raises(ValueError, match="linear': missing a required .*'slope'"):
    make_objective(f"{OURS}linear")


def test_options_have_the_plain_types_of_their_annotations():
  assert {name: objective_options(recipe.objective) for name, recipe in OBJECTIVES.items()} == {
    "policy_gradient": {},
    "reinforce_pp": {"eps_low": float, "eps_high": float, "dual_clip": float},
    "reinforce_pp_baseline": {"eps_low": float, "eps_high": float, "dual_clip": float},
    "rloo": {"ratio": str, "eps_low": float, "eps_high": float},
    "grpo": {"eps_low": float, "eps_high": float, "dual_clip": float},
    "dr_grpo": {"eps_low": float, "eps_high": float, "dual_clip": float},
    "dapo": {"eps_low": float, "eps_high": float, "dual_clip": float},
    "gspo": {"eps_low": float, "eps_high": float},
    "gspo_token": {"eps_low": float, "eps_high": float},
    "gmpo": {"eps_low": float, "eps_high": float, "bounds": str, "length_epsilon": float},
    "cispo": {"eps_low": float, "eps_high": float, "bounds": str},
    "sapo": {"tau_pos": float, "tau_neg": float},
  }
  assert objective_options(user_objectives.linear) == {"slope": float, "order": int, "kind": str, "plain": float}
  with pytest.raises(ValueError, match="option table of an objective is annotated .*dict.*want float, int"):
    objective_options(user_objectives.with_a_table)


def test_advantages_of_tokens_need_an_objective_of_tokens():
  for name in OBJECTIVES:
    check_recipe(make_objective(name))
  with pytest.raises(ValueError, match=r"scale is 'batch_std', .*gmpo refuses them: advantage is \(1, 1\)"):
    check_recipe(make_objective("gmpo")._replace(scale="batch_std"))
  with pytest.raises(ValueError, match="rloo refuses them"):
    check_recipe(make_objective("rloo")._replace(scale="batch_std"))
  check_recipe(make_objective("rloo", ratio="token")._replace(scale="batch_std"))
  check_recipe(Recipe(cispo, scale="batch_std"))


def test_values_out_of_range_are_reported_before_anything_is_compiled():
  with pytest.raises(ValueError, match="dual_clip is 0.5; want a ratio above 1"):
    check_recipe(make_objective("reinforce_pp", dual_clip=0.5))
  with pytest.raises(ValueError, match="bounds is 'paper'"):
    check_recipe(make_objective("gmpo", bounds="paper"))
