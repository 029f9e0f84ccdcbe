"""Trains a policy: warm start, then RL with router shift, with held-out evaluation before and after RL.

    python -m experiments.train --config=experiments/configs/countdown_tiny.py --workdir=runs/countdown_tiny

The same command continues a run that was stopped, from its newest checkpoint, with the same results.
"""

import functools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from experiments.config import ExperimentConfig
from experiments.reporting.answers import write_answers
from experiments.reporting.page import write_report
from experiments.reporting.progress import Progress
from experiments.reporting.summary import summarize
from experiments.reporting.summary_text import print_summary
from experiments.setup import benchmarks, runtime
from experiments.setup.build import Components, build, build_collector, build_diagnostics, build_update, optimizers
from experiments.setup.command_line import run_app
from experiments.setup.config_flags import plain_config, read_config
from experiments.setup.model_files import initial_state
from experiments.setup.warm_start import build_warm_start
from rspo_jax.evaluation.completion_log import Completions
from rspo_jax.rewards.base import close
from rspo_jax.rl_programs import rl_programs
from rspo_jax.rl_step import rl_step
from rspo_jax.rollout.collector import Collector
from rspo_jax.run.checkpoint import Checkpoints
from rspo_jax.run.host_state import abstract_bundle, bundle, unbundle
from rspo_jax.run.metrics import MetricsWriter
from rspo_jax.run.workdir import claim_workdir, dump_json_atomic
from rspo_jax.training.state import abstract_state, restart_optimizer
from rspo_jax.types import Params, TrainState

# Keys that may change between starts of a run: where and how often it reads and writes, not what it computes.
FREE_KEYS = (
  "checkpoint",
  "runtime.compilation_cache",
  "data.data_dir",
  "engine.urls",
  "engine.folder",
  "engine.timeout",
)


TakeStep = Callable[[TrainState, int], tuple[TrainState, dict[str, Any]]]


class Stopped(Exception):
  """SIGTERM was received, and the state is saved."""


class Run:
  """The state of a run through its phases, its checkpoints and its metrics.

  Attributes:
    state: the train state; None before it is initialised or restored.
    seconds: wall time by phase, over all starts of the run.
  """

  def __init__(self, components: Components, collector: Collector, workdir: Path, progress: Progress):
    self.components, self.collector, self.workdir, self.progress = components, collector, workdir, progress
    self.config = components.config
    self.benchmarks = benchmarks.make_benchmarks(components)
    self.writer = MetricsWriter(workdir)
    self.checkpoints = Checkpoints(workdir, keep=self.config.checkpoint.keep)
    self.preemption = runtime.Preemption()
    self.state: TrainState | None = None
    self.seconds: dict[str, float] = {}

  def save(self, phase: str, step: int, metrics: Mapping[str, float] | None = None) -> None:
    """Starts to save a checkpoint after `step` steps of a phase; metrics: of an evaluation, which rank checkpoints."""
    number = step + (self.config.warm_start.steps if phase == "rl" else 0)
    meta = {"phase": phase, "step": step, "data_position": step, "seed": self.config.seed, "seconds": self.seconds}
    tree, size = bundle(self.state, self.collector.state(), self.components.layout)
    self.checkpoints.save(number, tree, meta | size, metrics)

  def restore(self, abstract_states: Mapping[str, TrainState]) -> tuple[str, int]:
    """Restores the newest checkpoint, if there is one, and drops the metrics that were written after it.

    Args:
      abstract_states: by phase. Optimizer states differ between phases, because they may freeze different parameters.
    Returns:
      The phase and the number of its steps that are done; ("", 0) for a new run.
    """
    restored = self.checkpoints.restore(
      lambda meta: abstract_bundle(abstract_states[meta["phase"]], meta, self.components.layout)
    )
    if restored is None:
      self.writer.truncate("", 0)
      return "", 0
    phase, step = restored.meta["phase"], restored.meta["step"]
    self.state, carried = unbundle(restored.state, restored.meta)
    self.collector.restore(carried)
    self.seconds = dict(restored.meta["seconds"])
    self.writer.truncate(phase, step)
    self.progress.print(f"continuing {self.workdir} after step {step} of {phase}")
    return phase, step

  def reference(self, done: int) -> Params | None:
    """The parameters of the reference policy, those at the start of RL; None if the config has no KL term.

    They are stored in the folder "reference" of the workdir.

    Args:
      done: number of RL steps done. If it is 0, the current parameters become the reference.
    Raises:
      ValueError: RL has started, but the folder is missing.
    """
    if not (self.config.loss.kl_coefficient or self.config.rl.reward_kl_coefficient):
      return None
    with Checkpoints(self.workdir / "reference", keep=1) as checkpoints:
      if done == 0:
        checkpoints.save(0, self.state.params, {})
        checkpoints.wait()
        return jax.tree.map(jnp.copy, self.state.params)
      restored = checkpoints.restore(self.state.params)
    if restored is None:
      raise ValueError(
        f"{self.workdir / 'reference'}, which held the policy at the start of RL, is missing; start again in a new "
        "workdir."
      )
    return restored.state

  def take_steps(self, name: str, step: TakeStep, done: int, total: int, evaluate_every: int = 0) -> None:
    """Takes the remaining steps of a phase, with evaluations and checkpoints between them.

    Args:
      name: of the phase.
      step: (state, number of the step, from 0) -> (state, metrics).
      done: number of its steps that are done. total: number of all its steps.
      evaluate_every: steps between evaluations; 0 is none.
    Raises:
      Stopped: SIGTERM was received before the last step.
    """
    self.progress.start(name, total, done)
    for number in range(done, total):
      start = time.perf_counter()
      self.state, metrics = step(self.state, number)
      self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
      finished = number + 1
      evaluated = {}
      if evaluate_every and finished % evaluate_every == 0 and finished < total:
        evaluated = self.evaluate()[0]
      values = self.writer.write(name, finished, metrics | evaluated | peak_memory())
      self.progress.update(finished, values)
      stop = self.preemption.requested(finished)
      if finished < total and (stop or evaluated or finished % self.config.checkpoint.every == 0):
        self.save(name, finished, evaluated)
      if stop and finished < total:
        raise Stopped

  def evaluate(self) -> tuple[dict[str, float], list[Completions]]:
    """The metrics of an evaluation, and the sampled completions of every benchmark."""
    start = time.perf_counter()
    evaluated = benchmarks.evaluate(self.components, self.state.params, self.benchmarks)
    self.seconds["evaluation"] = self.seconds.get("evaluation", 0.0) + time.perf_counter() - start
    return evaluated

  def write_evaluation(self, step: int, side: str) -> None:
    """Evaluates "before" or "after" RL, writes the metrics and the answers, and saves a checkpoint."""
    metrics, completions = self.evaluate()
    self.writer.write("rl", step, metrics)
    answers = zip((benchmark.examples for benchmark in self.benchmarks), completions, strict=True)
    write_answers(self.workdir / f"answers_{side}.jsonl", answers)
    self.save("rl", step, metrics)

  def close(self) -> None:
    self.writer.close()
    self.checkpoints.close()
    close(self.components.reward)


