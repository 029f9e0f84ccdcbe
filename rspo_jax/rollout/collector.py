"""What an RL step trains on: groups of completions, sampled, judged, chosen, and carried over where asked for."""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import jax
import numpy as np

from experiments.config import ExperimentConfig
from experiments.setup.build import SAMPLING, Parts
from rspo_jax import mesh
from rspo_jax.data.curriculum import Curriculum
from rspo_jax.data.examples import Example, batches
from rspo_jax.objectives import penalties
from rspo_jax.rewards.base import score_completions, why_counts
from rspo_jax.rollout.completions import Completion, begin, from_arrays, pack, to_arrays, unpack
from rspo_jax.rollout.continuous import ContinuousSampler
from rspo_jax.rollout.groups import Group, Judged
from rspo_jax.rollout.sampling import SamplingOptions
from rspo_jax.types import Params, Rollout


class Sampled(NamedTuple):
  """The rows a step trains on, and what was seen of all that were judged for it."""

  rollout: Rollout
  reward: np.ndarray  # [B] float32
  metrics: dict[str, float]
  tokens: int  # completion tokens sampled
  seconds: tuple[float, float]  # sampling, waiting for rewards


class Rollouts:
  """(params, number of the RL step) -> `Sampled`.

  P + oversampling groups are under way at once. A step ends when P of them can be trained on: under dynamic sampling
  those whose rewards differ (before the overlong penalty, which says nothing of the answer), others giving way to new
  ones until `dynamic_sampling_rounds` * P have begun. Rewards are worked out while the next rows are decoded. What is
  left at the end is thrown away, or with `carry_over` goes on in the next step; a group that would become older than
  that is waited for. Random keys follow from numbers, prompts from numbers or from the curriculum, and `state` holds
  what is carried, so a continued run draws the same.

  Attributes:
    programs: what continuous batching will compile, a line each; () without it.
  """

  def __init__(self, parts: Parts):
    config: ExperimentConfig = parts.config
    self._parts, self.rl = parts, config.rl
    self._options = parts.sampling_options(
      config.rl.samples_per_prompt, record_experts=config.router.replay == "sampler"
    )
    self._split = parts.splits["train"]
    self._walk = batches(self._split, 1, config.seed)
    self._curriculum = (
      Curriculum(self._split, seed=config.seed, **vars(config.curriculum)) if config.curriculum.on else None
    )
    self._draw, self.programs = _drawer(parts, self._options)
    self._per_round = config.rl.prompts if config.sampling.rows == 0 else 1
    self._groups: list[Group] = []
    self._next = 0

  def __call__(self, params: Params, number: int) -> Sampled:
    start = time.perf_counter()
    rl, carries = self.rl, self.rl.carry_over > 0
    if not carries:
      self._next = number * rl.dynamic_sampling_rounds * rl.prompts
    key = self._parts.key(SAMPLING) if carries else self._parts.key(SAMPLING, number * rl.dynamic_sampling_rounds)
    first_number = 0 if carries else self._next
    with ThreadPoolExecutor(1, "rewards") as thread:
      step = _Step(self, number, first_number, thread)
      old = [completion for group in self._groups for completion in group.completions]
      waiting = old + step.begin(rl.prompts + rl.oversampling - len(self._groups))
      step.keep(self._draw(params, waiting, key, version=number, after=step.after))
      step.settle()
    chosen, self._groups = step.choose()
    rows = [completion for group in chosen for completion in group.completions]
    rollout = pack(rows, self._parts.prompt_length, self._options.max_new_tokens, versions=carries)
    reward = np.concatenate([group.judged.reward for group in chosen])
    drawn = sum(int(np.sum(completion.version == number)) for completion in step.seen_completions())
    seconds = time.perf_counter() - start - step.waited, step.waited
    metrics = step.metrics(rows)
    return Sampled(mesh.put_batch(rollout, self._parts.layout), reward, metrics, drawn, seconds)

  def state(self) -> dict[str, np.ndarray]:
    """What the next step needs besides its number; `restore` takes it. Empty if nothing is."""
    curriculum = self._curriculum.state() if self._curriculum else {}
    arrays = {f"curriculum/{name}": array for name, array in curriculum.items()}
    if not self.rl.carry_over:
      return arrays
    groups = self._groups
    arrays["next"] = np.array(self._next)
    for name in ("number", "place", "started"):
      arrays[name] = np.array([getattr(group, name) for group in groups], np.int64)
    arrays["judged"] = np.array([group.judged is not None for group in groups], bool)
    judged = [group.judged for group in groups if group.judged is not None]
    for name in Judged._fields if judged else ():
      arrays[f"judged/{name}"] = np.stack([getattr(each, name) for each in judged])
    completions = to_arrays([completion for group in groups for completion in group.completions])
    return arrays | {f"completions/{name}": array for name, array in completions.items()}

  def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
    def below(prefix: str) -> dict[str, np.ndarray]:
      return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}

    if self._curriculum:
      self._curriculum.restore(below("curriculum/"))
    if not self.rl.carry_over:
      return
    samples, completions = self.rl.samples_per_prompt, from_arrays(below("completions/"))
    judged = iter(range(int(arrays["judged"].sum())))
    self._next, self._groups = int(arrays["next"]), []
    columns = (arrays[name].tolist() for name in ("number", "place", "started", "judged"))
    for i, (number, place, started, is_judged) in enumerate(zip(*columns, strict=True)):
      mine = completions[i * samples : (i + 1) * samples]
      group = Group(number, place, self._example(place), mine, started)
      if is_judged:
        row = next(judged)
        group.judged = Judged(*(arrays[f"judged/{name}"][row] for name in Judged._fields))
      self._groups.append(group)

  def begin(self, count: int, started: int, first_number: int) -> list[Group]:
    """The next `count` groups; completions are numbered from the group `first_number` on."""
    groups, samples = [], self.rl.samples_per_prompt
    places = range(self._next, self._next + count)
    if self._curriculum and count:
      places = self._curriculum.choose(count)[0].tolist()
    for place in places:
      example = self._example(place)
      tokens = np.array(self._parts.tokenizer.encode(example.prompt), np.int32)
      numbers = (self._next - first_number) * samples + np.arange(samples)
      drawn = [begin(int(i), tokens, self._options.max_new_tokens) for i in numbers]
      groups.append(Group(self._next, place, example, drawn, started))
      self._next += 1
    return groups

  def _example(self, place: int) -> Example:
    return self._split[place] if self._curriculum else self._walk.at(place)[0]

  def learn(self, groups: Sequence[Group]) -> None:
    """Tells the curriculum how often these were solved."""
    if self._curriculum:
      self._curriculum.record([group.place for group in groups], [group.judged.success.mean() for group in groups])

  def curriculum_metrics(self) -> dict[str, float]:
    return self._curriculum.metrics() if self._curriculum else {}

  def judge(self, groups: Sequence[Group]) -> tuple[list[Judged], dict[str, float]]:
    """Rewards of whole groups, in one batch, and how often each reason was given (counts)."""
    rl, parts = self.rl, self._parts
    completions = [completion for group in groups for completion in group.completions]
    examples = [group.example for group in groups for _ in group.completions]
    texts = [parts.tokenizer.decode(completion.tokens.tolist()) for completion in completions]
    lengths = np.array([len(completion.tokens) for completion in completions])
    scores = score_completions(parts.reward, texts, examples, lengths)
    reward = scores.reward
    if rl.overlong_buffer:
      limits = {"buffer": rl.overlong_buffer, "penalty": rl.overlong_penalty}
      reward = reward + np.asarray(
        penalties.overlong_penalty(lengths, max_length=self._options.max_new_tokens, **limits)
      )
    columns = (reward, scores.reward, scores.success, scores.format)
    rows = (column.reshape(len(groups), -1) for column in columns)
    why = {name: share * len(texts) for name, share in why_counts(scores).items()}
    return [Judged(*row) for row in zip(*rows, strict=True)], why


