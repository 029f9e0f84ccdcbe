"""The main job. Warm start, then RL with router shift, with held-out evaluation before and after.

    python -m experiments.train --config=experiments/configs/countdown_tiny.py --workdir=runs/countdown_tiny

The same command continues a run that was stopped, from its newest checkpoint and to the same numbers.
"""

import dataclasses
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
from experiments.setup.benchmarks import make_benchmarks
from experiments.setup.build import Components, build
from experiments.setup.command_line import run_app
from experiments.setup.config_flags import read_config
from experiments.setup.model_files import initial_state
from experiments.setup.warm_start import build_warm_start
from rspo_jax.evaluation.completion_log import Completions
from rspo_jax.rewards import base
from rspo_jax.rl_step import build_rl
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
  *(f"sampling.engine{which}" for which in ("", "_folder", "_timeout")),
)


class Stopped(Exception):
  """SIGTERM came; everything is saved."""


class Run:
  """The state that a run carries through its phases, and its one way of saving it.

  Attributes:
    state: the train state. seconds: wall time spent per phase, over all starts of the run.
  """

  def __init__(self, parts: Components, rollouts: Collector, workdir: Path, progress: Progress):
    self.parts, self.rollouts, self.workdir, self.progress = parts, rollouts, workdir, progress
    self.config = parts.config
    self.benchmarks = make_benchmarks(parts)
    self.writer = MetricsWriter(workdir)
    self.checkpoints = Checkpoints(workdir, keep=self.config.checkpoint.keep)
    self.preemption = runtime.Preemption()
    self.state: TrainState | None = None
    self.seconds: dict[str, float] = {}

  def save(self, phase: str, step: int, metrics: Mapping[str, float] | None = None) -> None:
    done = step + (self.config.warm_start.steps if phase == "rl" else 0)
    meta = {"phase": phase, "step": step, "data_position": step, "seed": self.config.seed, "seconds": self.seconds}
    tree, size = bundle(self.state, self.rollouts.state(), self.parts.layout)
    self.checkpoints.save(done, tree, meta | size, metrics)

  def restore(self, abstract_states: Mapping[str, TrainState]) -> tuple[str, int]:
    """The phase and the steps done of it; ('', 0) for a fresh run. Forgets metrics written after the checkpoint.

    Args:
      abstract_states: per phase; what its optimizer keeps differs where RL freezes parameters.
    """
    restored = self.checkpoints.restore(
      lambda meta: abstract_bundle(abstract_states[meta["phase"]], meta, self.parts.layout)
    )
    if restored is None:
      self.writer.truncate("", 0)
      return "", 0
    phase, step = restored.meta["phase"], restored.meta["step"]
    self.state, carried = unbundle(restored.state, restored.meta)
    self.rollouts.restore(carried)
    self.seconds = dict(restored.meta["seconds"])
    self.writer.truncate(phase, step)
    self.progress.print(f"continuing {self.workdir} after step {step} of {phase}")
    return phase, step

  def reference(self, done: int) -> Params | None:
    """The parameters that RL began with, if the config holds the policy near them; kept beside the checkpoints.

    Args:
      done: RL steps taken; at 0 the present parameters are they.
    """
    if not self.config.objective.kl_coefficient:
      return None
    with Checkpoints(self.workdir / "reference", keep=1) as kept:
      if done == 0:
        kept.save(0, self.state.params, {})
        kept.wait()
        return jax.tree.map(jnp.copy, self.state.params)
      restored = kept.restore(self.state.params)
    if restored is None:
      raise ValueError(
        f"{self.workdir / 'reference'} is gone, and with it the policy that RL began with; start afresh."
      )
    return restored.state

  def phase(self, name: str, step, done: int, total: int, evaluate_every: int = 0) -> None:
    """Takes the steps of a phase that are left, saving and evaluating on the way."""
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
    found = benchmarks.evaluate(self.parts, self.state.params, self.benchmarks)
    self.seconds["evaluation"] = self.seconds.get("evaluation", 0.0) + time.perf_counter() - start
    return found

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
    base.close(self.parts.reward)


def peak_memory() -> dict[str, int]:
  """Largest memory in use so far on the fullest local device, where the backend tells."""
  peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.local_devices()]
  return {"memory/peak_bytes": max(peaks)} if any(peaks) else {}


def train(config: ExperimentConfig, workdir: Path, progress: Progress) -> dict[str, Any]:
  """Runs the experiment, or what is left of it; returns the summary that it writes to the workdir."""
  claim_workdir(workdir, dataclasses.asdict(config), FREE_KEYS)
  parts = build(config)
  warm_start, rl = build_warm_start(parts), build_rl(parts)
  run = Run(parts, rl.rollouts, workdir, progress)
  for program in rl.rollouts.programs:
    progress.print(f"continuous batching compiles: {program}")
  try:
    phase, done = run.restore(
      {
        name: abstract_state(parts.policy, optimizer, parts.layout)
        for name, optimizer in (("warm_start", warm_start.optimizer), ("rl", rl.optimizer))
      }
    )

    if phase != "rl":
      if run.state is None:
        run.state = initial_state(parts, warm_start.optimizer)
      run.phase("warm_start", warm_start.step, done, config.warm_start.steps)
      # RL begins with a fresh optimizer.
      run.state = restart_optimizer(run.state, parts.policy, rl.optimizer, parts.layout)
      run.write_evaluation(0, "before")
      done = 0
    rl_step = functools.partial(rl.step, reference=run.reference(done))
    run.phase("rl", rl_step, done, config.rl.steps, config.evaluation.every)
    if done < config.rl.steps:
      run.write_evaluation(config.rl.steps, "after")
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
    print(f"stopped as asked; the same command continues {workdir}")


if __name__ == "__main__":
  run_app(main, "Folder for checkpoints, metrics and the report. The same folder continues a run.")
