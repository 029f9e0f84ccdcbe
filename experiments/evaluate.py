r"""Evaluates a checkpoint on benchmarks: avg@n, pass@k and maj@k with confidence intervals. docs/evaluation.md.

    python -m experiments.evaluate --config=experiments/configs/evaluate_math.py \
      --checkpoint=FOLDER --workdir=evaluations/a

FOLDER is a Hugging Face folder, a folder of `experiments.convert`, or the workdir of a run. It writes completions as
JSON lines, results.json, results.md and results.png. The same command continues an evaluation that was stopped.
"""

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np
from absl import flags
from jax import process_index
from jax.experimental import multihost_utils

from experiments.config import ExperimentConfig
from experiments.reporting import evaluation_plots
from experiments.reporting.progress import Progress
from experiments.setup import runtime
from experiments.setup.benchmarks import Benchmark, make_benchmarks, programs, run
from experiments.setup.build import Components, build
from experiments.setup.command_line import run_app
from experiments.setup.config_flags import plain_config, read_config
from experiments.setup.data import make_tokenizer
from experiments.setup.model_files import check_same_model, find_step, kind_of, load_model, read_model, saved_dtype
from rspo_jax.evaluation import summary
from rspo_jax.evaluation.completion_log import (
  CompletionLog,
  Completions,
  completions_of,
  digest,
  log_path,
  read_lines,
)
from rspo_jax.evaluation.summary import describe, estimates, note, table_rows, write_up
from rspo_jax.files import read_json
from rspo_jax.rewards.base import close
from rspo_jax.run.fingerprints import fingerprints
from rspo_jax.run.workdir import claim_workdir, dump_json_atomic, lock_workdir, write_text_atomic
from rspo_jax.types import Params

# Groups of the config that completions depend on; the other groups are about training.
CLAIMED = ("seed", "model", "tokenizer", "sampling", "engine", "data", "reward", "evaluation", "runtime")
# Keys that may change between starts: places of files, and what is computed from finished completions.
FREE_KEYS = (
  "checkpoint.folder",
  "config.data.data_dir",
  "config.evaluation.every",
  "config.evaluation.k",
  "config.evaluation.level",
  "config.evaluation.resamples",
  "config.runtime.compilation_cache",
)
FREE_KEYS_OF_BENCHMARKS = ("group", "k", "data.data_dir")


def complete_config(settings: ml_collections.ConfigDict, checkpoint: str | Path) -> ExperimentConfig:
  """The config of an evaluation, with the checkpoint's model and tokenizer where the settings leave them open.

  Args:
    settings: a config as for training. Its `model` may have some of the fields only, such as dtype, or none.
  Raises:
    ValueError: a mistake in the config, a model that is not the checkpoint's, or a tokenizer with more tokens than the
      model has.
  """
  stored = read_model(checkpoint)
  plain = settings.to_dict()
  set_fields = {key: value for key, value in (plain.get("model") or {}).items() if value is not None}
  plain["model"] = dataclasses.asdict(stored) | set_fields | {"lora": dataclasses.asdict(stored.lora)}
  plain["tokenizer"] = plain.get("tokenizer") or own_tokenizer(checkpoint)
  config = read_config(ml_collections.ConfigDict(plain))
  check_same_model(checkpoint, stored, config.model, set_fields, "Leave these keys of config.model out.")
  tokens = make_tokenizer(config.tokenizer, config.data.name).vocab_size
  if tokens > stored.vocab_size:
    raise ValueError(
      f"the tokenizer {config.tokenizer or 'of the data set ' + config.data.name} has {tokens} tokens, but the model "
      f"in {checkpoint} only {stored.vocab_size}. Set config.tokenizer to the one that the model was trained with."
    )
  return config


def own_tokenizer(checkpoint: str | Path) -> str:
  """The value of `config.tokenizer` for the tokenizer stored with a checkpoint; '' if there is none."""
  if kind_of(checkpoint) == "run":
    return read_json(Path(checkpoint) / "config.json").get("tokenizer", "")
  return str(checkpoint) if (Path(checkpoint) / "tokenizer.json").exists() else ""


def evaluate(
  config: ExperimentConfig, checkpoint: str | Path, workdir: str | Path, progress: Progress, *, step: str = "newest"
) -> dict[str, Any]:
  """Evaluates a checkpoint, or the rest of an evaluation that was stopped.

  Args:
    config: of `complete_config`.
    step: of a run, see `experiments.setup.model_files.find_step`.
  Returns:
    The content of results.json; {} on processes other than the first.
  Raises:
    ValueError: data, rewards or checkpoint cannot be used, or the workdir belongs to another evaluation.
  """
  workdir = Path(workdir)
  number = find_step(checkpoint, step)
  components = build(config, training=False)
  with contextlib.ExitStack() as stack:
    benchmarks = make_benchmarks(components)
    for reward in {id(benchmark.reward): benchmark.reward for benchmark in benchmarks}.values():
      stack.callback(close, reward)
    dtype = "bfloat16" if saved_dtype(checkpoint) == "bfloat16" else "float32"
    params = load_model(checkpoint, components.layout, dtype=dtype, step=number).params
    identity = {"folder": str(checkpoint), "step": number, "parameters": digest(fingerprints(params))}
    if process_index() == 0:
      stack.callback(lock_workdir(workdir).close)
    _claim(workdir, config, identity, benchmarks)
    for program, users in programs(components, benchmarks):
      progress.print(f"to compile: {program.name}: {', '.join(users)}")
    for benchmark in benchmarks:
      for mode in benchmark.options:
        _complete(components, params, benchmark, mode, workdir, progress)
  if process_index() != 0:
    return {}
  results = summarize(config, workdir, identity, benchmarks)
  dump_json_atomic(workdir / "results.json", results)
  write_text_atomic(workdir / "results.md", write_up(results))
  (workdir / "results.png").write_bytes(evaluation_plots.draw_results(results))
  return results


