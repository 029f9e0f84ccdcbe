"""Benchmarks of a config, and their completions under a policy: in training and in `experiments.evaluate`."""

import dataclasses
import json
import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from experiments.config import EvaluationConfig, Named
from experiments.setup.build import EVALUATION, Components, longest_prompt
from experiments.setup.data import read_data
from rspo_jax.data.examples import Example
from rspo_jax.evaluation.completion_log import Completions, complete_in_batches, join
from rspo_jax.rewards.base import Reward
from rspo_jax.rewards.table import make_reward
from rspo_jax.rollout.completions import new_completions
from rspo_jax.rollout.samplers import Sampler
from rspo_jax.rollout.token_sampling import SamplingOptions
from rspo_jax.types import Array, Params, Program

GREEDY = {"temperature": 0.0, "top_k": 0, "top_p": 1.0}


class Benchmark(NamedTuple):
  """Held-out problems, and how they are completed.

  Attributes:
    group: benchmarks of a group are averaged.
    available: problems in its split. settings: with the benchmark's own put in.
    options: by mode, "sampled" and perhaps "greedy".
    prompt_length: slots of a prompt, tokens. batch_problems: per sampler call, no more than there are.
    key: of its draws; row r of the benchmark draws with its r-th fold.
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
    """Of `config.evaluation.benchmarks`, and not the held-out split of `config.data`."""
    return self.name in self.settings.benchmarks


def make_benchmarks(components: Components) -> tuple[Benchmark, ...]:
  """Reads `config.evaluation.benchmarks`; without any, takes the test split of `config.data`.

  Prompts of a named benchmark are padded to a power of two, so that benchmarks share programs.

  Raises:
    ValueError: a benchmark without problems or whose data cannot be read; names it.
  """
  config = components.config
  rewards = {_key_of(config.reward): components.reward} if components.reward else {}

  def reward_of(spec: Named) -> Reward:
    """One reward for equal settings: a reward may have processes of its own."""
    if _key_of(spec) not in rewards:
      rewards[_key_of(spec)] = make_reward(spec.name, **spec.options)
    return rewards[_key_of(spec)]

  def make(name, group, splits, reward, settings, prompt_length, key) -> Benchmark:
    if "test" not in splits:
      raise ValueError(f"the data of benchmark {name} has no test split, only {', '.join(splits)}; give it one.")
    available = splits["test"].examples
    examples = available[: settings.problems or None]
    shards = components.layout.batch_shards
    sampled = components.sampling_options(samples_per_prompt=settings.samples, **_changed(settings))
    options = {"sampled": sampled}
    if settings.greedy:
      options["greedy"] = dataclasses.replace(sampled, samples_per_prompt=1, **GREEDY)
    batch_problems = min(settings.batch_problems, -(-len(examples) // shards) * shards)
    length = prompt_length or 1 << (longest_prompt(examples, components.tokenizer) - 1).bit_length()
    return Benchmark(name, group, examples, len(available), reward, settings, options, length, batch_problems, key)

  key = components.key(EVALUATION)
  if not config.evaluation.benchmarks:
    splits, reward, length = components.splits, components.reward, components.prompt_length
    return (make(config.data.name, "average", splits, reward, config.evaluation, length, key),)
  benchmarks = []
  for name, spec in config.evaluation.benchmarks.items():
    inherited = {key: getattr(spec.data, key) or getattr(config.data, key) for key in ("data_dir", "chat", "system")}
    data = dataclasses.replace(spec.data, **inherited)
    try:
      splits, reward = read_data(data, components.tokenizer), reward_of(spec.reward)
    except (ValueError, TypeError, OSError) as error:
      raise ValueError(f"config.evaluation.benchmarks.{name} cannot be made: {error}") from error
    own_key = jax.random.fold_in(key, zlib.crc32(name.encode()))
    benchmarks.append(make(name, spec.group, splits, reward, config.evaluation.of(spec), 0, own_key))
  return tuple(benchmarks)


def sampler_of(components: Components, benchmark: Benchmark, mode: str) -> Sampler:
  """What completes a benchmark; shared by benchmarks with the same options and sizes."""
  return components.sampler(benchmark.options[mode], benchmark.batch_problems, benchmark.prompt_length)


def run(
  components: Components, params: Params, benchmark: Benchmark, mode: str, first: int = 0
) -> Iterator[Completions]:
  """Batches of completions with their rewards.

  Args:
    mode: "sampled" or "greedy". first: problems that are done already.
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
  """The metrics of an evaluation during training, and the sampled completions of every benchmark.

  "eval/success", "eval/greedy_success" and "eval/format" are unweighted means over the benchmarks; named benchmarks
  have "eval/<name>/avg" and "eval/<name>/greedy" as well.
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
      metrics |= {f"eval/{benchmark.name}/{suffix[mode]}": of_mode.success for mode, of_mode in by_mode.items()}
  return {name: sum(values) / len(values) for name, values in means.items()} | metrics, sampled


def programs(components: Components, benchmarks: Sequence[Benchmark]) -> list[tuple[Program, list[str]]]:
  """What an evaluation compiles, each program once, with the benchmarks that use it."""
  users: dict[str, tuple[Program, list[str]]] = {}
  for benchmark in benchmarks:
    for mode in benchmark.options:
      for program in sampler_of(components, benchmark, mode).programs:
        users.setdefault(program.name, (program, []))[1].append(benchmark.name)
  return list(users.values())


def _changed(settings: EvaluationConfig) -> dict[str, float]:
  own = {name: getattr(settings, name) for name in ("temperature", "top_k", "top_p", "max_new_tokens")}
  return {name: value for name, value in own.items() if value is not None}


def _key_of(reward: Named) -> str:
  return json.dumps([reward.name, dict(reward.options)], sort_keys=True, default=list)
