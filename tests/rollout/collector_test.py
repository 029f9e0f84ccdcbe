"""Which groups a step trains on, with an engine that draws one token a tick and knows how long completions get."""

import threading
import types

import numpy as np
import pytest

from experiments.setup.build import Components
from experiments.setup.config_flags import read_config
from rspo_jax import mesh
from rspo_jax.data.examples import Example, Split
from rspo_jax.rewards.base import RewardResult
from rspo_jax.rollout import collector
from rspo_jax.rollout.collector import Collector
from rspo_jax.rollout.token_sampling import SamplingOptions
from rspo_jax.run.host_state import bundle, unbundle
from rspo_jax.tokenization.basic import ByteTokenizer
from tests.support.configs import changed

PROMPTS, SAMPLES, LONGEST, EXAMPLES = 4, 2, 30, 24


def length_of(number):
  """Tokens of a completion: most are short, one in ten takes fifteen times as long."""
  return LONGEST if number % 10 == 4 else 2


class Engine:
  """Stands for `ContinuousSampler.draw`; every tick draws a token of every completion. `ticks` counts them."""

  def __init__(self):
    self.ticks = 0

  def draw(self, params, waiting, key, *, version, after):
    known = {completion.number: completion for completion in waiting}
    news = [completion for completion in known.values() if completion.done]
    while (more := after(news)) is not None:
      known |= {completion.number: completion for completion in more}
      busy = [completion for completion in known.values() if not completion.done]
      if not busy:
        break
      self.ticks += 1
      news = []
      for old in busy:
        count = len(old.tokens) + 1
        new = old._replace(
          tokens=np.append(old.tokens, np.int32(1 + old.number % 100)),
          sampler_log_prob=np.append(old.sampler_log_prob, np.float32(-params)),
          log_prob=np.append(old.log_prob, np.float32(-params)),
          version=np.append(old.version, np.int32(version)),
          finished=count == length_of(old.number),
        )
        known[new.number] = new
        news += [new] if new.done else []
    return [known[number] for number in sorted(known)]


def right(text, example):
  """One of two completions of most prompts is right; of every third prompt all are wrong."""
  success = example.gold % 3 != 0 and ord(text[0]) % 2 == 1
  return RewardResult(float(success), success, True, "told")


@pytest.fixture
def make(monkeypatch):
  engine = Engine()
  monkeypatch.setattr(collector, "_drawer", lambda parts, options: (engine.draw, ()))

  def made(reward=right, **settings):
    config = read_config(
      changed(sampling__rows=4, rl__prompts=PROMPTS, rl__samples_per_prompt=SAMPLES, rl__minibatches=1, **settings)
    )
    tokenizer = ByteTokenizer()
    options = SamplingOptions(LONGEST, SAMPLES, stop_ids=(0,))
    parts = types.SimpleNamespace(
      config=config,
      splits={"train": Split("numbers", tuple(Example(f"{number:02}", number) for number in range(EXAMPLES)))},
      tokenizer=tokenizer,
      reward=reward,
      prompt_length=2,
      layout=mesh.make_layout({"data": 1}, [mesh.jax.devices()[0]]),
      sampling_options=lambda samples, record_experts: options,
      key=lambda stream, step=0: (stream, step),
    )
    return Collector(parts)

  made.engine = engine
  return made


def prompts_of(sampled):
  """The numbers that the trained rows' prompts spell, one a group."""
  tokens = np.asarray(sampled.rollout.tokens)[::SAMPLES, :2]
  return [int(ByteTokenizer().decode(row.tolist())) for row in tokens]


def walk(rollout, count):
  return [rollout._walk.at(i)[0].gold for i in range(count)]


def test_a_plain_step_trains_on_the_next_prompts_of_the_walk_in_order(make):
  made = make()
  for step in range(3):
    sampled = made(1.0, step)
    assert prompts_of(sampled) == walk(made, 12)[step * PROMPTS : (step + 1) * PROMPTS]
    lengths = np.asarray(sampled.rollout.action_mask).sum(axis=1)
    numbers = np.arange(PROMPTS * SAMPLES)
    np.testing.assert_array_equal(lengths, [length_of(number) for number in numbers])
    assert sampled.rollout.version is None and sampled.tokens == lengths.sum()
    assert sampled.metrics["reward/reason/told"] == 1
  assert made.state() == {}


def test_with_carry_over_no_token_is_older_than_allowed_and_no_group_is_lost(make):
  made = make(rl__oversampling=3, rl__carry_over=2)
  trained, oldest, ticks = [], 0, []
  for step in range(18):
    before = make.engine.ticks
    sampled = made(float(step), step)
    ticks.append(make.engine.ticks - before)
    trained += prompts_of(sampled)
    mask = np.asarray(sampled.rollout.action_mask)
    age = step - np.asarray(sampled.rollout.version)[mask]
    assert age.min() >= 0 and age.max() <= 2
    assert (sampled.metrics["staleness/max"], sampled.metrics["staleness/mean"]) == (
      age.max(),
      pytest.approx(age.mean()),
    )
    oldest = max(oldest, age.max())
    # A token's log-prob is the one of the policy that drew it.
    np.testing.assert_array_equal(np.asarray(sampled.rollout.log_prob)[mask], age - step)
  assert oldest == 2
  under_way = [int(group.example.prompt) for group in made._groups]
  assert len(under_way) == 3
  assert sorted(trained + under_way) == sorted(walk(made, 18 * PROMPTS + 3))
  assert np.mean(ticks) < LONGEST / 2  # steps do not wait for their longest completion


