"""F4: the main job. Warm start, then RL with router shift, with held-out evaluation before and after.

    python -m experiments.train --config=experiments/configs/countdown_tiny.py --workdir=runs/countdown_tiny

The same command continues a run that was stopped, from its newest checkpoint and to the same numbers.
"""

import dataclasses
import functools
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags, logging
from ml_collections import config_flags

from experiments import report, runtime
from experiments.config import ExperimentConfig
from experiments.config_io import read_config
from experiments.model_files import initial_state
from experiments.progress import Progress
from experiments.rl import build_rl
from experiments.warm_start import build_warm_start
from experiments.wiring import EVALUATION, Parts, build
from rspo_jax import mesh
from rspo_jax.checkpoint import Checkpoints
from rspo_jax.evaluation import Completions, complete
from rspo_jax.metrics import MetricsWriter
from rspo_jax.types import Params, TrainState
from rspo_jax.workdir import claim_workdir, dump_json_atomic

# What may change between starts of one run: where and how often it writes, not what it computes.
FREE_KEYS = ("checkpoint", "runtime.compilation_cache", "data.data_dir")


class Stopped(Exception):
  """SIGTERM came; everything is saved."""


class Run:
  """The state that a run carries through its phases, and its one way of saving it.

  Attributes:
    state: the train state. seconds: wall time spent per phase, over all starts of the run.
  """

  def __init__(self, parts: Parts, workdir: Path, progress: Progress):
    self.parts, self.workdir, self.progress = parts, workdir, progress
    self.config = parts.config
    self.writer = MetricsWriter(workdir)
    self.checkpoints = Checkpoints(workdir, keep=self.config.checkpoint.keep)
    self.preemption = runtime.Preemption()
    self.state: TrainState | None = None
    self.seconds: dict[str, float] = {}

  def save(self, phase: str, step: int, metrics: Mapping[str, float] | None = None) -> None:
    done = step + (self.config.warm_start.steps if phase == "rl" else 0)
    meta = {"phase": phase, "step": step, "data_position": step, "seed": self.config.seed, "seconds": self.seconds}
    self.checkpoints.save(done, self.state, meta, metrics)

  def restore(self, abstract_states: Mapping[str, TrainState]) -> tuple[str, int]:
    """The phase and the steps done of it; ('', 0) for a fresh run. Forgets metrics written after the checkpoint.

    Args:
      abstract_states: per phase; what its optimizer keeps differs where RL freezes parameters.
    """
    restored = self.checkpoints.restore(lambda meta: abstract_states[meta["phase"]])
    if restored is None:
      self.writer.truncate("", 0)
      return "", 0
    phase, step = restored.meta["phase"], restored.meta["step"]
    self.state, self.seconds = restored.state, dict(restored.meta["seconds"])
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

  def evaluate(self) -> tuple[dict[str, float], Completions]:
    """Held-out metrics, and the completions at temperature 1."""
    start = time.perf_counter()
    parts, wanted = self.parts, self.config.evaluation
    examples = parts.splits["test"].examples[: wanted.problems or None]

    def completions(samples: int, temperature: float) -> Completions:
      options = parts.sampling_options(samples, temperature=temperature, top_k=0, top_p=1.0)

      def generate(batch, first):
        return parts.generate(self.state.params, options, parts.key(EVALUATION), batch, first)[1:]

      return complete(generate, parts.reward, examples, samples=samples, batch_problems=wanted.batch_problems)

    sampled, greedy = completions(wanted.samples, 1.0), completions(1, 0.0)
    metrics = {
      "eval/success": sampled.success,
      "eval/greedy_success": greedy.success,
      "eval/format": float(sampled.scores.format.mean()),
    }
    self.seconds["evaluation"] = self.seconds.get("evaluation", 0.0) + time.perf_counter() - start
    return metrics, sampled

  def close(self) -> None:
    self.writer.close()
    self.checkpoints.close()


