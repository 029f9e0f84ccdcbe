"""The benchmarks of a config and their evaluation, during training and in `experiments.evaluate`."""

import dataclasses
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from experiments.config import BenchmarkConfig, EvaluationConfig, Named
from experiments.setup.build import EVALUATION, Components, longest_prompt
from experiments.setup.data import read_data
from rspo_jax.data.examples import Example, Split
from rspo_jax.evaluation.completion_log import Completions, complete_in_batches, join
from rspo_jax.rewards.base import Reward
from rspo_jax.rewards.table import make_reward
from rspo_jax.rollout.completions import new_completions
from rspo_jax.rollout.samplers import Sampler
from rspo_jax.rollout.token_sampling import SamplingOptions
from rspo_jax.types import Array, Params, Program

GREEDY = {"temperature": 0.0, "top_k": 0, "top_p": 1.0}
INHERITED = ("data_dir", "chat", "system")  # fields of `config.data` that a benchmark's data uses if they are not set


class Benchmark(NamedTuple):
  """Held-out problems, and how they are completed.

  Attributes:
    group: name of the group that the benchmark is averaged in.
    examples: the problems to complete. available: number of problems in the split.
    reward: scores completions.
    settings: `config.evaluation`, with the benchmark's own settings.
    options: mode -> sampling options; the modes are "sampled" and, if the settings say so, "greedy".
    prompt_length: slots of a prompt, tokens.
    batch_problems: problems per call of the sampler, not above the number of problems rounded up to the batch shards.
    key: of the sampling; completion i of the benchmark uses its i-th fold.
  """

  name: str
  group: str
  examples: Sequence[Example]
  available: int
  reward: Reward
  settings: EvaluationConfig
  options: dict[str, SamplingOptions]
  prompt_length: int
  batch_problems: int
  key: Array

  @property
  def named(self) -> bool:
    """Whether it is one of `config.evaluation.benchmarks`, not the test split of `config.data`."""
    return self.name in self.settings.benchmarks


def make_benchmarks(components: Components) -> tuple[Benchmark, ...]:
  """The benchmarks of `config.evaluation.benchmarks`; without any, the test split of `config.data`.

  Prompts of a named benchmark are padded to a power of two, so that benchmarks can share programs. Equal rewards are
  created once, because a reward may have processes of its own.

  Raises:
    ValueError: the data or the reward of a benchmark cannot be used; names the benchmark.
  """
  config, key = components.config, components.key(EVALUATION)
  if not config.evaluation.benchmarks:
    length = components.prompt_length
    whole = BenchmarkConfig(config.data, config.reward)
    return (_benchmark(components, config.data.name, whole, components.splits, components.reward, key, length),)
  rewards = {_reward_id(config.reward): components.reward} if components.reward else {}
  benchmarks = []
  for name, spec in config.evaluation.benchmarks.items():
    inherited = {field: getattr(spec.data, field) or getattr(config.data, field) for field in INHERITED}
    try:
      splits = read_data(dataclasses.replace(spec.data, **inherited), components.tokenizer)
      reward_id = _reward_id(spec.reward)
      if reward_id not in rewards:
        rewards[reward_id] = make_reward(spec.reward.name, **spec.reward.options)
    except (ValueError, TypeError, OSError) as error:
      raise ValueError(f"config.evaluation.benchmarks.{name} cannot be created: {error}") from error
    own_key = jax.random.fold_in(key, zlib.crc32(name.encode()))
    benchmarks.append(_benchmark(components, name, spec, splits, rewards[reward_id], own_key))
  return tuple(benchmarks)