def _claim(workdir: Path, config: ExperimentConfig, identity: dict[str, Any], benchmarks: Sequence[Benchmark]) -> None:
  """Binds the workdir to this evaluation: checkpoint, config and problems."""
  settings = plain_config(config)
  problems = {
    benchmark.name: digest((example.prompt, example.gold) for example in benchmark.examples) for benchmark in benchmarks
  }
  free_of_benchmarks = [
    f"config.evaluation.benchmarks.{name}.{key}"
    for name in config.evaluation.benchmarks
    for key in FREE_KEYS_OF_BENCHMARKS
  ]
  claim = {"checkpoint": identity, "problems": problems, "config": {key: settings[key] for key in CLAIMED}}
  claim_workdir(workdir, claim, (*FREE_KEYS, *free_of_benchmarks))


def _complete(
  components: Components, params: Params, benchmark: Benchmark, mode: str, workdir: Path, progress: Progress
) -> None:
  """Samples the completions of a benchmark that are not in its log yet."""
  log = CompletionLog(
    log_path(workdir, benchmark.name, mode),
    benchmark.name,
    benchmark.examples,
    samples=benchmark.options[mode].samples_per_prompt,
    batch_problems=benchmark.batch_problems,
  )
  # Processes may see different files; all continue where the first process does.
  log.done = int(multihost_utils.broadcast_one_to_all(np.int32(log.done)))
  total, correct, completions = len(benchmark.examples), 0, 0
  progress.start(f"{benchmark.name}, {mode}", total, log.done)
  for batch in run(components, params, benchmark, mode, first=log.done):
    log.append(batch)
    correct, completions = correct + int(batch.scores.success.sum()), completions + len(batch.texts)
    progress.update(log.done, {"reward/success": correct / completions})


def summarize(
  config: ExperimentConfig, workdir: Path, identity: dict[str, Any], benchmarks: Sequence[Benchmark]
) -> dict[str, Any]:
  """The content of results.json, from the completions in the workdir.

  Args:
    identity: folder, step and digest of the evaluated checkpoint.
  """
  completions = {
    benchmark.name: [_read_completions(workdir, benchmark.name, mode) for mode in ("sampled", "greedy")]
    for benchmark in benchmarks
  }
  measures = {
    benchmark.name: (benchmark.group, estimates(*completions[benchmark.name], benchmark.settings.k))
    for benchmark in benchmarks
  }
  bootstrap = {"level": config.evaluation.level, "resamples": config.evaluation.resamples, "seed": config.seed}
  intervals = summary.summarize(measures, **bootstrap)
  return {
    "checkpoint": identity,
    "bootstrap": bootstrap,
    "benchmarks": {
      benchmark.name: {
        "group": benchmark.group,
        "sampling": _sampling_text(benchmark),
        **describe(*completions[benchmark.name]),
        "measures": intervals["benchmarks"][benchmark.name],
      }
      for benchmark in benchmarks
    },
    "groups": intervals["groups"],
  }


def _read_completions(workdir: Path, benchmark: str, mode: str) -> Completions | None:
  """The completions of a finished evaluation; None if it has none of that mode."""
  lines = read_lines(log_path(workdir, benchmark, mode))
  return completions_of(lines) if lines else None


def _sampling_text(benchmark: Benchmark) -> str:
  """The sampling options as in results.md: "T = 1, top-p 0.95, up to 3072 tokens"."""
  options = benchmark.options["sampled"]
  truncation = "".join(
    f", {name} {value:g}"
    for name, value, off in (("top-k", options.top_k, 0), ("top-p", options.top_p, 1))
    if value != off
  )
  return f"T = {options.temperature:g}{truncation}, up to {options.max_new_tokens} tokens"


def main() -> None:
  checkpoint, workdir = flags.FLAGS.checkpoint, Path(flags.FLAGS.workdir)
  config = complete_config(flags.FLAGS.config, checkpoint)
  runtime.start(config.runtime)
  with Progress() as progress:
    results = evaluate(config, checkpoint, workdir, progress, step=flags.FLAGS.step)
    if results:
      progress.table(str(checkpoint), *table_rows(results))
      progress.print(note(results))
      progress.print(f"Results: {workdir / 'results.md'}, {workdir / 'results.png'}")


if __name__ == "__main__":
  flags.DEFINE_string("checkpoint", None, "A Hugging Face folder, a folder of experiments.convert, or a run's workdir.")
  flags.DEFINE_string("step", "newest", "Checkpoint of a run: newest, best (by held-out success) or a number.")
  flags.mark_flag_as_required("checkpoint")
  run_app(main, "Folder for completions and results. The same folder continues an evaluation.")