def peak_memory() -> dict[str, int]:
  """Largest memory in use so far on the fullest local device, where the backend tells."""
  peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.local_devices()]
  return {"memory/peak_bytes": max(peaks)} if any(peaks) else {}


def train(config: ExperimentConfig, workdir: Path, progress: Progress) -> dict[str, Any]:
  """Runs the experiment, or what is left of it; returns the summary that it writes to the workdir."""
  claim_workdir(workdir, dataclasses.asdict(config), FREE_KEYS)
  parts = build(config)
  warm_start, rl = build_warm_start(parts), build_rl(parts)
  run = Run(parts, workdir, progress)
  try:
    phase, done = run.restore(
      {
        name: mesh.abstract_state(parts.policy, optimizer, parts.layout)
        for name, optimizer in (("warm_start", warm_start.optimizer), ("rl", rl.optimizer))
      }
    )

    if phase != "rl":
      if run.state is None:
        run.state = initial_state(parts, warm_start.optimizer)
      run.phase("warm_start", warm_start.step, done, config.warm_start.steps)
      # RL begins with a fresh optimizer.
      run.state = mesh.restart_optimizer(run.state, parts.policy, rl.optimizer, parts.layout)
      before, completions = run.evaluate()
      run.writer.write("rl", 0, before)
      report.write_answers(workdir / "answers_before.jsonl", parts.splits["test"].examples, completions)
      run.save("rl", 0, before)
      done = 0
    rl_step = functools.partial(rl.step, reference=run.reference(done))
    run.phase("rl", rl_step, done, config.rl.steps, config.evaluation.every)
    if done < config.rl.steps:
      after, completions = run.evaluate()
      run.writer.write("rl", config.rl.steps, after)
      report.write_answers(workdir / "answers_after.jsonl", parts.splits["test"].examples, completions)
      run.save("rl", config.rl.steps, after)
    run.checkpoints.wait()
  finally:
    run.close()
  summary = report.summarize(workdir, config, run.seconds, len(parts.splits["test"].examples))
  if jax.process_index() == 0:
    dump_json_atomic(workdir / "summary.json", summary)
  report.write_report(workdir, summary)
  return summary


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {argv[1:]}; settings are given as --config.group.name=value")
  workdir = Path(flags.FLAGS.workdir)
  try:
    config = read_config(flags.FLAGS.config)
    runtime.start(config.runtime)
    with Progress() as progress:
      summary = train(config, workdir, progress)
      report.print_summary(progress, summary, workdir)
  except Stopped:
    print(f"stopped as asked; the same command continues {workdir}")
  except ValueError as error:
    # A user's mistake: the message says what to do, the trace would hide it (--verbosity=1 shows it).
    logging.debug("", exc_info=True)
    sys.exit(f"error: {error}")


def parse_flags(argv: list[str]) -> list[str]:
  """absl's parser, with ml_collections' bare exceptions turned into one line that names the flag."""
  try:
    rest = flags.FLAGS(argv)
    _ = flags.FLAGS.config  # a file that cannot be loaded raises here
    return rest
  except flags.Error as error:
    # A config file that raises arrives as its whole traceback; the last line says what is wrong.
    sys.exit(f"error: {str(error).strip().splitlines()[-1].strip()} (--help lists the flags)")
  except (AttributeError, KeyError, TypeError, OSError) as error:
    given = [arg for arg in argv if arg.startswith(("--config", "-config"))]
    reason = " ".join(str(error).replace("\\n", " ").replace("\\'", "'").split()).strip("\"'")
    sys.exit(f"error: no such setting or file in {' '.join(given)} ({reason})")


def run_app() -> None:
  config_flags.DEFINE_config_file("config", None, "Config file; its fields are flags: --config.rl.steps=10.")
  flags.DEFINE_string(
    "workdir", None, "Folder for checkpoints, metrics and the report. The same folder continues a run."
  )
  flags.mark_flags_as_required(["config", "workdir"])
  logging.set_verbosity(logging.WARNING)
  app.run(main, flags_parser=parse_flags)


if __name__ == "__main__":
  run_app()