class _Step:
  """One step under way: which groups it knows, which are being judged, and when it has enough."""

  def __init__(self, rollouts: Rollouts, number: int, first_number: int, thread: ThreadPoolExecutor):
    self._rollouts, self._number, self._first_number, self._thread = rollouts, number, first_number, thread
    self._groups = list(rollouts._groups)
    self._of = {c.number: (group, i) for group in self._groups for i, c in enumerate(group.completions)}
    self._judging: list[tuple[Future, list[Group]]] = []
    self._seen: list[Group] = []  # judged in this step
    self._why: dict[str, float] = {}
    self._begun = 0
    self.waited = 0.0

  def begin(self, count: int) -> list[Completion]:
    groups = self._rollouts.begin(max(count, 0), self._number, self._first_number)
    self._begun += len(groups)
    self._groups += groups
    self._of |= {c.number: (group, i) for group in groups for i, c in enumerate(group.completions)}
    return [completion for group in groups for completion in group.completions]

  def keep(self, completions: Sequence[Completion]) -> None:
    for completion in completions:
      group, i = self._of[completion.number]
      group.completions[i] = completion

  def after(self, news: list[Completion]) -> list[Completion] | None:
    """See `ContinuousSampler.draw`. A judgement is waited for at the call after the one that asked for it."""
    self.settle()
    self.keep(news)
    asked = dict.fromkeys(self._of[completion.number][0] for completion in news)
    complete = [group for group in asked if group.through and group.judged is None]
    if complete:
      self._judging.append((self._thread.submit(self._rollouts.judge, complete), complete))
    if all(group.through for group in self._groups):
      self.settle()
    if self._enough():
      return None
    return self._replace_useless()

  def settle(self) -> None:
    """Waits for the judgements that were asked for."""
    start = time.perf_counter()
    for future, groups in self._judging:
      judged, why = future.result()
      for group, found in zip(groups, judged, strict=True):
        group.judged = found
      self._rollouts.learn(groups)
      self._seen += groups
      for name, count in why.items():
        self._why[name] = self._why.get(name, 0.0) + count
    self._judging = []
    self.waited += time.perf_counter() - start

  def _usable(self) -> list[Group]:
    """Judged and worth training on, the oldest first."""
    every = self._rollouts.rl.dynamic_sampling_rounds == 1
    found = [group for group in self._groups if group.judged is not None and (every or group.judged.useful)]
    return sorted(found, key=lambda group: group.number)

  def _enough(self) -> bool:
    rl = self._rollouts.rl
    late = [g for g in self._groups if rl.carry_over and self._number - g.started >= rl.carry_over and g.judged is None]
    return len(self._usable()) >= rl.prompts and not late

  def _replace_useless(self) -> list[Completion]:
    """New groups for those that turned out to be of no use, as long as some may begin."""
    rl = self._rollouts.rl
    allowed = rl.dynamic_sampling_rounds * rl.prompts + rl.oversampling - self._begun
    under_way = sum(group.judged is None for group in self._groups)
    missing = rl.prompts + rl.oversampling - under_way - len(self._usable())
    if min(allowed, missing) <= 0:
      return []
    # The batch-synchronous sampler draws P groups at the price of one.
    return self.begin(min(allowed, max(missing, self._rollouts._per_round)))

  def choose(self) -> tuple[list[Group], list[Group]]:
    """The P groups to train on, and those that are carried over."""
    rl, usable = self._rollouts.rl, self._usable()
    useless = [group for group in self._groups if group.judged is not None and group not in usable]
    chosen = (usable + useless)[: rl.prompts]
    left = [group for group in self._groups if group not in chosen and group not in useless]
    return sorted(chosen, key=lambda group: group.number), left if rl.carry_over else []

  def seen_completions(self) -> list[Completion]:
    return [completion for group in self._groups for completion in group.completions]

  def metrics(self, rows: Sequence[Completion]) -> dict[str, float]:
    """Of all groups judged in this step; staleness of the rows that are trained on."""
    rl = self._rollouts.rl
    judged = [group.judged for group in self._seen]
    completions = [completion for group in self._seen for completion in group.completions]
    reward, answer_reward, success, form = (np.concatenate(column) for column in zip(*judged, strict=True))
    lengths = np.array([len(completion.tokens) for completion in completions])
    spread = [group.reward.max() == group.reward.min() for group in judged]
    metrics = {
      "reward/mean": reward.mean(),
      "reward/std": reward.std(),
      "reward/success": success.mean(),
      "reward/format": form.mean(),
      "groups/zero_variance": np.mean(spread),
      "length/mean": lengths.mean(),
      "length/max": lengths.max(),
      "length/truncated": np.mean([not completion.finished for completion in completions]),
    }
    metrics |= {name: count / len(completions) for name, count in self._why.items()}
    if rl.dynamic_sampling_rounds > 1:
      metrics["groups/sampled"] = len(self._seen) / rl.prompts
    metrics |= self._rollouts.curriculum_metrics()
    if rl.overlong_buffer:
      metrics["reward/overlong"] = (reward - answer_reward).mean()
    if rl.carry_over:
      age = self._number - np.concatenate([completion.version for completion in rows])
      metrics |= {"staleness/mean": age.mean(), "staleness/max": age.max()}
      metrics["groups/carried"] = sum(group.started < self._number for group in self._groups) / len(self._groups)
    return metrics


