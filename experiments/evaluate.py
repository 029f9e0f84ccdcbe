r"""How good a checkpoint is on benchmarks: avg@n, pass@k, maj@k with confidence intervals. docs/evaluation.md.

    python -m experiments.evaluate --config=experiments/configs/evaluate_math.py \
      --checkpoint=FOLDER --workdir=evaluations/a

FOLDER is a Hugging Face folder, one of `experiments.convert`, or the workdir of a run. The workdir gets the completions
as JSON lines, results.json, results.md and results.png. The same command continues an evaluation that was stopped.
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
from experiments.setup.model_files import FREE_FIELDS, find_step, kind_of, load_model, read_model, saved_dtype
from models.huggingface.config_json import raise_problems
from rspo_jax.evaluation import summary
from rspo_jax.evaluation.completion_log import CompletionLog, Completions, completions_of, digest, read_lines
from rspo_jax.evaluation.summary import describe, estimates, note, table_rows, write_up
from rspo_jax.files import read_json
from rspo_jax.rewards.base import close
from rspo_jax.run.fingerprints import fingerprints
from rspo_jax.run.workdir import claim_workdir, dump_json_atomic, lock_workdir, write_text_atomic
from rspo_jax.types import Params

# What completions depend on; all else of a config is about training.
CLAIMED = ("seed", "model", "tokenizer", "sampling", "engine", "data", "reward", "evaluation", "runtime")
# What may change between starts: where things lie, and what is computed of the completions afterwards.
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


def complete_config(given: ml_collections.ConfigDict, checkpoint: str | Path) -> ExperimentConfig:
  """The config of an evaluation: what it does not say of model and tokenizer, the checkpoint does.

  Args:
    given: as of training, or with a `model` that has only some fields, such as dtype.
  Raises:
    ValueError: a mistake in the config, another model than the checkpoint's, or a tokenizer that does not go with it.
  """
  found = read_model(checkpoint)
  plain = given.to_dict()
  wanted = {key: value for key, value in (plain.get("model") or {}).items() if value is not None}
  plain["model"] = dataclasses.asdict(found) | wanted | {"lora": dataclasses.asdict(found.lora)}
  plain["tokenizer"] = plain.get("tokenizer") or own_tokenizer(checkpoint)
  config = read_config(ml_collections.ConfigDict(plain))
  differing = [
    f"config.model.{key} is {getattr(config.model, key)!r}, there {getattr(found, key)!r}"
    for key in wanted
    if key not in FREE_FIELDS and getattr(config.model, key) != getattr(found, key)
  ]
  raise_problems(f"{checkpoint} is another model than config.model", differing, "Leave these keys of config.model out.")
  tokens = make_tokenizer(config.tokenizer, config.data.name).vocab_size
  if tokens > found.vocab_size:
    raise ValueError(
      f"the tokenizer {config.tokenizer or 'of the data set ' + config.data.name} has {tokens} tokens, but the model "
      f"in {checkpoint} knows {found.vocab_size}: they do not belong together. Set config.tokenizer to the one that "
      "the model was trained with."
    )
  return config


def own_tokenizer(checkpoint: str | Path) -> str:
  """The tokenizer that comes with a checkpoint, as `config.tokenizer`; '' for none."""
  if kind_of(checkpoint) == "run":
    return read_json(Path(checkpoint) / "config.json").get("tokenizer", "")
  return str(checkpoint) if (Path(checkpoint) / "tokenizer.json").exists() else ""


def evaluate(
  config: ExperimentConfig, checkpoint: str | Path, workdir: str | Path, progress: Progress, *, step: str = "newest"
) -> dict[str, Any]:
  """Evaluates a checkpoint, or does what is left of it; returns what it writes to results.json.

  Args:
    config: of `complete_config`. step: see `model_files.find_step`.
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
        _draw(components, params, benchmark, mode, workdir, progress)
  if process_index() != 0:
    return {}
  found = summarize(config, workdir, identity, benchmarks)
  dump_json_atomic(workdir / "results.json", found)
  write_text_atomic(workdir / "results.md", write_up(found))
  (workdir / "results.png").write_bytes(evaluation_plots.draw_results(found))
  return found


def log_path(workdir: Path, benchmark: str, mode: str) -> Path:
  return Path(workdir) / "completions" / f"{benchmark}.{mode}.jsonl"


