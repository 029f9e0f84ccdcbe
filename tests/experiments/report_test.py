"""The report shows the recorded metrics, escapes text, and is written for incomplete runs too."""

import dataclasses
import io
import json
import math
import re

import jax
import matplotlib
import numpy as np
import pytest
from rich.console import Console

from experiments.config import (
  DataConfig,
  EvaluationConfig,
  ExperimentConfig,
  Named,
  WarmStartConfig,
)
from experiments.reporting import plots
from experiments.reporting.answers import write_answers
from experiments.reporting.page import write_report
from experiments.reporting.panels import PANELS
from experiments.reporting.progress import Progress
from experiments.reporting.summary import summarize
from experiments.reporting.summary_text import print_summary
from experiments.setup.config_flags import plain_config
from models.config import tiny_moe
from rspo_jax.data.examples import Example
from rspo_jax.evaluation.completion_log import Completions
from rspo_jax.rewards.base import Scores
from rspo_jax.rollout import SamplingOptions
from rspo_jax.rollout.collector import CollectorOptions
from rspo_jax.router import ShiftOptions
from rspo_jax.run.metrics import METRICS, MetricsWriter
from rspo_jax.run.workdir import dump_json_atomic

MODEL = tiny_moe(
  8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, head_dim=8,
  num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8,
)  # fmt: skip
CONFIG = ExperimentConfig(
  seed=3,
  model=MODEL,
  data=DataConfig(options={"numbers": 3}),
  warm_start=WarmStartConfig(steps=4, wrong_fraction=0.25),
  steps=20,
  collector=CollectorOptions(prompts=8),
  sampling=SamplingOptions(16, samples_per_prompt=4),
  evaluation=EvaluationConfig(problems=2, samples=2),
)
BEFORE = {"eval/success": 0.25, "eval/greedy_success": 0.5, "eval/format": 0.75}
AFTER = {"eval/success": 0.625, "eval/greedy_success": 0.75, "eval/format": 1.0}
EXAMPLES = [Example(f"{i} 2 3={i + 5}:", None) for i in range(5)]


def rl_row(step):
  """All metrics of an RL step without evaluation, with values that change from step to step."""
  skip = ("eval/", "loss/warm_start", "shift/layer_drift")
  values = {name: 0.1 + 0.01 * step for name in METRICS if not name.startswith(skip)}
  return values | {"shift/layer_drift": [0.01, 0.02, 0.03 + 0.001 * step], "updates/skipped": 0}


def make_run(workdir, *, rl_rows=None, before=BEFORE, after=AFTER, config=CONFIG):
  workdir.mkdir(exist_ok=True)
  dump_json_atomic(workdir / "config.json", plain_config(config))
  rl_rows = [rl_row(step) for step in range(1, 21)] if rl_rows is None else rl_rows
  with MetricsWriter(workdir) as writer:
    for step in range(1, 5):
      writer.write("warm_start", step, {"loss/warm_start": 1.0 / step})
    if before:
      writer.write("rl", 0, before)
    for step, values in enumerate(rl_rows, start=1):
      writer.write("rl", step, values)
    if after:
      writer.write("rl", len(rl_rows), after)
  return workdir


def completions(texts, success, samples=2):
  success = np.array(success, bool)
  scores = Scores(np.where(success, 1.0, 0.1).astype(np.float32), success, np.ones(len(success), bool))
  return Completions(tuple(texts), np.full(len(texts), 3), scores, samples)


def summary_of(workdir, config=CONFIG):
  return summarize(workdir, config, {"warm_start": 2.0, "rl": 3.5}, 5)


@pytest.fixture
def no_figures(monkeypatch):
  """Skips drawing, which takes most of the time, in tests of the text."""
  monkeypatch.setattr(plots, "draw", lambda rows: {})


def html_of(workdir, config=CONFIG):
  write_report(workdir, summary_of(workdir, config))
  return (workdir / "report.html").read_text(encoding="utf-8")


def test_answers_are_one_line_per_evaluated_problem(tmp_path):
  texts = ["1+2", "line\u2028separator\n", "", "4"]
  write_answers(tmp_path / "a.jsonl", [(EXAMPLES, completions(texts, [True, False, False, True]))])
  lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]
  assert [line["prompt"] for line in lines] == [example.prompt for example in EXAMPLES[:2]]
  assert [line["answers"] for line in lines] == [texts[:2], texts[2:]]
  assert [line["success"] for line in lines] == [[True, False], [False, True]]
  assert [line["reward"] for line in lines] == [[1.0, 0.1], [0.1, 1.0]]


