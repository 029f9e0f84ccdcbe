"""What an RL step trains on: groups of completions that are sampled, scored, chosen, and carried over on request."""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import jax
import numpy as np

from rspo_jax import mesh
from rspo_jax.data.curriculum import Curriculum, CurriculumOptions
from rspo_jax.data.examples import Example, Split, batches
from rspo_jax.rewards.base import Reward
from rspo_jax.rollout.completions import Completion, from_arrays, new_completion, to_arrays, to_rollout
from rspo_jax.rollout.groups import Group, GroupScores, score_groups
from rspo_jax.rollout.samplers import Sampler
from rspo_jax.tokenization.basic import Tokenizer
from rspo_jax.types import Layout, Params, Rollout


@dataclasses.dataclass(frozen=True)
class CollectorOptions:
  """Which groups an RL step samples and trains on.

  Attributes:
    prompts: P, groups that an RL step trains on.
    dynamic_sampling_rounds: rounds of P prompts sampled at most until P groups have rewards that differ (DAPO, arXiv
      2503.14476); 1 is no dynamic sampling.
    oversampling: prompts sampled beside the P; the step ends when P groups are done.
    carry_over: greatest age, in RL steps, of tokens in a later update: groups that are left at the end of a step
      continue in the next one. 0 discards them.
    overlong_buffer: tokens before the length limit over which a completion's reward falls by up to overlong_penalty
      (DAPO); 0 is off.
  """

  prompts: int = 32
  dynamic_sampling_rounds: int = 1
  oversampling: int = 0
  carry_over: int = 0
  overlong_buffer: int = 0
  overlong_penalty: float = 1.0

  def __post_init__(self):
    for name, least in (
      ("prompts", 1),
      ("dynamic_sampling_rounds", 1),
      ("oversampling", 0),
      ("carry_over", 0),
      ("overlong_buffer", 0),
    ):
      if getattr(self, name) < least:
        raise ValueError(f"{name} is {getattr(self, name)}; want {least} or more.")
    if self.oversampling >= self.prompts:
      raise ValueError(
        f"oversampling is {self.oversampling}; want less than prompts ({self.prompts}), so that groups carried over "
        "can be trained on in the next step."
      )


class Collected(NamedTuple):
  """The rows an RL step trains on, and statistics of all groups that were scored for it.

  Attributes:
    rollout: B = P * G rows, prompt-major, on the mesh. reward: [B] float32, on the host.
    metrics: of all groups scored in the step, by names of `rspo_jax.run.metrics.METRICS`.
  """

  rollout: Rollout
  reward: np.ndarray
  metrics: dict[str, float]