def read_completions(workdir: Path, benchmark: str, mode: str) -> Completions | None:
  """Of a finished evaluation; None where there are none of that mode."""
  lines = read_lines(log_path(workdir, benchmark, mode))
  return completions_of(lines) if lines else None


def summarize(
  config: ExperimentConfig, workdir: Path, identity: dict[str, Any], benchmarks: Sequence[Benchmark]
) -> dict[str, Any]:
  """`results.json`, from the completions in the workdir."""
  wanted, drawn = config.evaluation, {}
  for benchmark in benchmarks:
    drawn[benchmark.name] = tuple(read_completions(workdir, benchmark.name, mode) for mode in ("sampled", "greedy"))
  measures = {
    benchmark.name: (benchmark.group, estimates(*drawn[benchmark.name], benchmark.settings.k))
    for benchmark in benchmarks
  }
  bootstrap = {"level": wanted.level, "resamples": wanted.resamples, "seed": config.seed}
  found = summary.summarize(measures, **bootstrap)
  return {
    "checkpoint": identity,
    "bootstrap": bootstrap,
    "benchmarks": {
      benchmark.name: {
        "group": benchmark.group,
        "sampling": _describe(benchmark),
        **describe(*drawn[benchmark.name]),
        "measures": found["benchmarks"][benchmark.name],
      }
      for benchmark in benchmarks
    },
    "groups": found["groups"],
  }


def _describe(benchmark: Benchmark) -> str:
  options = benchmark.options["sampled"]
  cut = "".join(
    f", {name} {value:g}"
    for name, value, off in (("top-k", options.top_k, 0), ("top-p", options.top_p, 1))
    if value != off
  )
  return f"T = {options.temperature:g}{cut}, up to {options.max_new_tokens} tokens"


def _claim(workdir: Path, config: ExperimentConfig, identity: dict[str, Any], benchmarks: Sequence[Benchmark]) -> None:
  """Makes the workdir that of this evaluation, or refuses."""
  settings = plain_config(config)
  problems = {
    benchmark.name: digest((example.prompt, example.gold) for example in benchmark.examples) for benchmark in benchmarks
  }
  of_benchmarks = [
    f"config.evaluation.benchmarks.{name}.{key}"
    for name in config.evaluation.benchmarks
    for key in FREE_KEYS_OF_BENCHMARKS
  ]
  claim = {"checkpoint": identity, "problems": problems, "config": {key: settings[key] for key in CLAIMED}}
  claim_workdir(workdir, claim, (*FREE_KEYS, *of_benchmarks))


def _draw(
  components: Components, params: Params, benchmark: Benchmark, mode: str, workdir: Path, progress: Progress
) -> None:
  """Draws the completions of a benchmark that are not in its file yet."""
  log = CompletionLog(
    log_path(workdir, benchmark.name, mode),
    benchmark.name,
    benchmark.examples,
    samples=benchmark.options[mode].samples_per_prompt,
    batch_problems=benchmark.batch_problems,
  )
  # Where several processes draw together, the first one's file counts.
  log.done = int(multihost_utils.broadcast_one_to_all(np.int32(log.done)))
  total, right, seen = len(benchmark.examples), 0, 0
  progress.start(f"{benchmark.name}, {mode}", total, log.done)
  for batch in run(components, params, benchmark, mode, first=log.done):
    log.append(batch)
    right, seen = right + int(batch.scores.success.sum()), seen + len(batch.texts)
    progress.update(log.done, {"reward/success": right / seen})


def main() -> None:
  given = flags.FLAGS
  checkpoint, workdir = given.checkpoint, Path(given.workdir)
  config = complete_config(given.config, checkpoint)
  runtime.start(config.runtime)
  with Progress() as progress:
    found = evaluate(config, checkpoint, workdir, progress, step=given.step)
    if found:
      progress.table(str(checkpoint), *table_rows(found))
      progress.print(note(found))
      progress.print(f"Results: {workdir / 'results.md'}, {workdir / 'results.png'}")


if __name__ == "__main__":
  flags.DEFINE_string("checkpoint", None, "A Hugging Face folder, one of experiments.convert, or a run's workdir.")
  flags.DEFINE_string("step", "newest", "Of a run's checkpoints: newest, best (by held-out success) or a number.")
  flags.mark_flag_as_required("checkpoint")
  run_app(main, "Folder for completions and results. The same folder continues an evaluation.")
