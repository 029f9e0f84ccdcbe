"""Which groups a step trains on, with a sampler of one token per tick and known lengths of completions."""

import threading

import jax
import numpy as np
import pytest

from rspo_jax import mesh
from rspo_jax.data.curriculum import CurriculumOptions
from rspo_jax.data.examples import Example, Split, batches
from rspo_jax.rewards.base import RewardResult
from rspo_jax.rollout.collector import Collector, CollectorOptions
from rspo_jax.rollout.token_sampling import SamplingOptions
from rspo_jax.run.host_state import bundle, unbundle
from rspo_jax.run.metrics import deterministic
from rspo_jax.tokenization.basic import ByteTokenizer

PROMPTS, SAMPLES, LONGEST, EXAMPLES = 4, 2, 30, 24


def length_of(number):
  """Tokens of a completion: most are short, one in ten takes fifteen times as long."""
  return LONGEST if number % 10 == 4 else 2


class Engine:
  """A sampler that needs no model; every tick samples a token of every completion. `ticks` counts them.

  Like the samplers of ours that `kind` names: "rows" (continuous) and "remote" report completions as they are done,
  "batches" takes whole batches of P prompts and reports when the last completion of a batch is done.
  """

  programs = ()

  def __init__(self, kind="rows"):
    self.ticks, self.kind = 0, kind
    self.options = SamplingOptions(LONGEST, SAMPLES, stop_ids=(0,))
    self.prompts_per_call = PROMPTS if kind == "batches" else 1

  def draw(self, params, queue, key, *, version=0, on_finished=None):
    known = {completion.number: completion for completion in queue}
    finished = [completion for completion in known.values() if completion.done]
    while (more := on_finished(finished)) is not None:
      known |= {completion.number: completion for completion in more}
      busy = [completion for completion in known.values() if not completion.done]
      if not busy:
        break
      finished = []
      if self.kind == "batches":
        for completion in busy[: PROMPTS * SAMPLES]:
          while not completion.done:
            completion = self.extend(completion, params, version)
          finished.append(completion)
        self.ticks += max(len(completion.tokens) for completion in finished)
      else:
        self.ticks += 1
        extended = [self.extend(completion, params, version) for completion in busy]
        finished = [completion for completion in extended if completion.done]
        known |= {completion.number: completion for completion in extended}
      known |= {completion.number: completion for completion in finished}
    return [known[number] for number in sorted(known)]

  def extend(self, old, params, version):
    return old._replace(
      tokens=np.append(old.tokens, np.int32(1 + old.number % 100)),
      sampler_log_prob=np.append(old.sampler_log_prob, np.float32(-params)),
      log_prob=np.append(old.log_prob, np.float32(-params)),
      version=np.append(old.version, np.int32(version)),
      finished=len(old.tokens) + 1 == length_of(old.number),
    )


def right(text, example):
  """One of two completions of most prompts is right; of every third prompt all are wrong."""
  success = example.gold % 3 != 0 and ord(text[0]) % 2 == 1
  return RewardResult(float(success), success, True, "told")


SPLIT = Split("numbers", tuple(Example(f"{number:02}", number) for number in range(EXAMPLES)))
LAYOUT = mesh.make_layout({"data": 1}, jax.devices()[:1])


@pytest.fixture
def make():
  """Makes a collector; `make.engine` is the sampler of the last one."""

  def made(reward=right, kind="rows", curriculum=None, **options):
    made.engine = Engine(kind)
    return Collector(
      made.engine,
      SPLIT,
      reward,
      ByteTokenizer(),
      CollectorOptions(prompts=PROMPTS, **options),
      prompt_length=2,
      key=jax.random.key(0),
      seed=0,
      layout=LAYOUT,
      curriculum=curriculum,
    )

  return made


def prompts_of(sampled):
  """The numbers that the trained rows' prompts spell, one a group."""
  tokens = np.asarray(sampled.rollout.tokens)[::SAMPLES, :2]
  return [int(ByteTokenizer().decode(row.tolist())) for row in tokens]


def stream(count):
  """The first examples of the index stream."""
  order = batches(SPLIT, 1, seed=0)
  return [order.at(i)[0].gold for i in range(count)]


def test_a_plain_step_trains_on_the_next_prompts_of_the_walk_in_order(make):
  made = make()
  for step in range(3):
    sampled = made.collect(1.0, step)
    assert prompts_of(sampled) == stream(12)[step * PROMPTS : (step + 1) * PROMPTS]
    lengths = np.asarray(sampled.rollout.action_mask).sum(axis=1)
    numbers = np.arange(PROMPTS * SAMPLES)
    np.testing.assert_array_equal(lengths, [length_of(number) for number in numbers])
    assert sampled.rollout.version is None
    rate = sampled.metrics["speed/sample_tokens_per_second"] * sampled.metrics["seconds/sample"]
    assert rate == pytest.approx(lengths.sum())
    assert sampled.metrics["reward/reason/told"] == 1
  assert made.state() == {}


def test_with_carry_over_no_token_is_older_than_allowed_and_no_group_is_lost(make):
  made = make(oversampling=3, carry_over=2)
  trained, oldest, ticks = [], 0, []
  for step in range(18):
    before = make.engine.ticks
    sampled = made.collect(float(step), step)
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
  under_way = [int(group.example.prompt) for group in made.carried]
  assert len(under_way) == 3
  assert sorted(trained + under_way) == sorted(stream(18 * PROMPTS + 3))
  assert np.mean(ticks) < LONGEST / 2  # steps do not wait for their longest completion