def _drawer(parts: Parts, options: SamplingOptions) -> tuple[Callable[..., list[Completion]], tuple[str, ...]]:
  """What `ContinuousSampler.draw` is, or the same with the batch-synchronous sampler; and the programs it lists."""
  config: ExperimentConfig = parts.config
  if not config.sampling.rows:
    return functools.partial(_draw_in_batches, parts, options), ()
  sampler = ContinuousSampler(
    parts.policy,
    options,
    rows=config.sampling.rows,
    prompt_length=parts.prompt_length,
    continues=config.rl.carry_over > 0,
    layout=parts.layout,
  )
  return sampler.draw, sampler.programs


def _draw_in_batches(
  parts: Parts,
  options: SamplingOptions,
  params: Params,
  waiting: Sequence[Completion],
  key: jax.Array,
  *,
  version: int,
  after: Callable[[list[Completion]], Sequence[Completion] | None],
) -> list[Completion]:
  """Whole batches of config.rl.prompts prompts, one after the other; numbers rise by one within a batch."""
  samples, prompts = options.samples_per_prompt, parts.config.rl.prompts
  run = parts.sampler(options, parts.prompt_length)
  done: list[Completion] = []
  while waiting:
    heads = [waiting[min(i * samples, len(waiting) - 1)] for i in range(prompts)]  # the last one fills the batch
    tokens = np.zeros((prompts, parts.prompt_length), np.int32)
    valid = np.zeros(tokens.shape, bool)
    for row, head in enumerate(heads):
      tokens[row, -len(head.prompt) :], valid[row, -len(head.prompt) :] = head.prompt, True
    rollout = mesh.fetch(run(params, tokens, valid, key, first_row=waiting[0].number))
    news = unpack(rollout, waiting, version)
    done += news
    more = after(news)
    if more is None:
      break
    waiting = more
  return done
