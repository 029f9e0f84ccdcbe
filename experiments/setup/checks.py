"""What the groups of a config must agree on. Ranges of single fields are checked by their own dataclasses."""

import re

from experiments.config import EvaluationConfig, ExperimentConfig
from experiments.setup.weight_sync import UPDATES
from rspo_jax.data.datasets import DATASETS
from rspo_jax.lookup import look_up
from rspo_jax.objectives.table import check_recipe, make_objective
from rspo_jax.rewards.table import check_reward, reward_names


def check_config(config: ExperimentConfig) -> None:
  """Raises ValueError for names that do not exist and for groups that contradict each other; names key and cure."""
  look_up("config.data.name", config.data.name, DATASETS)
  check_reward(config.reward.name, config.reward.options, "config.reward")
  _check_objective(config)
  look_up("config.policy.name", config.policy.name, {"transformer": None})
  if config.policy.name == "transformer" and config.model is None:
    raise ValueError("config.model is None; describe the model there, or name a policy of your own in config.policy.")
  for where, value, least in (
    ("config.sampling.samples_per_prompt", config.sampling.samples_per_prompt, 2 if config.steps else 1),
    ("config.checkpoint.every", config.checkpoint.every, 1),
    ("config.diagnostics.every", config.diagnostics.every, 0),
    ("config.diagnostics.pieces", config.diagnostics.pieces, 2),
    ("config.steps", config.steps, 0),
    ("config.warm_start.steps", config.warm_start.steps, 0),
    ("config.data.max_prompt_tokens", config.data.max_prompt_tokens, 0),
  ):
    if value < least:
      raise ValueError(f"{where} is {value}; want {least} or more.")
  if config.collector.overlong_buffer and "length" in reward_names(config.reward.name, config.reward.options):
    raise ValueError(
      f"config.collector.overlong_buffer is {config.collector.overlong_buffer} and config.reward holds the length "
      "reward: long completions would be penalised twice. Set overlong_buffer to 0, or leave the length reward out."
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
  if not engine.urls:
    raise ValueError("config.engine.urls is ''; name the root of a server, as http://127.0.0.1:8000.")
  if config.policy.name != "transformer":
    raise ValueError(
      f"config.engine is on, but config.policy.name is {config.policy.name!r}, whose weights no engine can read. Set "
      "config.engine.on=false."
    )
  if engine.kind not in UPDATES:
    raise ValueError(f"config.engine.kind is {engine.kind!r}; want one of {', '.join(UPDATES)}.")
  if not engine.folder:
    raise ValueError(
      f"config.engine.urls is {engine.urls!r}, but config.engine.folder is ''; name a folder that the engine sees too: "
      "its weights are written there before every step."
    )
  if sampling.rows:
    raise ValueError(
      f"config.engine.urls is {engine.urls!r} and config.sampling.rows is {sampling.rows}: rows are our own sampler's. "
      "Set one."
    )
  plain = (sampling.temperature, sampling.top_k, sampling.top_p) == (1.0, 0, 1.0)
  if config.mismatch is not None and not plain:
    raise ValueError(
      f"config.mismatch.correction is {config.mismatch.correction!r}, which compares log-probabilities at temperature "
      "1; a remote engine returns them only with config.sampling.temperature=1, top_k=0 and top_p=1."
    )


def _check_evaluation(evaluation: EvaluationConfig) -> None:
  if not 0.0 < evaluation.level < 1.0 or evaluation.resamples < 1:
    raise ValueError(
      f"config.evaluation.level is {evaluation.level} and resamples {evaluation.resamples}; want a level in (0, 1), "
      "such as 0.95, and 1 or more."
    )
  settings = {"config.evaluation": evaluation}
  for name, benchmark in evaluation.benchmarks.items():
    where = f"config.evaluation.benchmarks.{name}"
    if not re.fullmatch(r"[\w-]+", name):
      raise ValueError(f"{where}: a benchmark's name is part of file names; want letters, digits, _ and -.")
    look_up(f"{where}.data.name", benchmark.data.name, DATASETS)
    check_reward(benchmark.reward.name, benchmark.reward.options, f"{where}.reward")
    settings[where] = evaluation.of(benchmark)
  for where, chosen in settings.items():
    for key, least in (("samples", 1), ("batch_problems", 1), ("problems", 0)):
      if getattr(chosen, key) < least:
        raise ValueError(f"{where}.{key} is {getattr(chosen, key)}; want {least} or more.")
    if chosen.k and not 1 <= min(chosen.k) <= max(chosen.k) <= chosen.samples:
      raise ValueError(
        f"{where}.k is {chosen.k} with {chosen.samples} samples per problem; want 1 to {chosen.samples}: take more "
        "samples, or ask for smaller k."
      )


def check_divides(config: ExperimentConfig, shards: int, *, training: bool = True) -> None:
  """Every batch of the run must split evenly over the mesh; reported before anything compiles.

  Args:
    shards: pieces that the mesh cuts a batch into, `Layout.batch_shards`.
    training: whether the batches of training count.
  Raises:
    ValueError: names the first key that does not divide.
  """
  rollout = config.collector.prompts * config.sampling.samples_per_prompt
  rows = rollout // (config.rl.minibatches * config.loss.microbatches)
  noise_rows = rollout // config.rl.minibatches if config.diagnostics.every else 0
  of_training = (
    ("config.collector.prompts (prompts are prefilled over the mesh)", config.collector.prompts),
    ("config.collector.prompts * config.sampling.samples_per_prompt / (minibatches * microbatches)", rows),
    ("the rows of a minibatch in each of config.diagnostics.pieces", noise_rows // config.diagnostics.pieces),
    ("config.warm_start.batch_size", config.warm_start.batch_size if config.warm_start.steps else 0),
  )
  for where, count in (
    *(of_training if training else ()),
    ("config.evaluation.batch_problems", config.evaluation.batch_problems),
    *(
      (f"config.evaluation.benchmarks.{name}.batch_problems", config.evaluation.of(benchmark).batch_problems)
      for name, benchmark in config.evaluation.benchmarks.items()
    ),
  ):
    if count % shards:
      raise ValueError(
        f"{where} is {count}, which does not divide over the {shards} batch shards of the mesh "
        f"{dict(config.runtime.mesh)}; change it to a multiple of {shards}, or the mesh."
      )