def test_a_continued_run_draws_what_an_undisturbed_one_draws(make):
  settings = {"oversampling": 3, "carry_over": 2, "dynamic_sampling_rounds": 2}
  undisturbed, layout = make(**settings), LAYOUT
  carried = scored = 0
  for step in range(8):
    tree, meta = bundle("state", undisturbed.state(), layout)
    train, arrays = unbundle(tree, meta)
    assert train == "state"
    continued = make(**settings)
    continued.restore(arrays)
    carried += len(continued.carried)
    scored += sum(group.scores is not None for group in continued.carried)
    wanted, found = undisturbed.collect(1.0, step), continued.collect(1.0, step)
    for name, array in jax.device_get(vars(wanted.rollout)).items():
      np.testing.assert_array_equal(getattr(found.rollout, name), array, err_msg=name)
    np.testing.assert_array_equal(found.reward, wanted.reward)
    assert deterministic(found.metrics) == deterministic(wanted.metrics)
  assert carried and scored


def test_dynamic_sampling_trains_on_groups_whose_rewards_differ_while_there_are_some(make):
  made = make(dynamic_sampling_rounds=3)
  sampled = made.collect(1.0, 0)
  assert all(number % 3 for number in prompts_of(sampled)) and sampled.metrics["groups/sampled"] > 1
  begun = made.begun
  made.collect(1.0, 1)
  assert made.begun - 3 * PROMPTS <= 3 * PROMPTS and begun <= 3 * PROMPTS  # keys of a step begin at a place of its own
  hopeless = make(lambda text, example: RewardResult(0.0, False, False), dynamic_sampling_rounds=3)
  sampled = hopeless.collect(1.0, 0)
  assert sampled.metrics["groups/sampled"] == 3 and len(prompts_of(sampled)) == PROMPTS


def test_a_curriculum_passes_over_what_is_never_solved_and_goes_on_after_a_restart(make):
  settings = {"curriculum": CurriculumOptions(low=0.25, high=0.75), "oversampling": 2, "carry_over": 2}
  made = make(**settings)
  trained = [prompts_of(made.collect(1.0, step)) for step in range(8)]  # every problem was sampled once
  continued = make(**settings)
  continued.restore(made.state())
  for step in range(8, 16):
    sampled, again = made.collect(1.0, step), continued.collect(1.0, step)
    assert prompts_of(sampled) == prompts_of(again) and deterministic(sampled.metrics) == deterministic(again.metrics)
    trained.append(prompts_of(sampled))
  hopeless = [sum(number % 3 == 0 for number in step) for step in trained]
  assert sum(hopeless[:6]) >= 6 and sum(hopeless[-6:]) <= 2
  assert sampled.metrics["curriculum/below"] == pytest.approx(1 / 3)


def test_what_oversampling_leaves_is_thrown_away_without_carry_over(make):
  made = make(oversampling=3)
  sampled = made.collect(1.0, 0)
  assert make.engine.ticks < LONGEST  # the long ones were not waited for
  assert set(prompts_of(sampled)) < set(stream(7)) and made.state() == {} and not made.carried


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

  make(slow).collect(1.0, 0)
  # The first groups are done after two ticks; their reward returns only after a third tick has been sampled.
  assert min(ticks) >= 3 and all(name.startswith("rewards") for name in inside)


@pytest.mark.parametrize("kind", ["rows", "batches", "remote"])
def test_every_sampler_oversamples_stops_early_and_carries_over(make, kind):
  """One contract: no group is lost, none is trained on twice, no token is too old."""
  made = make(kind=kind, oversampling=3, carry_over=2, dynamic_sampling_rounds=2)
  trained = []
  for step in range(12):
    sampled = made.collect(float(step), step)
    trained += prompts_of(sampled)
    mask = np.asarray(sampled.rollout.action_mask)
    age = step - np.asarray(sampled.rollout.version)[mask]
    assert age.min() >= 0 and age.max() <= 2
    assert len(prompts_of(sampled)) == PROMPTS and len(made.carried) <= 3 + PROMPTS
  assert made.begun > 12 * PROMPTS


def test_a_step_that_scores_nothing_new_trains_on_carried_groups(make):
  made = make(carry_over=2)
  groups = made.begin(PROMPTS, 0, 0)
  for group in groups:
    for i, completion in enumerate(group.completions):
      while not completion.done:
        completion = make.engine.extend(completion, 1.0, 0)
      group.completions[i] = completion
  for group, scores in zip(groups, made.score(groups)[0], strict=True):
    group.scores = scores
  made.carried = groups
  sampled = made.collect(1.0, 1)
  assert prompts_of(sampled) == stream(PROMPTS) and made.carried == []
  assert np.isfinite(sampled.metrics["reward/mean"]) and sampled.metrics["staleness/max"] == 1


def test_oversampling_leaves_room_for_what_is_carried_over():
  with pytest.raises(ValueError, match=r"oversampling is 4; want less than prompts \(4\)"):
    CollectorOptions(prompts=PROMPTS, oversampling=PROMPTS)
