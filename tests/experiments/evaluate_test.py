"""The evaluation of checkpoints as a user runs it, in this process: files, resuming, refusals, comparison."""

import dataclasses
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import ml_dtypes
import numpy as np
import pytest
from rich.console import Console

from experiments import compare, evaluate
from experiments.config import BenchmarkConfig, DataConfig, EvaluationConfig, Named
from experiments.configs import countdown_tiny, evaluate_math
from experiments.reporting.progress import Progress
from experiments.setup import benchmarks, model_files
from experiments.setup.benchmarks import make_benchmarks, programs
from experiments.setup.build import build, optimizers
from experiments.setup.checks import check_divides
from experiments.setup.config_flags import config_dict, plain_config, read_config
from rspo_jax.evaluation.completion_log import read_lines
from rspo_jax.run.checkpoint import Checkpoints
from rspo_jax.run.metrics import MetricsWriter
from rspo_jax.run.workdir import dump_json_atomic
from rspo_jax.training.state import init_state
from tests.support import hf_cases, math_cases, tiny, tokenizer_cases
from tests.support.paths import ROOT

SAMPLES, PROBLEMS, BATCH = 4, 12, 8
OPTIONS = {"numbers": 3, "high": 9, "target_high": 20, "operators": "+-", "train": 64, "test": 32, "seed": 0}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  return tmp_path_factory.mktemp("evaluate")


@pytest.fixture(autouse=True, scope="module")
def programs_are_compiled_once():
  """One set of components for equal configs, so that only the first evaluation compiles."""

  @functools.cache
  def remembered(key):
    return build(configs[key], training=False)

  configs = {}

  def cached(config, *, training):
    key = json.dumps(plain_config(dataclasses.replace(config, evaluation=EvaluationConfig())), sort_keys=True)
    configs.setdefault(key, config)
    return remembered(key)._replace(config=config)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(evaluate, "build", cached)
    yield