def _benchmark(
  components: Components,
  name: str,
  spec: BenchmarkConfig,
  splits: Mapping[str, Split],
  reward: Reward,
  key: Array,
  prompt_length: int | None = None,
) -> Benchmark:
  if "test" not in splits:
    raise ValueError(f"the data of benchmark {name} has no test split, only {', '.join(splits)}; give it one.")
  settings, available = components.config.evaluation.of(spec), splits["test"].examples
  examples = available[: settings.problems or None]
  sampled = components.sampling_options(samples_per_prompt=settings.samples, **_sampling_changes(settings))
  options = {"sampled": sampled}
  if settings.greedy:
    options["greedy"] = dataclasses.replace(sampled, samples_per_prompt=1, **GREEDY)
  if prompt_length is None:
    prompt_length = 1 << (longest_prompt(examples, components.tokenizer) - 1).bit_length()
  shards = components.layout.batch_shards
  return Benchmark(
    name,
    spec.group,
    examples,
    len(available),
    reward,
    settings,
    options,
    prompt_length,
    min(settings.batch_problems, -(-len(examples) // shards) * shards),
    key,
  )


def sampler_of(components: Components, benchmark: Benchmark, mode: str) -> Sampler:
  """The sampler of a benchmark; benchmarks with the same options and sizes share it."""
  return components.sampler(benchmark.options[mode], benchmark.batch_problems, benchmark.prompt_length)


def run(
  components: Components, params: Params, benchmark: Benchmark, mode: str, first: int = 0
) -> Iterator[Completions]:
  """Yields batches of completions with their rewards, on the host.

  Args:
    mode: a key of `benchmark.options`.
    first: number of problems to skip, because they are done; a multiple of `benchmark.batch_problems`.
  """
  options, tokenizer = benchmark.options[mode], components.tokenizer
  sampler = sampler_of(components, benchmark, mode)

  def generate(batch: Sequence[Example], start: int):
    prompts = [np.array(tokenizer.encode(example.prompt), np.int32) for example in batch]
    samples = options.samples_per_prompt
    queue = new_completions(prompts, samples, first=start * samples, limits=options.max_new_tokens)
    completions = sampler.draw(params, queue, benchmark.key)
    texts = [tokenizer.decode(completion.tokens.tolist()) for completion in completions]
    lengths = np.array([len(completion.tokens) for completion in completions])
    return texts, lengths, np.array([completion.finished for completion in completions], bool)

  return complete_in_batches(
    generate,
    benchmark.reward,
    benchmark.examples,
    samples=options.samples_per_prompt,
    batch_problems=benchmark.batch_problems,
    first=first,
  )


def evaluate(
  components: Components, params: Params, benchmarks: Sequence[Benchmark]
) -> tuple[dict[str, float], list[Completions]]:
  """An evaluation during training.

  Returns:
    Metrics, and the sampled completions of every benchmark. "eval/success", "eval/greedy_success" and "eval/format" are
    unweighted means over the benchmarks; named benchmarks also have "eval/<name>/avg" and "eval/<name>/greedy".
  """
  means: dict[str, list[float]] = {}
  metrics, sampled = {}, []
  for benchmark in benchmarks:
    by_mode = {mode: join(run(components, params, benchmark, mode)) for mode in benchmark.options}
    sampled.append(by_mode["sampled"])
    means.setdefault("eval/success", []).append(by_mode["sampled"].success)
    means.setdefault("eval/format", []).append(float(by_mode["sampled"].scores.format.mean()))
    if "greedy" in by_mode:
      means.setdefault("eval/greedy_success", []).append(by_mode["greedy"].success)
    if benchmark.named:
      suffix = {"sampled": "avg", "greedy": "greedy"}
      metrics |= {f"eval/{benchmark.name}/{suffix[mode]}": each.success for mode, each in by_mode.items()}
  return {name: sum(values) / len(values) for name, values in means.items()} | metrics, sampled


def programs(components: Components, benchmarks: Sequence[Benchmark]) -> list[tuple[Program, list[str]]]:
  """The programs that an evaluation compiles, each once, with the names of the benchmarks that use it."""
  users: dict[str, tuple[Program, list[str]]] = {}
  for benchmark in benchmarks:
    for mode in benchmark.options:
      for program in sampler_of(components, benchmark, mode).programs:
        users.setdefault(program.name, (program, []))[1].append(benchmark.name)
  return list(users.values())


def _sampling_changes(settings: EvaluationConfig) -> dict[str, float]:
  """The fields of `SamplingOptions` that the settings override."""
  fields = {name: getattr(settings, name) for name in ("temperature", "top_k", "top_p", "max_new_tokens")}
  return {name: value for name, value in fields.items() if value is not None}


def _reward_id(reward: Named) -> str:
  return json.dumps([reward.name, dict(reward.options)], sort_keys=True, default=list)