class Collector:
  """Collects the groups of RL steps.

  P + oversampling groups are in flight together. A step ends when P of them can be trained on: under dynamic sampling
  those whose rewards differ (before the overlong penalty, which says nothing about the answer); others are replaced by
  new ones until `dynamic_sampling_rounds` * P have begun. Groups are scored on a thread while further rows are decoded.
  What is left at the end is discarded, or with `carry_over` continues in the next step; the step waits for a group that
  would become older than that. Random keys follow from numbers, prompts from numbers or from the curriculum, and
  `state` holds what is carried over, so a resumed run samples the same.

  Args:
    sampler: `rspo_jax.rollout.samplers.make_sampler`'s, or any other `Sampler`.
    split: the training examples. reward: scores completions. tokenizer: for prompts and completions.
    prompt_length: Tp, slots of a prompt, tokens.
    key: of all random draws of completions. seed: of the order of the examples.
    curriculum: samples problems by their success rate; None takes them in the order of the index stream.
    layout: the mesh that the rollout is put on.
  """

  def __init__(
    self,
    sampler: Sampler,
    split: Split,
    reward: Reward,
    tokenizer: Tokenizer,
    options: CollectorOptions,
    *,
    prompt_length: int,
    key: jax.Array,
    seed: int,
    layout: Layout,
    curriculum: CurriculumOptions | None = None,
  ):
    self.sampler, self.options = sampler, options
    self._split, self._reward, self._tokenizer = split, reward, tokenizer
    self._prompt_length, self._key, self._layout = prompt_length, key, layout
    self._index_stream = batches(split, 1, seed)
    self._curriculum = None if curriculum is None else Curriculum(split, curriculum, seed=seed)
    self.carried: list[Group] = []
    self.begun = 0  # groups begun; the next group has this number

  def collect(self, params: Params, step: int) -> Collected:
    """The groups of an RL step.

    Args:
      params: of the policy that samples. step: number of the RL step, from 0; also the version of params.
    """
    start, options = time.perf_counter(), self.options
    carries = options.carry_over > 0
    first_step_number = step * options.dynamic_sampling_rounds
    if not carries:
      self.begun = first_step_number * options.prompts
    # Without carry-over, keys and numbers start again in every step.
    key = jax.random.fold_in(self._key, 0 if carries else first_step_number)
    with ThreadPoolExecutor(1, "rewards") as thread:
      work = _Step(self, step, 0 if carries else self.begun, thread)
      partial = [completion for group in self.carried for completion in group.completions]
      queue = partial + work.begin(options.prompts + options.oversampling - len(self.carried))
      work.keep(self.sampler.draw(params, queue, key, version=step, on_finished=work.on_finished))
      work.wait_for_scores()
    chosen, self.carried = work.choose()
    rows = [completion for group in chosen for completion in group.completions]
    rollout = to_rollout(rows, self._prompt_length, self.sampler.options.max_new_tokens, versions=carries)
    sampled_tokens = work.sampled_tokens()
    seconds = time.perf_counter() - start - work.waited
    return Collected(
      mesh.put_batch(rollout, self._layout),
      np.concatenate([group.scores.reward for group in chosen]),
      work.metrics(chosen)
      | {
        "speed/sample_tokens_per_second": sampled_tokens / seconds,
        "seconds/sample": seconds,
        "seconds/reward": work.waited,
      },
    )

  def begin(self, count: int, step: int, first_number: int) -> list[Group]:
    """The next `count` groups; their completions are numbered from those of group `first_number` on."""
    groups, samples = [], self.sampler.options.samples_per_prompt
    indices = range(self.begun, self.begun + count)
    if self._curriculum and count:
      indices = self._curriculum.choose(count)[0].tolist()
    for index in indices:
      example = self._example(index)
      prompt = np.array(self._tokenizer.encode(example.prompt), np.int32)
      first = (self.begun - first_number) * samples
      completions = [new_completion(first + i, prompt, self.sampler.options.max_new_tokens) for i in range(samples)]
      groups.append(Group(self.begun, index, example, completions, step))
      self.begun += 1
    return groups

  def _example(self, index: int) -> Example:
    return self._split[index] if self._curriculum else self._index_stream.at(index)[0]

  def score(self, groups: Sequence[Group]) -> tuple[list[GroupScores], dict[str, float]]:
    """`score_groups` with this collector's reward, tokenizer and limits."""
    return score_groups(
      groups,
      self._reward,
      self._tokenizer.decode,
      max_length=self.sampler.options.max_new_tokens,
      overlong_buffer=self.options.overlong_buffer,
      overlong_penalty_max=self.options.overlong_penalty,
    )

  def record_success(self, groups: Sequence[Group]) -> None:
    """Tells the curriculum the success rates of scored groups."""
    if self._curriculum:
      self._curriculum.record([group.index for group in groups], [group.scores.success.mean() for group in groups])

  def curriculum_metrics(self) -> dict[str, float]:
    return self._curriculum.metrics() if self._curriculum else {}

  def state(self) -> dict[str, np.ndarray]:
    """What the next step needs besides its number, for a checkpoint and `restore`. Empty if nothing is carried over."""
    curriculum = self._curriculum.state() if self._curriculum else {}
    arrays = {f"curriculum/{name}": array for name, array in curriculum.items()}
    if not self.options.carry_over:
      return arrays
    groups = self.carried
    arrays["begun"] = np.array(self.begun)
    for name in ("number", "index", "started"):
      arrays[name] = np.array([getattr(group, name) for group in groups], np.int64)
    arrays["scored"] = np.array([group.scores is not None for group in groups], bool)
    scores = [group.scores for group in groups if group.scores is not None]
    for name in GroupScores._fields if scores else ():
      arrays[f"scores/{name}"] = np.stack([getattr(each, name) for each in scores])
    completions = to_arrays([completion for group in groups for completion in group.completions])
    return arrays | {f"completions/{name}": array for name, array in completions.items()}

  def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
    """Continues where `state` was taken."""

    def below(prefix: str) -> dict[str, np.ndarray]:
      return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}

    if self._curriculum:
      self._curriculum.restore(below("curriculum/"))
    if not self.options.carry_over:
      return
    samples, completions = self.sampler.options.samples_per_prompt, from_arrays(below("completions/"))
    scored_rows = iter(range(int(arrays["scored"].sum())))
    self.begun, self.carried = int(arrays["begun"]), []
    columns = (arrays[name].tolist() for name in ("number", "index", "started", "scored"))
    for i, (number, index, started, is_scored) in enumerate(zip(*columns, strict=True)):
      group = Group(number, index, self._example(index), completions[i * samples : (i + 1) * samples], started)
      if is_scored:
        row = next(scored_rows)
        group.scores = GroupScores(*(arrays[f"scores/{name}"][row] for name in GroupScores._fields))
      self.carried.append(group)