def peak_memory() -> dict[str, int]:
  """The metric of the most memory that a local device has used so far, bytes; {} if the backend does not report it."""
  peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.local_devices()]
  return {"memory/peak_bytes": max(peaks)} if any(peaks) else {}


def train(config: ExperimentConfig, workdir: Path, progress: Progress) -> dict[str, Any]:
  """Trains, or continues a run that was stopped; returns the summary, which is also written to the workdir.

  Raises:
    ValueError: the config, its data or its checkpoint cannot be used, or the workdir belongs to another run.
    Stopped: SIGTERM was received.
  """
  claim_workdir(workdir, plain_config(config), FREE_KEYS)
  components = build(config)
  (warm_optimizer, warm_schedule), (optimizer, schedule) = optimizers(config).values()
  warm_start = build_warm_start(components, warm_optimizer, warm_schedule)
  collector, functions = build_collector(components), build_update(components, optimizer)
  diagnose = build_diagnostics(components) if config.diagnostics.every else None
  updates_per_step = config.rl.epochs * config.rl.minibatches
  run = Run(components, collector, workdir, progress)

  def take_rl_step(state: TrainState, number: int, reference: Params | None) -> tuple[TrainState, dict]:
    diagnose_now = diagnose if diagnose and (number + 1) % config.diagnostics.every == 0 else None
    inputs = {"collector": collector, "functions": functions, "reference": reference, "diagnose": diagnose_now}
    state, metrics = rl_step(state, number, **inputs)
    return state, metrics | {"optimizer/learning_rate": schedule((number + 1) * updates_per_step - 1)}

  programs_of_rl = rl_programs(
    components.policy,
    optimizer,
    functions,
    collector.sampler,
    rows=config.collector.prompts * config.sampling.samples_per_prompt,
    prompt_length=components.prompt_length,
    versions=config.collector.carry_over > 0,
  )
  programs_of_evaluation = [program for program, _ in benchmarks.programs(components, run.benchmarks)]
  programs = (*warm_start.programs, *programs_of_evaluation, *programs_of_rl)
  for name in dict.fromkeys(program.name for program in programs):
    progress.print(f"to compile: {name}")
  try:
    phase, done = run.restore(
      {
        "warm_start": abstract_state(components.policy, warm_optimizer, components.layout),
        "rl": abstract_state(components.policy, optimizer, components.layout),
      }
    )
    if phase != "rl":
      if run.state is None:
        run.state = initial_state(components, warm_optimizer)
      run.take_steps("warm_start", warm_start.step, done, config.warm_start.steps)
      run.state = restart_optimizer(run.state, components.policy, optimizer, components.layout)
      run.write_evaluation(0, "before")
      done = 0
    step = functools.partial(take_rl_step, reference=run.reference(done))
    run.take_steps("rl", step, done, config.steps, config.evaluation.every)
    if done < config.steps:
      run.write_evaluation(config.steps, "after")
    run.checkpoints.wait()
  finally:
    run.close()
  summary = summarize(workdir, config, run.seconds, sum(benchmark.available for benchmark in run.benchmarks))
  if jax.process_index() == 0:
    dump_json_atomic(workdir / "summary.json", summary)
  write_report(workdir, summary)
  return summary


def main() -> None:
  workdir = Path(flags.FLAGS.workdir)
  try:
    config = read_config(flags.FLAGS.config)
    runtime.start(config.runtime)
    with Progress() as progress:
      summary = train(config, workdir, progress)
      print_summary(progress, summary, workdir)
  except Stopped:
    print(f"stopped on SIGTERM; the same command continues {workdir}")


if __name__ == "__main__":
  run_app(main, "Folder for checkpoints, metrics and the report. The same folder continues a run.")