def test_only_process_zero_writes(tmp_path, monkeypatch):
  make_run(tmp_path)
  summary = summary_of(tmp_path)
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  write_answers(tmp_path / "a.jsonl", [(EXAMPLES, completions("ab", [True, False]))])
  write_report(tmp_path, summary)
  assert not {"a.jsonl", "report.html", "plots"} & {path.name for path in tmp_path.iterdir()}


def test_summary_holds_the_numbers_of_the_rows(tmp_path):
  rows = [rl_row(step) for step in range(1, 21)]
  rows[9] |= {
    "eval/success": 0.5,
    "eval/greedy_success": 0.5,
    "eval/format": 0.5,
  }  # during RL: neither before nor after
  summary = summary_of(make_run(tmp_path, rl_rows=rows))
  for side, step, row in (("before", 0, BEFORE), ("after", 20, AFTER)):
    assert summary[side]["step"] == step
    assert [summary[side][key] for key in ("success", "greedy_success", "format")] == list(row.values())
  assert summary["gain"] == 0.375
  held_out = {"distinct_problems": 2, "samples_per_problem": 2, "temperature": 1.0, "in_data_set": 5}
  assert summary["held_out"] == held_out
  assert summary["warm_start"] == {"steps": 4, "of": 4, "wrong_fraction": 0.25}
  assert (summary["rl"]["steps"], summary["rl"]["of"]) == (20, 20)
  assert summary["seconds"] == {"warm_start": 2.0, "rl": 3.5, "total": 5.5}
  assert summary["device"] == {
    "platform": jax.devices()[0].platform, "kind": jax.devices()[0].device_kind, "count": jax.device_count()
  }  # fmt: skip
  assert summary["versions"]["jax"] == jax.__version__


def test_parameter_count_is_that_of_the_model(tmp_path):
  width, vocabulary, experts, expert_width = 8, 8, 2, 8
  attention = 4 * width * width + 2 * width  # q, k, v, o and the norms of q and k
  layer = attention + width * experts + experts * 3 * width * expert_width + 2 * width
  assert summary_of(make_run(tmp_path))["parameters"] == layer + 2 * vocabulary * width + width


def test_standard_error_is_over_problems_and_needs_the_answers_of_the_same_evaluation(tmp_path):
  make_run(tmp_path)
  four = completions("abcdefgh", [True, True, True, False, True, False, False, False])  # 1, 1/2, 1/2, 0
  write_answers(tmp_path / "answers_after.jsonl", [(EXAMPLES, four)])
  assert summary_of(tmp_path)["after"]["success_standard_error"] is None  # mean 0.5, not 0.625
  make_run(tmp_path, rl_rows=[], after=None)
  with MetricsWriter(tmp_path) as writer:
    writer.write("rl", 21, AFTER | {"eval/success": 0.5})
  error = summary_of(tmp_path)["after"]["success_standard_error"]
  assert error == pytest.approx(math.sqrt((0.25 + 0.25) / 3 / 4))


@pytest.mark.parametrize(
  ("objective", "shift", "name"),
  [
    ("gmpo", True, "RSPO (GMPO + router shift)"),
    ("gmpo", False, "GMPO"),
    ("grpo", True, "GRPO + router shift"),
  ],
)
@pytest.mark.usefixtures("no_figures")
def test_summary_and_page_name_the_objective(tmp_path, objective, shift, name):
  config = dataclasses.replace(CONFIG, objective=Named(objective), shift=ShiftOptions() if shift else None)
  assert summary_of(make_run(tmp_path), config)["objective"] == name
  assert f"<h1>{name} on countdown</h1>" in html_of(tmp_path, config)


@pytest.mark.usefixtures("no_figures")
def test_page_shows_before_and_after_and_discloses_incorrect_demonstrations(tmp_path):
  html = html_of(make_run(tmp_path))
  assert "0.250 <i>→</i> 0.625" in html
  assert "change +0.375 (2.5x)" in html
  assert "25% a demonstration was deliberately wrong" in html
  assert "no evaluation after RL" not in html
  honest = dataclasses.replace(CONFIG, warm_start=WarmStartConfig(steps=4))
  assert "deliberately wrong" not in html_of(tmp_path, honest)