class _Step:
  """One `collect` in progress: the groups in flight, those being scored, and whether there are enough."""

  def __init__(self, collector: Collector, step: int, first_number: int, thread: ThreadPoolExecutor):
    self._collector, self._step, self._first_number, self._thread = collector, step, first_number, thread
    self._options = collector.options
    self._groups = list(collector.carried)
    self._owner = {c.number: (group, i) for group in self._groups for i, c in enumerate(group.completions)}
    self._scoring: list[tuple[Future, list[Group]]] = []
    self._scored: list[Group] = []  # in this step
    self._reasons: dict[str, float] = {}
    self._begun = 0
    self.waited = 0.0  # seconds, for rewards

  def begin(self, count: int) -> list[Completion]:
    groups = self._collector.begin(max(count, 0), self._step, self._first_number)
    self._begun += len(groups)
    self._groups += groups
    self._owner |= {c.number: (group, i) for group in groups for i, c in enumerate(group.completions)}
    return [completion for group in groups for completion in group.completions]

  def keep(self, completions: Sequence[Completion]) -> None:
    for completion in completions:
      group, i = self._owner[completion.number]
      group.completions[i] = completion

  def on_finished(self, finished: list[Completion]) -> list[Completion] | None:
    """For `Sampler.draw`. Scores requested in one call are waited for in the next one: a fixed point, not the clock."""
    self.wait_for_scores()
    self.keep(finished)
    touched = dict.fromkeys(self._owner[completion.number][0] for completion in finished)
    complete = [group for group in touched if group.done and group.scores is None]
    if complete:
      self._scoring.append((self._thread.submit(self._collector.score, complete), complete))
    if all(group.done for group in self._groups):
      self.wait_for_scores()
    if self._enough():
      return None
    return self._replace_without_signal()

  def wait_for_scores(self) -> None:
    start = time.perf_counter()
    for future, groups in self._scoring:
      scores, reasons = future.result()
      for group, of_group in zip(groups, scores, strict=True):
        group.scores = of_group
      self._collector.record_success(groups)
      self._scored += groups
      for name, count in reasons.items():
        self._reasons[name] = self._reasons.get(name, 0.0) + count
    self._scoring = []
    self.waited += time.perf_counter() - start

  def _usable(self) -> list[Group]:
    """Scored and worth training on, the oldest first."""
    any_group = self._options.dynamic_sampling_rounds == 1
    usable = [g for g in self._groups if g.scores is not None and (any_group or g.scores.has_signal)]
    return sorted(usable, key=lambda group: group.number)

  def _enough(self) -> bool:
    oldest = self._options.carry_over
    overdue = [g for g in self._groups if oldest and self._step - g.started >= oldest and g.scores is None]
    return len(self._usable()) >= self._options.prompts and not overdue

  def _replace_without_signal(self) -> list[Completion]:
    """New groups for those without signal, as long as more may begin."""
    options = self._options
    allowed = options.dynamic_sampling_rounds * options.prompts + options.oversampling - self._begun
    in_flight = sum(group.scores is None for group in self._groups)
    missing = options.prompts + options.oversampling - in_flight - len(self._usable())
    if min(allowed, missing) <= 0:
      return []
    return self.begin(min(allowed, max(missing, self._collector.sampler.prompts_per_call)))

  def choose(self) -> tuple[list[Group], list[Group]]:
    """The P groups to train on, and those that are carried over."""
    options, usable = self._options, self._usable()
    without_signal = [group for group in self._groups if group.scores is not None and group not in usable]
    chosen = (usable + without_signal)[: options.prompts]
    left = [group for group in self._groups if group not in chosen and group not in without_signal]
    return sorted(chosen, key=lambda group: group.number), left if options.carry_over else []

  def sampled_tokens(self) -> int:
    """Completion tokens sampled in this step."""
    completions = (completion for group in self._groups for completion in group.completions)
    return sum(int(np.sum(completion.version == self._step)) for completion in completions)

  def metrics(self, chosen: Sequence[Group]) -> dict[str, float]:
    """Of all groups scored in this step, or, if all were carried over with their scores, of the chosen ones.

    Staleness is that of the rows that are trained on.
    """
    options, groups = self._options, self._scored or chosen
    scores = [group.scores for group in groups]
    completions = [completion for group in groups for completion in group.completions]
    reward, answer_reward, success, form = (np.concatenate(column) for column in zip(*scores, strict=True))
    lengths = np.array([len(completion.tokens) for completion in completions])
    metrics = {
      "reward/mean": reward.mean(),
      "reward/std": reward.std(),
      "reward/success": success.mean(),
      "reward/format": form.mean(),
      "groups/zero_variance": np.mean([each.reward.max() == each.reward.min() for each in scores]),
      "length/mean": lengths.mean(),
      "length/max": lengths.max(),
      "length/truncated": np.mean([not completion.finished for completion in completions]),
    }
    metrics |= {name: count / len(completions) for name, count in self._reasons.items()}
    if options.dynamic_sampling_rounds > 1:
      metrics["groups/sampled"] = len(self._scored) / options.prompts
    metrics |= self._collector.curriculum_metrics()
    if options.overlong_buffer:
      metrics["reward/overlong"] = (reward - answer_reward).mean()
    if options.carry_over:
      age = self._step - np.concatenate([c.version for group in chosen for c in group.completions])
      metrics |= {"staleness/mean": age.mean(), "staleness/max": age.max()}
      metrics["groups/carried"] = sum(group.started < self._step for group in self._groups) / len(self._groups)
    return metrics
