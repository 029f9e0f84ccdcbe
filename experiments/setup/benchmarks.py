"""The benchmarks of a config, and their completions under a policy: in training as in `experiments.evaluate`."""

import dataclasses
import json
import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax

from experiments.config import EvaluationConfig, RewardConfig
from experiments.setup.build import EVALUATION, Components, longest_prompt
from experiments.setup.data import read_data
from rspo_jax import mesh
from rspo_jax.data.examples import Example
from rspo_jax.evaluation.completion_log import Completions, complete_in_batches, join
from rspo_jax.rewards.table import Reward, make_reward
from rspo_jax.rollout.sampling import SamplingOptions
from rspo_jax.types import Array, Params

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


def make_benchmarks(parts: Components) -> tuple[Benchmark, ...]:
  """Reads `config.evaluation.benchmarks`; without any, takes the test split of `config.data`.

  Prompts of a named benchmark are padded to a power of two, so that benchmarks share programs.

  Raises:
    ValueError: a benchmark without problems or whose data cannot be read; names it.
  """
  config = parts.config
  rewards = {_key_of(config.reward): parts.reward} if parts.reward else {}

  def reward_of(wanted: RewardConfig) -> Reward:
    """One for equal settings: a reward may have processes of its own."""
    if _key_of(wanted) not in rewards:
      rewards[_key_of(wanted)] = make_reward(wanted.name, **wanted.options)
    return rewards[_key_of(wanted)]

  def make(name, group, splits, reward, settings, prompt_length, key) -> Benchmark:
    if "test" not in splits:
      raise ValueError(f"the data of benchmark {name} has no test split, only {', '.join(splits)}; give it one.")
    available = splits["test"].examples
    examples = available[: settings.problems or None]
    shards = parts.layout.batch_shards
    options = {"sampled": parts.sampling_options(settings.samples, **_changed(settings))}
    if settings.greedy:
      options["greedy"] = parts.sampling_options(1, **_changed(settings) | GREEDY)
    batch_problems = min(settings.batch_problems, -(-len(examples) // shards) * shards)
    length = prompt_length or 1 << (longest_prompt(examples, parts.tokenizer) - 1).bit_length()
    return Benchmark(name, group, examples, len(available), reward, settings, options, length, batch_problems, key)

  key = parts.key(EVALUATION)
  if not config.evaluation.benchmarks:
    return (make(config.data.name, "average", parts.splits, parts.reward, config.evaluation, parts.prompt_length, key),)
  made = []
  for name, wanted in config.evaluation.benchmarks.items():
    inherited = {key: getattr(wanted.data, key) or getattr(config.data, key) for key in ("data_dir", "chat", "system")}
    data = dataclasses.replace(wanted.data, **inherited)
    try:
      splits, reward = read_data(data, parts.tokenizer), reward_of(wanted.reward)
    except (ValueError, TypeError, OSError) as error:
      raise ValueError(f"config.evaluation.benchmarks.{name} cannot be made: {error}") from error
    own_key = jax.random.fold_in(key, zlib.crc32(name.encode()))
    made.append(make(name, wanted.group, splits, reward, config.evaluation.of(wanted), 0, own_key))
  return tuple(made)


def run(parts: Components, params: Params, benchmark: Benchmark, mode: str, first: int = 0) -> Iterator[Completions]:
  """Batches of completions, judged.

  Args:
    mode: "sampled" or "greedy". first: problems that are done already.
  """
  options = benchmark.options[mode]

  def generate(batch: Sequence[Example], start: int):
    rollout, texts, tokens = parts.generate(
      params, options, benchmark.key, batch, start, length=benchmark.prompt_length
    )
    return texts, tokens, mesh.fetch(rollout.finished)

  return complete_in_batches(
    generate,
    benchmark.reward,
    benchmark.examples,
    samples=options.samples_per_prompt,
    batch_problems=benchmark.batch_problems,
    first=first,
  )


def evaluate(
  parts: Components, params: Params, benchmarks: Sequence[Benchmark]
) -> tuple[dict[str, float], list[Completions]]:
  """The metrics of an evaluation during training, and the sampled completions of every benchmark.

  "eval/success", "eval/greedy_success" and "eval/format" are unweighted means over the benchmarks; named benchmarks
  have "eval/<name>/avg" and "eval/<name>/greedy" as well.
  """
  found: dict[str, list[float]] = {}
  metrics, sampled = {}, []
  for benchmark in benchmarks:
    by_mode = {mode: join(run(parts, params, benchmark, mode)) for mode in benchmark.options}
    sampled.append(by_mode["sampled"])
    found.setdefault("eval/success", []).append(by_mode["sampled"].success)
    found.setdefault("eval/format", []).append(float(by_mode["sampled"].scores.format.mean()))
    if "greedy" in by_mode:
      found.setdefault("eval/greedy_success", []).append(by_mode["greedy"].success)
    if benchmark.named:
      named = {"sampled": "avg", "greedy": "greedy"}
      metrics |= {f"eval/{benchmark.name}/{named[mode]}": of_mode.success for mode, of_mode in by_mode.items()}
  return {name: sum(values) / len(values) for name, values in found.items()} | metrics, sampled


def programs(benchmarks: Sequence[Benchmark]) -> list[str]:
  """What will be compiled, a line each, with who uses it. One sampler for each different line."""
  users: dict[str, list[str]] = {}
  for benchmark in benchmarks:
    for options in benchmark.options.values():
      drawn = f"T = {options.temperature:g}" if options.temperature else "greedy"
      line = (
        f"{benchmark.batch_problems} prompts of up to {benchmark.prompt_length} tokens, {options.samples_per_prompt} "
        f"of up to {options.max_new_tokens} tokens each, {drawn}"
      )
      users.setdefault(line, []).append(benchmark.name)
  return [f"{line}: {', '.join(names)}" for line, names in users.items()]


def _changed(settings: EvaluationConfig) -> dict[str, float]:
  wanted = {name: getattr(settings, name) for name in ("temperature", "top_k", "top_p", "max_new_tokens")}
  return {name: value for name, value in wanted.items() if value is not None}


def _key_of(reward: RewardConfig) -> str:
  return json.dumps([reward.name, dict(reward.options)], sort_keys=True, default=list)
