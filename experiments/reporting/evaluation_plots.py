"""The figures of evaluations: benchmarks with intervals, pass@k over k, differences between runs."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import ticker
from matplotlib.axes import Axes

from experiments.reporting.figures import (
  BLACK,
  BLUE,
  GREEN,
  GREY,
  ORANGE,
  PURPLE,
  SKY,
  add_legend,
  new_figure,
  style_axes,
  to_png,
)
from rspo_jax.evaluation.summary import k_of, measures_by_name

_COLORS = (BLUE, ORANGE, GREEN, PURPLE, SKY, "#E69F00", BLACK)
_LEGEND_COLUMNS = 3
_MARKERS = ("o", "s", "D", "^", "v", "P", "X")
_MAX_BANDS = 6  # with more curves, the bands of their intervals would cover each other

Measures = Mapping[str, Any]  # measure -> {"value", "low", "high"}


def draw_results(results: Mapping[str, Any]) -> bytes:
  """The figure of `results.json`, a PNG: avg@n with intervals, greedy and maj@n; and pass@k over k if there is any."""
  rows = measures_by_name(results)
  benchmarks = len(results["benchmarks"])  # the other rows are groups
  curves = any(
    k_of(measure) > 1
    for benchmark in results["benchmarks"].values()
    for measure in benchmark["measures"]
    if measure.startswith("pass@")
  )
  figure = new_figure(10.4 if curves else 5.6, 1.5 + 0.42 * max(len(rows), 4), dpi=120, layout="constrained")
  axes = figure.subplots(1, 2 if curves else 1, squeeze=False)[0]
  lines = -(-len(rows) // _LEGEND_COLUMNS) if curves else 1  # of the longer legend, so that both titles are level
  _draw_bars(axes[0], rows, benchmarks, lines)
  if curves:
    _draw_curves(axes[1], rows, benchmarks, lines)
  return to_png(figure)


def _draw_bars(axes: Axes, rows: Mapping[str, Measures], benchmarks: int, lines: int) -> None:
  labels = set()
  for index, measures in enumerate(rows.values()):
    average = measures["avg"]
    color = BLUE if index < benchmarks else GREY
    axes.barh(index, 100 * average["value"], height=0.6, color=color, alpha=0.6, linewidth=0, zorder=2)
    if average["low"] is not None:
      ends = [100 * average["low"], 100 * average["high"]]
      axes.plot(ends, [index] * 2, color=BLACK, linewidth=1.5, marker="|", markersize=8, zorder=4)
    majority = max((m for m in measures if m.startswith("maj@")), key=k_of, default=None)
    for measure, label, marker, marker_color, offset in (
      ("greedy", "greedy", "D", ORANGE, -0.12),  # above and below the line, because they are often equal
      (majority, "maj@n", "o", GREEN, 0.12),
    ):
      if measure in measures:
        new_label = label if label not in labels else None
        labels.add(label)
        axes.plot(
          100 * measures[measure]["value"], index + offset, marker, color=marker_color, markersize=6, label=new_label,
          markeredgecolor="white", markeredgewidth=0.8, linestyle="none", zorder=5, clip_on=False,
        )  # fmt: skip
  axes.set_yticks(range(len(rows)), list(rows))
  margin = max(0.0, (3 - len(rows)) / 2)  # a single bar is as thick as one of three
  axes.set_ylim(len(rows) - 0.5 + margin, -0.5 - margin)
  axes.set_xlim(0, None)
  _finish_axes(axes, "avg@n with its interval", "percent correct", "x", lines=lines)
  if labels:
    _add_legend(axes)


def _draw_curves(axes: Axes, rows: Mapping[str, Measures], benchmarks: int, lines: int) -> None:
  largest_k = 1
  for index, (name, measures) in enumerate(rows.items()):
    ks = sorted(k_of(measure) for measure in measures if measure.startswith("pass@"))
    if not ks:
      continue
    largest_k = max(largest_k, *ks)
    is_group = index >= benchmarks
    color, marker = (BLACK, "") if is_group else (_COLORS[index % 6], _MARKERS[index % len(_MARKERS)])
    entries = [measures[f"pass@{k}"] for k in ks]
    values = [100 * entry["value"] for entry in entries]
    width = 2.4 if is_group else 1.5
    style = {"color": color, "marker": marker, "markersize": 4.5, "linewidth": width, "clip_on": False}
    axes.plot(ks, values, label=name, zorder=3, **style)
    if all(entry["low"] is not None for entry in entries) and len(rows) <= _MAX_BANDS:
      low, high = ([100 * entry[end] for entry in entries] for end in ("low", "high"))
      axes.fill_between(ks, low, high, color=color, alpha=0.10, linewidth=0, zorder=1)
  axes.set_xscale("log", base=2)
  axes.set_xlim(1, largest_k)
  axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda k, _: f"{k:g}"))
  axes.xaxis.set_minor_locator(ticker.NullLocator())
  axes.set_ylim(0, None)
  _finish_axes(axes, "pass@k", "k completions", "y", lines=lines)
  axes.set_ylabel("percent with a correct completion", fontsize=9)
  _add_legend(axes)


def draw_differences(names: Sequence[str], runs: Mapping[str, Mapping[str, Measures]], baseline: str) -> bytes:
  """The figure of a comparison, a PNG.

  Args:
    names: benchmarks and groups, in order.
    runs: run -> name -> {"value", "low", "high"} of the difference of avg@n.
    baseline: the run that the others are compared with.
  """
  height = 1.5 + len(names) * (0.22 + 0.2 * len(runs))
  figure = new_figure(7.2, max(2.4, height), dpi=120, layout="constrained")
  axes = figure.subplots()
  axes.axvline(0, color=GREY, linewidth=1, zorder=1)
  for number, (run, differences) in enumerate(runs.items()):
    offset = 0.7 * ((number + 0.5) / len(runs) - 0.5)
    color, marker = _COLORS[number % len(_COLORS)], _MARKERS[number % len(_MARKERS)]
    for index, name in enumerate(names):
      if name not in differences:
        continue
      entry, y = differences[name], index + offset
      if entry["low"] is not None:
        axes.plot([100 * entry["low"], 100 * entry["high"]], [y] * 2, color=color, linewidth=1.8, alpha=0.75, zorder=2)
      axes.plot(100 * entry["value"], y, marker, color=color, markersize=6, zorder=3, linestyle="none")
    axes.plot([], [], marker=marker, color=color, linewidth=1.8, label=run)
  axes.set_yticks(range(len(names)), list(names))
  axes.set_ylim(len(names) - 0.5, -0.5)
  axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f"{x:+g}" if abs(x) > 1e-9 else "0"))
  _finish_axes(axes, f"Change of avg@n from {baseline}", "percentage points, with interval over the same problems", "x")
  _add_legend(axes)
  return to_png(figure)


def _finish_axes(axes: Axes, title: str, unit: str, grid: str, *, lines: int = 1) -> None:
  axes.set_title(title, loc="left", fontsize=11, fontweight="bold", pad=9 + 13 * lines)
  axes.set_xlabel(unit, fontsize=9)
  style_axes(axes, grid=grid, label_size=9)


def _add_legend(axes: Axes) -> None:
  add_legend(axes, columns=_LEGEND_COLUMNS, handle_length=1.3)