def wanted(home, **evaluation_settings):
  """A training config whose evaluation has two benchmarks of one data set."""
  config = read_config(countdown_tiny.get_config())
  data = DataConfig(data_dir=str(home / "data"), options=OPTIONS)
  benchmarks = {
    "easy": BenchmarkConfig(data, Named("countdown")),
    "odd": BenchmarkConfig(data, Named("countdown", {"format_reward": 0.5}), samples=SAMPLES // 2, greedy=False),
  }
  settings = {"benchmarks": benchmarks, "problems": PROBLEMS, "samples": SAMPLES, "batch_problems": BATCH}
  small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
  return config_dict(
    dataclasses.replace(
      config,
      model=dataclasses.replace(tiny.CONFIG, mlp_only_layers=(), **small),
      data=data,
      sampling=dataclasses.replace(config.sampling, max_new_tokens=6),
      evaluation=EvaluationConfig(**settings | {"resamples": 200} | evaluation_settings),
    )
  )


@pytest.fixture(scope="module")
def run_folder(home):
  """The workdir of a run with two checkpoints, the older one the better."""
  config = read_config(wanted(home))
  components = build(config)
  optimizer, _ = optimizers(config)["warm_start"]
  state = init_state(components.policy, optimizer, 0, components.layout)
  folder = home / "run"
  folder.mkdir()
  dump_json_atomic(folder / "config.json", plain_config(config))
  with Checkpoints(folder) as checkpoints:
    for step, success in ((2, 0.5), (3, 0.25)):
      state = state.replace(params=jax.tree.map(lambda leaf: 1.01 * leaf, state.params))
      checkpoints.save(step, state, {"phase": "warm_start", "step": step}, {"eval/success": success})
    checkpoints.wait()
  return folder


def run(given, checkpoint, workdir, step="newest"):
  config = evaluate.complete_config(given, checkpoint)
  with Progress(console=Console(quiet=True)) as progress:
    return evaluate.evaluate(config, checkpoint, workdir, progress, step=step)


@pytest.fixture(scope="module")
def whole(home, run_folder):
  """An evaluation that nothing disturbed."""
  run(wanted(home), run_folder, home / "whole")
  return home / "whole"


def files(workdir):
  return {
    str(path.relative_to(workdir)): path.read_bytes()
    for path in sorted(workdir.rglob("*"))
    if path.is_file() and path.name not in (".lock", "results.png")
  }


def test_an_evaluation_leaves_completions_tables_and_a_picture(whole):
  assert {"results.json", "results.md", "config.json"} < set(files(whole))
  assert (whole / "results.png").read_bytes().startswith(b"\x89PNG")
  lines = read_lines(whole / "completions" / "easy.sampled.jsonl")
  assert [(line["problem"], line["sample"]) for line in lines] == [
    (problem, sample) for problem in range(PROBLEMS) for sample in range(SAMPLES)
  ]
  assert len(read_lines(whole / "completions" / "easy.greedy.jsonl")) == PROBLEMS
  assert len(read_lines(whole / "completions" / "odd.sampled.jsonl")) == PROBLEMS * SAMPLES // 2
  assert not (whole / "completions" / "odd.greedy.jsonl").exists()
  assert all(line["tokens"] == 6 or line["finished"] for line in lines)


def test_the_numbers_are_those_of_the_completions(whole):
  found = json.loads((whole / "results.json").read_text())
  easy, odd = (found["benchmarks"][name] for name in ("easy", "odd"))
  lines = read_lines(whole / "completions" / "easy.sampled.jsonl")
  assert easy["measures"]["avg"]["value"] == pytest.approx(np.mean([line["success"] for line in lines]))
  assert easy["tokens"] == pytest.approx(np.mean([line["tokens"] for line in lines]))
  assert sum(easy["why"].values()) == len(lines)
  assert set(easy["measures"]) == {"avg", "greedy", *(f"{kind}@{k}" for kind in ("pass", "maj") for k in (1, 2, 4))}
  assert set(odd["measures"]) == {"avg", *(f"{kind}@{k}" for kind in ("pass", "maj") for k in (1, 2))}
  (group,) = found["groups"].values()
  assert group["of"] == ["easy", "odd"] and "greedy" not in group and "pass@4" not in group
  average = (easy["measures"]["avg"]["value"] + odd["measures"]["avg"]["value"]) / 2
  assert group["avg"]["value"] == pytest.approx(average)


def test_benchmarks_draw_for_themselves_and_rows_do_not_depend_on_the_batch(whole):
  easy, odd = (read_lines(whole / "completions" / f"{name}.sampled.jsonl") for name in ("easy", "odd"))
  first_two = [line for line in easy if line["sample"] < SAMPLES // 2]
  assert [line["prompt"] for line in first_two] == [line["prompt"] for line in odd]
  assert [line["completion"] for line in first_two] != [line["completion"] for line in odd]


@pytest.mark.parametrize("name", ["easy.sampled", "easy.greedy", "odd.sampled"])
def test_a_killed_evaluation_goes_on_to_the_same_bytes(home, whole, run_folder, tmp_path, name):
  workdir = tmp_path / "killed"
  shutil.copytree(whole, workdir)
  for path in ("results.json", "results.md"):
    (workdir / path).unlink()
  path = workdir / "completions" / f"{name}.jsonl"
  content = path.read_bytes()
  path.write_bytes(content[: int(0.8 * len(content))])  # in the second batch, in the middle of a line
  later = sorted((workdir / "completions").iterdir())
  for other in later[later.index(path) + 1 :]:
    other.unlink()
  run(wanted(home), run_folder, workdir)
  assert files(workdir) == files(whole)


def test_a_finished_evaluation_draws_nothing_and_makes_its_tables_anew(home, whole, run_folder, tmp_path, monkeypatch):
  workdir = tmp_path / "again"
  shutil.copytree(whole, workdir)
  monkeypatch.setattr(benchmarks, "complete_in_batches", lambda *_, first, **__: iter(()))
  found = run(wanted(home, k=(1, 2), level=0.5), run_folder, workdir)
  assert set(found["benchmarks"]["easy"]["measures"]) == {"avg", "greedy", "pass@1", "pass@2", "maj@1", "maj@2"}
  assert "50%" in (workdir / "results.md").read_text()


def test_another_checkpoint_config_or_set_of_problems_is_refused(home, whole, run_folder, tmp_path):
  before = files(whole)
  with pytest.raises(ValueError, match=r"checkpoint\.step: 3 -> 2"):
    run(wanted(home), run_folder, whole, step="best")
  with pytest.raises(ValueError, match=r"config\.evaluation\.temperature: null -> 0\.7"):
    run(wanted(home, temperature=0.7), run_folder, whole)
  with pytest.raises(ValueError, match=r"problems\.easy: "):
    run(wanted(home, problems=PROBLEMS - 1), run_folder, whole)
  moved = tmp_path / "moved"
  shutil.copytree(run_folder, moved)
  run(wanted(home), moved, whole)  # the same parameters elsewhere are the same checkpoint
  after = files(whole)
  assert {name for name in before if before[name] != after[name]} <= {"config.json", "results.json", "results.md"}
  run(wanted(home), run_folder, whole)
  assert files(whole) == before


def test_best_newest_and_numbered_steps_are_found_and_others_refused(run_folder, tmp_path):
  steps = {step: model_files.find_step(run_folder, step) for step in ("newest", "best", "2")}
  assert steps == {"newest": 3, "best": 2, "2": 2}
  kernels = [jax.tree.leaves(model_files.load_model(run_folder, step=step).params)[0] for step in (2, 3)]
  np.testing.assert_allclose(1.01 * kernels[0], kernels[1], rtol=1e-6)
  for step in ("7", "first", "-1"):
    with pytest.raises(ValueError, match=f"--step is {step}.*or one of 2, 3"):
      model_files.find_step(run_folder, step)
  converted = tmp_path / "converted"
  model_files.save_orbax(converted, model_files.load_model(run_folder))
  assert model_files.find_step(converted, "newest") is None
  with pytest.raises(ValueError, match="no run and has no steps"):
    model_files.find_step(converted, "best")


def test_what_the_config_does_not_say_of_model_and_tokenizer_the_checkpoint_does(home, run_folder, tmp_path):
  given = wanted(home)
  del given.model
  given.model = {"dtype": "bfloat16"}
  config = evaluate.complete_config(given, run_folder)
  assert config.model == dataclasses.replace(read_config(wanted(home)).model, dtype="bfloat16")
  public = hf_cases.public_config("qwen3_moe", vocab_size=336)
  folder = hf_cases.write_checkpoint(tmp_path / "hf", public, {})
  tokenizer_cases.write_checkpoint(folder, {})
  config = evaluate.complete_config(evaluate_math.get_config(), folder)
  assert config.tokenizer == str(folder) and config.model == model_files.read_model(folder)
  assert list(config.evaluation.benchmarks) == ["aime24", "amc23", "math500", "minerva", "olympiadbench"]


def test_mistakes_are_told_before_anything_is_drawn(home, run_folder, tmp_path):
  def complaint(given, checkpoint=run_folder):
    with pytest.raises(ValueError, match="config") as caught:
      run(given, checkpoint, tmp_path / "never")
    assert not (tmp_path / "never").exists()
    return str(caught.value)

  def changed(key, value):
    given = wanted(home)
    *groups, last = key.split(".")
    node = given
    for group in groups:
      node = node[group]
    with given.unlocked(), given.ignore_type():
      node[last] = value
    return given

  easy = "evaluation.benchmarks.easy"
  assert "config.evaluation.benchmarks.easy.data.name is 'nowhere'" in complaint(
    changed(f"{easy}.data.name", "nowhere")
  )
  assert "config.evaluation.benchmarks.easy.reward.name is 'luck'" in complaint(changed(f"{easy}.reward.name", "luck"))
  assert "k is (1, 8) with 4 samples per problem" in complaint(changed(f"{easy}.k", (1, 8)))
  assert "config.evaluation.k is (5,) with 4 samples" in complaint(changed("evaluation.k", (5,)))
  assert "did you mean config.evaluation.benchmarks.easy.samples" in complaint(changed(f"{easy}.sample", 3))
  with pytest.raises(ValueError, match="easy.batch_problems is 12, which does not divide over the 8 batch shards"):
    check_divides(read_config(changed(f"{easy}.batch_problems", 12)), 8, training=False)
  assert "benchmark's name is part of file names" in complaint(changed("evaluation.benchmarks", {"a/b": {}}))
  assert "config.evaluation.benchmarks.easy cannot be created" in complaint(
    changed(f"{easy}.data.options", OPTIONS | {"numbers": 99})
  )
  assert "config.model.num_experts is 8, there 4" in complaint(changed("model.num_experts", 8))
  assert "has 257 tokens, but the model" in complaint(changed("tokenizer", "bytes"))
  assert "config.json is absent" in complaint(wanted(home), tmp_path / "nothing")
  with pytest.raises(ValueError, match="there is no benchmark aime25; there are aime24"):
    evaluate_math.get_config("aime25")


def test_a_second_evaluation_in_the_same_workdir_has_to_wait(home, whole, run_folder, monkeypatch):
  def busy(workdir):
    raise ValueError(f"another process is writing to {workdir}")

  monkeypatch.setattr(evaluate, "lock_workdir", busy)
  with pytest.raises(ValueError, match="another process is writing"):
    run(wanted(home), run_folder, whole)


def test_programs_are_shared_by_benchmarks_of_one_shape(home, run_folder):
  config = evaluate.complete_config(wanted(home), run_folder)
  components = evaluate.build(config, training=False)
  benchmarks = make_benchmarks(components)
  listed = programs(components, benchmarks)
  assert len(listed) == 3 and [users for _, users in listed] == [["easy"], ["easy"], ["odd"]]
  assert "at T = 1" in listed[0][0].name and "greedily" in listed[1][0].name
  assert {benchmark.prompt_length for benchmark in benchmarks} == {16}  # a power of two
  assert benchmarks[0].batch_problems == BATCH


def test_in_training_benchmarks_have_metrics_of_their_own_and_success_is_their_mean(home, run_folder, tmp_path):
  config = evaluate.complete_config(wanted(home), run_folder)
  components = evaluate.build(config, training=False)
  params = model_files.load_model(run_folder, components.layout).params
  metrics, sampled = benchmarks.evaluate(components, params, make_benchmarks(components))
  assert metrics["eval/success"] == pytest.approx((metrics["eval/easy/avg"] + metrics["eval/odd/avg"]) / 2)
  assert metrics["eval/greedy_success"] == metrics["eval/easy/greedy"]
  assert [piece.samples for piece in sampled] == [SAMPLES, SAMPLES // 2]
  with MetricsWriter(tmp_path) as writer:
    assert writer.write("rl", 1, metrics) == pytest.approx(metrics)
    with pytest.raises(ValueError, match="unknown metric eval/easy/best"):
      writer.write("rl", 2, {"eval/easy/best": 1.0})


def test_an_evaluation_is_compared_with_itself_and_only_on_shared_problems(home, whole, run_folder, tmp_path):
  other = tmp_path / "other"
  shutil.copytree(whole, other)
  path = other / "completions" / "easy.sampled.jsonl"
  lines = path.read_text().splitlines(keepends=True)
  flipped = [
    json.dumps(json.loads(line) | {"success": True}) + "\n"
    if line.startswith('{"benchmark": "easy", "problem": 3,')
    else line
    for line in lines[: 10 * SAMPLES + 1]  # ten problems, and one completion of the eleventh
  ]
  path.write_text("".join(flipped))
  found = compare.compare(whole, other, resamples=200)
  easy, odd = (found["benchmarks"][name] for name in ("easy", "odd"))
  assert (easy["problems"], easy["left_out"], odd["problems"], odd["left_out"]) == (10, 2, PROBLEMS, 0)
  before = np.mean([json.loads(line)["success"] for line in lines if '"problem": 3,' in line])
  assert easy["difference"]["avg"]["value"] == pytest.approx((1 - before) / 10)
  assert odd["difference"]["avg"] == {"value": 0, "low": 0, "high": 0}
  (group,) = found["groups"].values()
  assert group["avg"]["value"] == pytest.approx((1 - before) / 20)
  compare.run(compare.parse([str(whole), str(other), str(whole), f"--workdir={tmp_path / 'compared'}"]))
  assert "10 (2 left out)" in (tmp_path / "compared" / "compare.md").read_text()
  assert (tmp_path / "compared" / "compare.png").read_bytes().startswith(b"\x89PNG")
  with pytest.raises(ValueError, match=r"results\.json is absent"):
    compare.compare(whole, run_folder)


@pytest.mark.skipif(not (math_cases.DATA / "aime24.jsonl").exists(), reason="../shared/data is absent")
def test_a_hugging_face_folder_is_evaluated_on_real_benchmark_files(tmp_path):
  public = hf_cases.public_config("qwen3_moe", vocab_size=336, torch_dtype="bfloat16", num_hidden_layers=1)
  small = hf_cases.small_config("qwen3_moe", vocab_size=336, num_hidden_layers=1)
  tensors = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in hf_cases.random_tensors(small).items()}
  folder = hf_cases.write_checkpoint(tmp_path / "hf", public, tensors)
  tokenizer_cases.write_checkpoint(folder, tokenizer_cases.config(chat_template=tokenizer_cases.CHATML))
  given = evaluate_math.get_config("aime24,math500")
  given.data.data_dir, given.data.chat = str(math_cases.DATA), True
  given.sampling.rows, given.sampling.max_new_tokens = 0, 3
  given.evaluation.problems, given.evaluation.batch_problems, given.evaluation.greedy = 8, 8, False
  given.evaluation.benchmarks.aime24.samples = given.evaluation.benchmarks.math500.samples = 2
  found = run(given, folder, tmp_path / "out")
  assert {name: of["problems"] for name, of in found["benchmarks"].items()} == {"aime24": 8, "math500": 8}
  line = read_lines(tmp_path / "out" / "completions" / "aime24.sampled.jsonl")[0]
  assert line["prompt"].startswith("<|im_start|>user\nEvery morning Aya") and "\\boxed{}" in line["prompt"]


@pytest.mark.slow
def test_the_command_killed_with_signal_9_continues_to_the_same_bytes(home, run_folder, tmp_path):
  settings = {
    **{f"data.options.{key}": value for key, value in OPTIONS.items()},
    "data.data_dir": home / "data", "sampling.max_new_tokens": 6,
    "evaluation.samples": 4, "evaluation.batch_problems": 2,
    "runtime.cpu_devices": 2,
    **{f"model.{key}": value for key, value in dataclasses.asdict(model_files.read_model(run_folder)).items()
       if isinstance(value, int | float) and not isinstance(value, bool)},
  }  # fmt: skip

  def start(workdir):
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    command = [sys.executable, "-m", "experiments.evaluate", "--config=experiments/configs/countdown_tiny.py"]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    return subprocess.Popen(
      [*command, f"--checkpoint={run_folder}", f"--workdir={workdir}", *flags],
      cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
      text=True,
    )  # fmt: skip

  def finish(workdir):
    process = start(workdir)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output

  assert "avg@n" in finish(tmp_path / "whole")
  killed = tmp_path / "killed"
  for batches in (1, 5):
    process = start(killed)
    log = killed / "completions" / "countdown.sampled.jsonl"
    end = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < end:
      if log.exists() and log.read_bytes().count(b"\n") >= batches * 8:
        break
      time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
  finish(killed)
  assert files(killed) == files(tmp_path / "whole")
