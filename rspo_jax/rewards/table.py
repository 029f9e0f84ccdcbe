"""Rewards by name, built from a config's name and options. docs/rewards.md lists them.

`REWARDS` maps a name to a function (text, example) -> RewardResult, to a class of rewards that score whole batches
(`rspo_jax.rewards.base`), or to a function that composes rewards; `make_reward` binds the options. Any other callable
is named by its path, "package.module:function".
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rspo_jax.lookup import look_up, near
from rspo_jax.rewards.base import Reward, ZeroOnError, close
from rspo_jax.rewards.code.reward import CodeReward
from rspo_jax.rewards.composed import BySourceReward, WeightedReward
from rspo_jax.rewards.custom import CustomReward
from rspo_jax.rewards.math.reward import MathReward
from rspo_jax.rewards.puzzles import countdown_reward, knights_reward
from rspo_jax.rewards.text import FormatReward, LengthReward, exact_match_reward, repetition_reward


def weighted(terms: Mapping[str, Mapping[str, Any]], success: str = "") -> WeightedReward:
  """A `WeightedReward` from options.

  Args:
    terms: label -> {"name": reward, "weight": 1.0, "options": {}}.
    success: label of the term that decides whether the answer is correct; by default the only term.
  Raises:
    ValueError: success is not a label, or is missing although there are several terms.
  """
  if success not in terms and (success or len(terms) > 1):
    raise ValueError(
      f"success is {success!r}; name the term that decides whether the answer is correct, of {', '.join(terms)}."
    )
  rewards = _make_all(terms)
  weights = {label: (rewards[label], float(term.get("weight", 1.0))) for label, term in terms.items()}
  return WeightedReward(weights, success or next(iter(terms)))


def by_source(**sources: Mapping[str, Any]) -> BySourceReward:
  """A `BySourceReward` from source -> {"name": reward, "options": {}}; '*' is for all other sources."""
  return BySourceReward(_make_all(sources))


def _make_all(specs: Mapping[str, Mapping[str, Any]]) -> dict[str, Reward]:
  """A reward per label. If one of them raises, those built before it are closed."""
  with contextlib.ExitStack() as undo:
    rewards = {}
    for label, spec in specs.items():
      rewards[label] = make_reward(spec["name"], **spec.get("options", {}))
      undo.callback(close, rewards[label])
    undo.pop_all()
  return rewards


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
_CUSTOM_OPTIONS = ("timeout", "workers", "success_at")  # options of CustomReward, not of the user's callable
ON_ERROR = ("fail", "zero")


def make_reward(name: str, *, on_error: str = "fail", **options: Any) -> Reward:
  """A reward of `REWARDS`, or a callable by its path (`CustomReward`), with its options.

  Args:
    on_error: treatment of a completion that the reward raises for: 'fail' ends the run with an error that names it;
      'zero' gives it reward 0 and the reason 'failed' (`ZeroOnError`).
  Raises:
    ValueError: an unknown name, an unknown option or a value out of range; suggests a similar name.
  """
  check_reward(name, {"on_error": on_error, **options})
  factory = REWARDS.get(name)
  if factory is None:
    custom = {key: options.pop(key) for key in _CUSTOM_OPTIONS if key in options}
    reward = CustomReward(name, options=options, **custom)
  elif isinstance(factory, type) or factory in _COMPOSED:
    reward = factory(**options)
  else:
    reward = functools.partial(factory, **options)
  return ZeroOnError(reward) if on_error == "zero" else reward


def check_reward(name: Any, options: Any, where: str = "reward") -> None:
  """Checks names and options at every depth, without building a reward.

  Args:
    name, options: as of `make_reward`.
    where: key of the reward in the config, for messages.
  Raises:
    ValueError: a name, option or term that `make_reward` does not know; names its key and suggests a similar one.
  """
  factory = look_up(f"{where}.name", name, REWARDS)
  if not isinstance(options, Mapping):
    raise ValueError(f"{where}.options is {options!r}; want a group of options.")
  if options.get("on_error", "fail") not in ON_ERROR:
    raise ValueError(f"{where}.options.on_error is {options['on_error']!r}; want one of {', '.join(ON_ERROR)}.")
  if name == "by_source":
    for source, spec in options.items():
      if source != "on_error":
        _check_spec(spec, f"{where}.options.{source}", ("name", "options"))
    return
  _check_options(name, factory, options, where)
  if name == "weighted":
    terms, at = options["terms"], f"{where}.options.terms"
    if not isinstance(terms, Mapping) or not terms:
      raise ValueError(f"{at} is {terms!r}; want label -> name, weight, options.")
    for label, term in terms.items():
      _check_spec(term, f"{at}.{label}", ("name", "weight", "options"))


def _check_options(name: str, factory: Callable[..., Any], options: Mapping[str, Any], where: str) -> None:
  """Compares options with the signature of the reward. ValueError for an unknown or a missing one."""
  parameters = list(inspect.signature(factory).parameters.values())
  if not isinstance(factory, type) and factory not in _COMPOSED:
    parameters = parameters[2:]  # text and example
  known = {p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)} | {"on_error"}
  known |= set() if name in REWARDS else set(_CUSTOM_OPTIONS)
  if not any(p.kind is p.VAR_KEYWORD for p in parameters):
    for option in options:
      if option not in known:
        raise ValueError(f"{where}.options.{option} is unknown; {near(option, known)}")
  if missing := [p.name for p in parameters if p.name in known and p.default is p.empty and p.name not in options]:
    raise ValueError(f"{where}.options lacks {', '.join(missing)}, which {name} needs.")


def reward_names(name: str, options: Mapping[str, Any]) -> set[str]:
  """The names of a reward and of all rewards that it is composed of."""
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