def test_printed_table_shows_before_after_and_the_path_of_the_report(tmp_path):
  make_run(tmp_path)
  out = io.StringIO()
  with Progress(console=Console(file=out, width=200)) as progress:
    print_summary(progress, summary_of(tmp_path), tmp_path)
  text = out.getvalue()
  assert re.search(r"success at T=1 +0\.250 +0\.625 +\+0\.375 \(2\.5x\)\n", text)
  assert "2 held-out problems, 2 samples each" in text
  assert "25% a demonstration was deliberately wrong" in text
  assert str(tmp_path / "report.html") in text


@pytest.mark.parametrize(
  ("rl_steps", "rows", "reason"),
  [(0, 0, "the config asks for no RL steps"), (20, 7, "the run has not reached it yet")],
)
@pytest.mark.usefixtures("no_figures")
def test_run_without_an_evaluation_after_rl_is_reported_as_such(tmp_path, rl_steps, rows, reason):
  config = dataclasses.replace(CONFIG, steps=rl_steps)
  make_run(tmp_path, rl_rows=[rl_row(step) for step in range(rows)], after=None)
  summary = summary_of(tmp_path, config)
  assert (summary["after"], summary["gain"], summary["rl"]["steps"]) == (None, None, rows)
  html = html_of(tmp_path, config)
  assert reason in html
  assert "0.250 <i>→</i> -" in html
  with Progress(console=Console(file=io.StringIO())) as progress:
    print_summary(progress, summary, tmp_path)


@pytest.mark.usefixtures("no_figures")
def test_evaluation_during_rl_is_labelled_with_its_step(tmp_path):
  rows = [rl_row(step) for step in range(1, 11)]
  html = html_of(make_run(tmp_path, rl_rows=rows))
  assert '"after" is RL step 10 of 20' in html


@pytest.mark.usefixtures("no_figures")
def test_text_of_model_data_and_config_is_escaped(tmp_path):
  evil = "<script>alert('x')</script>"
  config = dataclasses.replace(CONFIG, data=DataConfig(name=evil, options={evil: evil}))
  make_run(tmp_path, config=config)
  examples = [Example(f"{evil}{i}", None) for i in range(2)]
  for which in ("before", "after"):
    write_answers(tmp_path / f"answers_{which}.jsonl", [(examples, completions([evil] * 4, [True] * 4))])
  html = html_of(tmp_path, config)
  assert "<script" not in html
  # title and heading; 2 prompts; one merged answer to each, before and after; 3 times in the config
  assert html.count("&lt;script&gt;alert(") == 2 + 2 + 4 + 3


@pytest.mark.usefixtures("no_figures")
def test_answers_of_the_first_twelve_problems_are_merged_and_marked(tmp_path):
  make_run(tmp_path)
  examples = [Example(f"problem {i}.", None) for i in range(14)]
  texts, success = ["2+2", "2+2", "5", ""] * 14, [True, True, False, False] * 14
  write_answers(tmp_path / "answers_before.jsonl", [(examples, completions(texts, success, samples=4))])
  html = html_of(tmp_path)
  assert html.count("✓ 2+2 ×2</code>") == 12
  assert html.count(">(empty)</code>") == 12
  assert "✓ 5" not in html
  assert html.count("2 of 4 correct") == 12
  assert "problem 11." in html
  assert "problem 12." not in html


def test_page_is_self_contained(tmp_path):
  html = html_of(make_run(tmp_path))
  assert not re.search(r"https?://|<script|<link|@import|url\(", html)
  sources = re.findall(r'src="([^"]{0,30})', html)
  assert len(sources) == len(PANELS)
  assert all(source.startswith("data:image/png;base64,iVBOR") for source in sources)


def test_every_panel_is_also_a_png_file(tmp_path):
  html_of(make_run(tmp_path))
  figures = {path.stem: path.read_bytes() for path in (tmp_path / "plots").iterdir()}
  assert figures.keys() == {panel.name for panel in PANELS}
  assert all(figure.startswith(b"\x89PNG") for figure in figures.values())


