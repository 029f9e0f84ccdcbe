"""Rewards by name, and how a batch of completions is scored. docs/rewards.md lists them.

`REWARDS` maps a name to a function (text, example) -> RewardResult, to a class of rewards that judge whole batches
(`rspo_jax.rewards.base`), or to what makes one of other rewards; `make_reward` binds its options. Any other callable is
named by its path, "package.module:function".
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rspo_jax.lookup import is_path, load_path, near
from rspo_jax.rewards.base import Reward, ZeroOnError, close
from rspo_jax.rewards.code.reward import CodeReward
from rspo_jax.rewards.composed import BySourceReward, WeightedReward
from rspo_jax.rewards.custom import CustomReward
from rspo_jax.rewards.math.reward import MathReward
from rspo_jax.rewards.puzzles import countdown_reward, knights_reward
from rspo_jax.rewards.text import FormatReward, LengthReward, exact_match_reward, repetition_reward


def weighted(terms: Mapping[str, Mapping[str, Any]], success: str = "") -> WeightedReward:
  """A `WeightedReward` of label -> {"name": reward, "weight": 1.0, "options": {}}; success: label of the term that says
  whether the answer is right, by default the only one."""
  if success not in terms and (success or len(terms) > 1):
    raise ValueError(
      f"success is {success!r}; name the term that says whether the answer is right, of {', '.join(terms)}."
    )
  made = _make_all(terms)
  weights = {label: (made[label], float(term.get("weight", 1.0))) for label, term in terms.items()}
  return WeightedReward(weights, success or next(iter(terms)))


def by_source(**sources: Mapping[str, Any]) -> BySourceReward:
  """A `BySourceReward` of source -> {"name": reward, "options": {}}; '*' is for all other sources."""
  return BySourceReward(_make_all(sources))


def _make_all(specs: Mapping[str, Mapping[str, Any]]) -> dict[str, Reward]:
  """All of them, or an error and none: those that were made are closed."""
  with contextlib.ExitStack() as undo:
    made = {}
    for label, spec in specs.items():
      made[label] = make_reward(spec["name"], **spec.get("options", {}))
      undo.callback(close, made[label])
    undo.pop_all()
  return made


REWARDS: dict[str, Callable[..., Any]] = {
  "countdown": countdown_reward,
  "knights": knights_reward,
  "math": MathReward,
  "code": CodeReward,
  "format": FormatReward,
  "exact_match": exact_match_reward,
  "repetition": repetition_reward,
  "length": LengthReward,
  "weighted": weighted,
  "by_source": by_source,
}
_COMPOSED = (weighted, by_source)
_OF_PATHS = ("timeout", "workers", "success_at")  # options of a callable by its path that are not its own
ON_ERROR = ("fail", "zero")


def make_reward(name: str, *, on_error: str = "fail", **options: Any) -> Reward:
  """A reward of `REWARDS`, or a callable by its path (`CustomReward`), with its options.

  Args:
    on_error: what a completion that makes the reward raise does: 'fail' ends the run with an error that names it;
      'zero' gives it reward 0 and the reason 'failed' (`judging.ZeroOnError`).
  Raises:
    ValueError: an unknown name, an unknown option or an impossible value; names what is near.
  """
  check_reward(name, {"on_error": on_error, **options})
  made = REWARDS.get(name)
  if made is None:
    own = {key: options.pop(key) for key in _OF_PATHS if key in options}
    reward = CustomReward(name, options=options, **own)
  elif isinstance(made, type) or made in _COMPOSED:
    reward = made(**options)
  else:
    reward = functools.partial(made, **options)
  return ZeroOnError(reward) if on_error == "zero" else reward


def check_reward(name: Any, options: Any, where: str = "reward") -> None:
  """ValueError for a name, option or term that `make_reward` does not know, by its key below `where`; makes nothing."""
  if not isinstance(name, str) or not (name in REWARDS or is_path(name)):
    raise ValueError(
      f"{where}.name is {name!r}; {near(str(name), REWARDS)} A reward of your own is named package.module:function."
    )
  if not isinstance(options, Mapping):
    raise ValueError(f"{where}.options is {options!r}; want a group of options.")
  if options.get("on_error", "fail") not in ON_ERROR:
    raise ValueError(f"{where}.options.on_error is {options['on_error']!r}; want one of {', '.join(ON_ERROR)}.")
  at = f"{where}.options"
  if name == "by_source":
    for source, spec in options.items():
      if source != "on_error":
        _check_spec(spec, f"{at}.{source}", ("name", "options"))
    return
  try:
    made = REWARDS[name] if name in REWARDS else load_path(name)
  except ValueError as error:
    raise ValueError(f"{where}.name is {error}") from error
  parameters = list(inspect.signature(made).parameters.values())
  if not isinstance(made, type) and made not in _COMPOSED:
    parameters = parameters[2:]  # text and example
  known = {p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)} | {"on_error"}
  known |= set() if name in REWARDS else set(_OF_PATHS)
  if not any(p.kind is p.VAR_KEYWORD for p in parameters):
    for option in options:
      if option not in known:
        raise ValueError(f"{at}.{option} is unknown; {near(option, known)}")
  if missing := [p.name for p in parameters if p.name in known and p.default is p.empty and p.name not in options]:
    raise ValueError(f"{at} lacks {', '.join(missing)}, which {name} needs.")
  if name == "weighted":
    if not isinstance(options["terms"], Mapping) or not options["terms"]:
      raise ValueError(f"{at}.terms is {options['terms']!r}; want label -> name, weight, options.")
    for label, term in options["terms"].items():
      _check_spec(term, f"{at}.terms.{label}", ("name", "weight", "options"))


def reward_names(name: str, options: Mapping[str, Any]) -> set[str]:
  """The names of a reward and of all that it is made of."""
  specs = {"weighted": options.get("terms", {}), "by_source": options}.get(name, {}).values()
  inner = [reward_names(spec["name"], spec.get("options", {})) for spec in specs if isinstance(spec, Mapping)]
  return {name}.union(*inner)


def _check_spec(spec: Any, where: str, known: Sequence[str]) -> None:
  if not isinstance(spec, Mapping) or "name" not in spec:
    raise ValueError(f"{where} is {spec!r}; want a group of {', '.join(known)}, at least name.")
  for key in spec:
    if key not in known:
      raise ValueError(f"{where}.{key} is unknown; {near(key, known)}")
  weight = spec.get("weight", 1.0)
  if isinstance(weight, bool) or not isinstance(weight, int | float):
    raise ValueError(f"{where}.weight is {weight!r}; want a number.")
  check_reward(spec["name"], spec.get("options", {}), where)
