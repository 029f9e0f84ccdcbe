"""The main job: warm start, then RL with router shift, with held-out evaluation before and after.

    python -m experiments.train --config=experiments/configs/countdown_tiny.py --workdir=runs/countdown_tiny

The same command continues a run that was stopped, from its newest checkpoint and to the same numbers.
"""

import functools
import time
from collections.abc import Mapping
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

# What may change between starts of one run: where and how often it writes, not what it computes.
FREE_KEYS = (
  "checkpoint",
  "runtime.compilation_cache",
  "data.data_dir",
  *(f"engine.{name}" for name in ("urls", "folder", "timeout")),
)


class Stopped(Exception):
  """SIGTERM was received; everything is saved."""


class Run:
  """The state that a run carries through its phases, and its one way of saving it.

  Attributes:
    state: the train state. seconds: wall time spent per phase, over all starts of the run.
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
    done = step + (self.config.warm_start.steps if phase == "rl" else 0)
    meta = {"phase": phase, "step": step, "data_position": step, "seed": self.config.seed, "seconds": self.seconds}
    tree, size = bundle(self.state, self.collector.state(), self.components.layout)
    self.checkpoints.save(done, tree, meta | size, metrics)

  def restore(self, abstract_states: Mapping[str, TrainState]) -> tuple[str, int]:
    """The phase and the steps done of it; ('', 0) for a new run. Drops metrics written after the checkpoint.

    Args:
      abstract_states: per phase; optimizer states differ where RL freezes parameters.
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
    """The parameters at the beginning of RL, for a KL term of the config; stored beside the checkpoints.

    Args:
      done: RL steps taken; at 0 these are the present parameters.
    """
    if not (self.config.loss.kl_coefficient or self.config.rl.reward_kl_coefficient):
      return None
    with Checkpoints(self.workdir / "reference", keep=1) as kept:
      if done == 0:
        kept.save(0, self.state.params, {})
        kept.wait()
        return jax.tree.map(jnp.copy, self.state.params)
      restored = kept.restore(self.state.params)
    if restored is None:
      raise ValueError(
        f"{self.workdir / 'reference'} is missing, and with it the policy at the beginning of RL; start again in a new "
        "workdir."
      )
    return restored.state

  def phase(self, name: str, step, done: int, total: int, evaluate_every: int = 0) -> None:
    """Takes the remaining steps of a phase, with evaluations and checkpoints in between."""
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
    """Held-out metrics, and the sampled completions of every benchmark."""
    start = time.perf_counter()
    evaluated = benchmarks.evaluate(self.components, self.state.params, self.benchmarks)
    self.seconds["evaluation"] = self.seconds.get("evaluation", 0.0) + time.perf_counter() - start
    return evaluated

  def write_evaluation(self, step: int, which: str) -> None:
    """Evaluates before or after RL, writes the metrics and the answers, and saves."""
    metrics, completions = self.evaluate()
    self.writer.write("rl", step, metrics)
    answered = zip((benchmark.examples for benchmark in self.benchmarks), completions, strict=True)
    write_answers(self.workdir / f"answers_{which}.jsonl", answered)
    self.save("rl", step, metrics)

  def close(self) -> None:
    self.writer.close()
    self.checkpoints.close()
    close(self.components.reward)


def peak_memory() -> dict[str, int]:
  """Largest memory in use so far on the fullest local device, where the backend tells."""
  peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.local_devices()]
  return {"memory/peak_bytes": max(peaks)} if any(peaks) else {}


def train(config: ExperimentConfig, workdir: Path, progress: Progress) -> dict[str, Any]:
  """Runs the experiment, or what is left of it; returns the summary that it writes to the workdir."""
  claim_workdir(workdir, plain_config(config), FREE_KEYS)
  components = build(config)
  (warm_optimizer, warm_schedule), (optimizer, schedule) = optimizers(config).values()
  warm_start = build_warm_start(components, warm_optimizer, warm_schedule)
  collector, functions = build_collector(components), build_update(components, optimizer)
  diagnose = build_diagnostics(components) if config.diagnostics.every else None
  updates_per_step = config.rl.epochs * config.rl.minibatches
  run = Run(components, collector, workdir, progress)

  def take_rl_step(state: TrainState, number: int, reference: Params | None) -> tuple[TrainState, dict]:
    due = diagnose if diagnose and (number + 1) % config.diagnostics.every == 0 else None
    state, metrics = rl_step(state, number, collector=collector, functions=functions, reference=reference, diagnose=due)
    return state, metrics | {"optimizer/learning_rate": schedule((number + 1) * updates_per_step - 1)}

  of_rl = rl_programs(
    components.policy,
    optimizer,
    functions,
    collector.sampler,
    rows=config.collector.prompts * config.sampling.samples_per_prompt,
    prompt_length=components.prompt_length,
    versions=config.collector.carry_over > 0,
  )
  of_evaluation = (program for program, _ in benchmarks.programs(components, run.benchmarks))
  every = {program.name: program for program in (*warm_start.programs, *of_evaluation, *of_rl)}
  for name in every:
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
      run.phase("warm_start", warm_start.step, done, config.warm_start.steps)
      # RL begins with a new optimizer state.
      run.state = restart_optimizer(run.state, components.policy, optimizer, components.layout)
      run.write_evaluation(0, "before")
      done = 0
    step = functools.partial(take_rl_step, reference=run.reference(done))
    run.phase("rl", step, done, config.steps, config.evaluation.every)
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