def test_panels_draw_documented_metrics():
  assert {curve.metric for panel in PANELS for curve in panel.curves} <= METRICS.keys()


def test_drawing_leaves_the_global_state_of_matplotlib_unchanged():
  before = dict(matplotlib.rcParams), matplotlib.get_backend(auto_select=False)
  plots.draw([{"phase": "rl", "step": 1} | rl_row(1)])
  assert (dict(matplotlib.rcParams), matplotlib.get_backend(auto_select=False)) == before


def test_non_finite_values_are_left_out_and_the_rest_is_drawn():
  rows = [{"phase": "rl", "step": step} | rl_row(step) for step in range(1, 41)]
  clean = plots.draw(rows)
  for row, bad in zip(rows[3:8], (math.nan, math.inf, -math.inf, 0.0, -1.0), strict=True):
    row |= {"ratio/max": bad, "reward/mean": bad, "shift/layer_drift": [bad, bad, bad]}
  for row in rows:
    row["kl/approx"] = math.nan
  drawn = plots.draw(rows)
  assert clean.keys() - drawn.keys() == {"kl"}
  assert {name for name in drawn if drawn[name] != clean[name]} == {"ratio", "reward", "drift"}


def test_non_positive_values_are_left_out_of_a_log_axis():
  def figure(bad):
    rows = [{"phase": "rl", "step": step, "ratio/max": bad if step == 4 else 2.0 + step} for step in range(1, 9)]
    return plots.draw(rows)["ratio"]

  assert figure(0.0) == figure(-1.0) == figure(math.nan)
  assert figure(0.0) != figure(6.0)


def test_unmeasured_metrics_are_named_and_not_drawn(tmp_path):
  rows = [{k: v for k, v in rl_row(step).items() if not k.startswith("shift/")} for step in range(1, 21)]
  html = html_of(make_run(tmp_path, rl_rows=rows))
  assert "Not measured in this run: Router-shift weight gamma, Router drift by layer." in html
  assert not {"gamma.png", "drift.png"} & {path.name for path in (tmp_path / "plots").iterdir()}


@pytest.mark.usefixtures("no_figures")
def test_summary_of_non_finite_metrics_is_json(tmp_path):
  make_run(tmp_path, after=AFTER | {"eval/success": math.nan})
  summary = summary_of(tmp_path)
  dump_json_atomic(tmp_path / "summary.json", summary)
  assert (summary["after"]["success"], summary["gain"]) == (None, None)
  assert "0.250 <i>→</i> -" in html_of(tmp_path)


@pytest.mark.parametrize(
  "text", [None, "", '{"phase": "rl", "step": 0, "time": 1.0, "reward/mean": 0.5}\n{"phase": "r']
)
def test_report_of_a_run_with_few_or_no_metrics_is_written(tmp_path, text):
  if text is not None:
    (tmp_path / "metrics.jsonl").write_text(text)
  html = html_of(tmp_path)
  assert ("Reward over the steps" in html) == bool(text)
  assert summary_of(tmp_path)["before"] is None


def test_extreme_but_finite_values_are_drawn():
  rows = [{"phase": "rl", "step": step} | rl_row(step) for step in range(1, 31)]
  for name in ("ratio/max", "grad/norm", "reward/mean", "kl/approx"):
    rows[5][name], rows[6][name] = 1e30, 1e-30
  assert plots.draw(rows).keys() == {panel.name for panel in PANELS} - {"warm_start"}


def test_smoothing_preserves_a_straight_line_and_skips_nan():
  line = np.arange(20.0)
  for width in (3, 5):
    inner = slice(width // 2, -(width // 2))
    np.testing.assert_allclose(plots.smooth(line, width)[inner], line[inner])
  np.testing.assert_allclose(plots.smooth(np.array([1.0, np.nan, 3.0, 5.0]), 3), [1, 2, 4, 4])
  assert np.isnan(plots.smooth(np.array([np.nan, np.nan, np.nan, np.nan, 1.0]), 3)[:3]).all()


def test_tick_labels_of_large_numbers_are_short():
  assert [plots._tick(value) for value in (0.0, 0.25, 9_999, 50_000, 200_000, 1_250_000)] == [
    "0", "0.25", "9,999", "50k", "200k", "1,250k",
  ]  # fmt: skip
