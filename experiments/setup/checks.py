"""Checks across the groups of a config. The range of a single field is checked by its own dataclass."""

import re

from experiments.config import EvaluationConfig, ExperimentConfig
from rspo_jax.data.datasets import DATASETS
from rspo_jax.lookup import look_up
from rspo_jax.objectives.table import check_recipe, make_objective
from rspo_jax.rewards.table import check_reward, reward_names


def check_config(config: ExperimentConfig) -> None:
  """Checks names that the config refers to, and that its groups do not contradict each other.

  Raises:
    ValueError: names the key and the cure.
  """
  look_up("config.data.name", config.data.name, DATASETS)
  check_reward(config.reward.name, config.reward.options, "config.reward")
  _check_objective(config)
  look_up("config.policy.name", config.policy.name, {"transformer": None})
  if config.policy.name == "transformer" and config.model is None:
    raise ValueError("config.model is None; describe the model there, or name a policy of your own in config.policy.")
  if config.steps and config.sampling.samples_per_prompt < 2:
    raise ValueError(
      f"config.sampling.samples_per_prompt is {config.sampling.samples_per_prompt}; want 2 or more for RL, whose "
      "advantages compare the samples of a prompt. Set config.steps=0 to run without RL."
    )
  if config.collector.overlong_buffer and "length" in reward_names(config.reward.name, config.reward.options):
    raise ValueError(
      f"config.collector.overlong_buffer is {config.collector.overlong_buffer} and config.reward contains the "
      "length reward: long completions would be penalised twice. Set config.collector.overlong_buffer=0, or leave the "
      "length reward out."
    )
  if config.collector.prompts % (config.rl.minibatches * config.loss.microbatches):
    raise ValueError(
      f"config.collector.prompts is {config.collector.prompts}, which does not divide into {config.rl.minibatches} "
      f"minibatches of {config.loss.microbatches} microbatches; make it a multiple of config.rl.minibatches * "
      "config.loss.microbatches."
    )
  _check_evaluation(config.evaluation)
  _check_engine(config)


def _check_objective(config: ExperimentConfig) -> None:
  try:
    recipe = make_objective(config.objective.name, **config.objective.options)
    check_recipe(recipe._replace(scale=config.advantage.scale or recipe.scale))
  except ValueError as error:
    raise ValueError(f"config.objective: {error}") from error


def _check_engine(config: ExperimentConfig) -> None:
  engine, sampling = config.engine, config.sampling
  if engine is None:
    return
  if config.policy.name != "transformer":
    raise ValueError(
      f"config.engine is on, but config.policy.name is {config.policy.name!r}, whose weights no engine can read. Set "
      "config.engine.on=false."
    )
  if sampling.rows:
    raise ValueError(
      f"config.engine.urls is {engine.urls!r} and config.sampling.rows is {sampling.rows}, but rows are our own "
      "sampler's. Set config.sampling.rows=0 or config.engine.on=false."
    )
  raw = (sampling.temperature, sampling.top_k, sampling.top_p) == (1.0, 0, 1.0)
  if config.mismatch is not None and not raw:
    raise ValueError(
      f"config.mismatch.correction is {config.mismatch.correction!r}, which compares log-probabilities at temperature "
      "1, but a remote engine returns them only for config.sampling.temperature=1, top_k=0 and top_p=1. Set these, or "
      "config.mismatch.on=false."
    )


def _check_evaluation(evaluation: EvaluationConfig) -> None:
  settings = {"config.evaluation": evaluation}
  for name, benchmark in evaluation.benchmarks.items():
    where = f"config.evaluation.benchmarks.{name}"
    if not re.fullmatch(r"[\w-]+", name):
      raise ValueError(f"{where}: a benchmark's name is part of file names; want letters, digits, _ and - only.")
    look_up(f"{where}.data.name", benchmark.data.name, DATASETS)
    check_reward(benchmark.reward.name, benchmark.reward.options, f"{where}.reward")
    settings[where] = evaluation.of(benchmark)
  for where, chosen in settings.items():
    if chosen.k and not 1 <= min(chosen.k) <= max(chosen.k) <= chosen.samples:
      raise ValueError(
        f"{where}.k is {chosen.k} with {chosen.samples} samples per problem; want 1 to {chosen.samples}: take more "
        "samples, or ask for smaller k."
      )


def check_divides(config: ExperimentConfig, shards: int, *, training: bool = True) -> None:
  """Checks that every batch of the run divides over the mesh. Called before anything compiles.

  Args:
    shards: `Layout.batch_shards` of the mesh.
    training: False checks only the batches of evaluation.
  Raises:
    ValueError: names the first key whose batch does not divide.
  """
  evaluation = config.evaluation
  sizes = {"config.evaluation.batch_problems": evaluation.batch_problems}
  for name, benchmark in evaluation.benchmarks.items():
    sizes[f"config.evaluation.benchmarks.{name}.batch_problems"] = evaluation.of(benchmark).batch_problems
  if training:
    sizes = _training_batches(config) | sizes
  for where, count in sizes.items():
    if count % shards:
      raise ValueError(
        f"{where} is {count}, which does not divide over the {shards} batch shards of the mesh "
        f"{dict(config.runtime.mesh)}; change it to a multiple of {shards}, or the mesh."
      )


def _training_batches(config: ExperimentConfig) -> dict[str, int]:
  """Rows of the batches of training, by the key or the formula that decides them."""
  rollout = config.collector.prompts * config.sampling.samples_per_prompt
  minibatch = rollout // config.rl.minibatches
  sizes = {
    "config.collector.prompts (prompts are prefilled over the mesh)": config.collector.prompts,
    "config.collector.prompts * config.sampling.samples_per_prompt / (minibatches * microbatches)": (
      minibatch // config.loss.microbatches
    ),
  }
  if config.diagnostics.every:
    sizes["the rows of a minibatch / config.diagnostics.pieces"] = minibatch // config.diagnostics.pieces
  if config.warm_start.steps:
    sizes["config.warm_start.batch_size"] = config.warm_start.batch_size
  return sizes