def test_a_continued_run_draws_what_an_undisturbed_one_draws(make):
  settings = {"rl__oversampling": 3, "rl__carry_over": 2, "rl__dynamic_sampling_rounds": 2}
  undisturbed, layout = make(**settings), mesh.make_layout({"data": 1}, [mesh.jax.devices()[0]])
  carried = judged = 0
  for step in range(8):
    tree, meta = bundle("state", undisturbed.state(), layout)
    train, arrays = unbundle(tree, meta)
    assert train == "state"
    continued = make(**settings)
    continued.restore(arrays)
    carried += len(continued._groups)
    judged += sum(group.judged is not None for group in continued._groups)
    wanted, found = undisturbed(1.0, step), continued(1.0, step)
    for name, array in mesh.jax.device_get(vars(wanted.rollout)).items():
      np.testing.assert_array_equal(getattr(found.rollout, name), array, err_msg=name)
    np.testing.assert_array_equal(found.reward, wanted.reward)
    assert found.metrics == wanted.metrics
  assert carried and judged


def test_dynamic_sampling_trains_on_groups_whose_rewards_differ_while_there_are_some(make):
  made = make(rl__dynamic_sampling_rounds=3)
  sampled = made(1.0, 0)
  assert all(number % 3 for number in prompts_of(sampled)) and sampled.metrics["groups/sampled"] > 1
  begun = made._next
  made(1.0, 1)
  assert made._next - 3 * PROMPTS <= 3 * PROMPTS and begun <= 3 * PROMPTS  # keys of a step begin at a place of its own
  hopeless = make(lambda text, example: RewardResult(0.0, False, False), rl__dynamic_sampling_rounds=3)
  sampled = hopeless(1.0, 0)
  assert sampled.metrics["groups/sampled"] == 3 and len(prompts_of(sampled)) == PROMPTS


def test_a_curriculum_passes_over_what_is_never_solved_and_goes_on_after_a_restart(make):
  settings = {"curriculum__low": 0.25, "curriculum__high": 0.75, "rl__oversampling": 2, "rl__carry_over": 2}
  made = make(**settings)
  trained = [prompts_of(made(1.0, step)) for step in range(8)]  # every problem was sampled once
  continued = make(**settings)
  continued.restore(made.state())
  for step in range(8, 16):
    sampled, again = made(1.0, step), continued(1.0, step)
    assert prompts_of(sampled) == prompts_of(again) and sampled.metrics == again.metrics
    trained.append(prompts_of(sampled))
  hopeless = [sum(number % 3 == 0 for number in step) for step in trained]
  assert sum(hopeless[:6]) >= 6 and sum(hopeless[-6:]) <= 2
  assert sampled.metrics["curriculum/below"] == pytest.approx(1 / 3)


def test_what_oversampling_leaves_is_thrown_away_without_carry_over(make):
  made = make(rl__oversampling=3)
  sampled = made(1.0, 0)
  assert make.engine.ticks < LONGEST  # the long ones were not waited for
  assert set(prompts_of(sampled)) < set(walk(made, 7)) and made.state() == {} and not made._groups


def test_rewards_are_worked_out_while_decoding_goes_on(make):
  ticks, inside = [], []

  def slow(text, example):
    inside.append(threading.current_thread().name)
    for _ in range(1000):
      if make.engine.ticks > len(inside) // (PROMPTS * SAMPLES * 2) + 2:
        break
      threading.Event().wait(0.01)
    ticks.append(make.engine.ticks)
    return RewardResult(1.0, True, True)

  make(slow)(1.0, 0)
  # The first groups are through after two ticks; their reward returns only when a third one has been drawn.
  assert min(ticks) >= 3 and all(name.startswith("rewards") for name in inside)


def test_carrying_over_needs_continuous_batching_and_room(make):
  with pytest.raises(ValueError, match=r"need continuous batching; set config.sampling.rows"):
    read_config(changed(rl__carry_over=1))
  with pytest.raises(ValueError, match="less than config.rl.prompts"):
    make(rl__oversampling=PROMPTS)
  with pytest.raises(ValueError, match=r"config.curriculum.low is 0.9 and high 0.5"):
    make(curriculum__low=0.9, curriculum__high=0.5)


def test_parts_have_what_these_tests_stand_in_for():
  assert {"config", "splits", "tokenizer", "reward", "prompt_length", "layout"} <= set(Components._fields)
  assert callable(Components.sampling_options) and callable(Components.key)
