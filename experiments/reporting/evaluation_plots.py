"""The pictures of an evaluation: benchmarks with their intervals, curves over k, differences of runs."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.reporting.plots import BLACK, BLUE, GREEN, ORANGE, PURPLE, SKY
from rspo_jax.evaluation.summary import group_name, k_of

_GREY = "#666666"
_COLORS = (BLUE, ORANGE, GREEN, PURPLE, SKY, "#E69F00", BLACK)
_LEGEND_COLUMNS = 3
_MARKERS = ("o", "s", "D", "^", "v", "P", "X")


def draw_results(results: Mapping[str, Any]) -> bytes:
  """The picture of `results.json`, a PNG: avg@n with intervals, greedy and majority beside it; pass@k over k."""
  named = {name: found["measures"] for name, found in results["benchmarks"].items()}
  groups = {group_name(group, found): found for group, found in results["groups"].items()}
  rows = named | groups
  curves = any(k_of(measure) > 1 for found in named.values() for measure in found if measure.startswith("pass@"))
  figure = Figure(figsize=(10.4 if curves else 5.6, 1.5 + 0.42 * max(len(rows), 4)), dpi=120, layout="constrained")
  FigureCanvasAgg(figure)
  axes = figure.subplots(1, 2 if curves else 1, squeeze=False)[0]
  lines = -(-len(rows) // _LEGEND_COLUMNS) if curves else 1  # of the longer legend, so that both titles are level
  _draw_bars(axes[0], rows, len(named), lines)
  if curves:
    _draw_curves(axes[1], rows, set(groups), lines)
  return _png(figure)


def _draw_bars(axes: Axes, rows: Mapping[str, Mapping[str, Any]], benchmarks: int, lines: int) -> None:
  drawn = set()
  for place, found in enumerate(rows.values()):
    average = found["avg"]
    color = BLUE if place < benchmarks else _GREY
    axes.barh(place, 100 * average["value"], height=0.6, color=color, alpha=0.6, linewidth=0, zorder=2)
    if average["low"] is not None:
      ends = [100 * average["low"], 100 * average["high"]]
      axes.plot(ends, [place] * 2, color=BLACK, linewidth=1.5, marker="|", markersize=8, zorder=4)
    majority = max((m for m in found if m.startswith("maj@")), key=k_of, default=None)
    for measure, label, marker, marker_color, height in (
      ("greedy", "greedy", "D", ORANGE, -0.12),  # above and below the line, for they are often equal
      (majority, "maj@n", "o", GREEN, 0.12),
    ):
      if measure in found:
        shown = label if label not in drawn else None
        drawn.add(label)
        axes.plot(
          100 * found[measure]["value"], place + height, marker, color=marker_color, markersize=6, label=shown,
          markeredgecolor="white", markeredgewidth=0.8, linestyle="none", zorder=5, clip_on=False,
        )  # fmt: skip
  axes.set_yticks(range(len(rows)), list(rows))
  beside = max(0.0, (3 - len(rows)) / 2)  # one bar alone is as thick as one of three
  axes.set_ylim(len(rows) - 0.5 + beside, -0.5 - beside)
  axes.set_xlim(0, None)
  _dress(axes, "avg@n with its interval", "percent right", "x", lines=lines)
  if drawn:
    _legend(axes)


def _draw_curves(axes: Axes, rows: Mapping[str, Mapping[str, Any]], groups: set[str], lines: int) -> None:
  most = 1
  for place, (name, found) in enumerate(rows.items()):
    ks = sorted(k_of(measure) for measure in found if measure.startswith("pass@"))
    if not ks:
      continue
    most = max(most, *ks)
    color, marker = (BLACK, "") if name in groups else (_COLORS[place % 6], _MARKERS[place % len(_MARKERS)])
    entries = [found[f"pass@{k}"] for k in ks]
    values = [100 * entry["value"] for entry in entries]
    width = 2.4 if name in groups else 1.5
    look = {"color": color, "marker": marker, "markersize": 4.5, "linewidth": width, "clip_on": False}
    axes.plot(ks, values, label=name, zorder=3, **look)
    if all(entry["low"] is not None for entry in entries) and len(rows) <= 6:
      low, high = ([100 * entry[end] for entry in entries] for end in ("low", "high"))
      axes.fill_between(ks, low, high, color=color, alpha=0.10, linewidth=0, zorder=1)
  axes.set_xscale("log", base=2)
  axes.set_xlim(1, most)
  axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda k, _: f"{k:g}"))
  axes.xaxis.set_minor_locator(ticker.NullLocator())
  axes.set_ylim(0, None)
  _dress(axes, "pass@k", "k completions", "y", lines=lines)
  axes.set_ylabel("percent with a right one", fontsize=9)
  _legend(axes)


def draw_differences(names: Sequence[str], runs: Mapping[str, Mapping[str, Mapping[str, Any]]], baseline: str) -> bytes:
  """The picture of a comparison, a PNG.

  Args:
    names: benchmarks and groups, in order. runs: run -> name -> {"value", "low", "high"} of the difference.
    baseline: what the runs are compared with.
  """
  height = 1.5 + len(names) * (0.22 + 0.2 * len(runs))
  figure = Figure(figsize=(7.2, max(2.4, height)), dpi=120, layout="constrained")
  FigureCanvasAgg(figure)
  axes = figure.subplots()
  axes.axvline(0, color=_GREY, linewidth=1, zorder=1)
  for number, (run, found) in enumerate(runs.items()):
    shift = 0.7 * ((number + 0.5) / len(runs) - 0.5)
    color, marker = _COLORS[number % len(_COLORS)], _MARKERS[number % len(_MARKERS)]
    for place, name in enumerate(names):
      if name not in found:
        continue
      entry, at = found[name], place + shift
      if entry["low"] is not None:
        axes.plot([100 * entry["low"], 100 * entry["high"]], [at] * 2, color=color, linewidth=1.8, alpha=0.75, zorder=2)
      axes.plot(100 * entry["value"], at, marker, color=color, markersize=6, zorder=3, linestyle="none")
    axes.plot([], [], marker=marker, color=color, linewidth=1.8, label=run)
  axes.set_yticks(range(len(names)), list(names))
  axes.set_ylim(len(names) - 0.5, -0.5)
  axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f"{x:+g}" if abs(x) > 1e-9 else "0"))
  _dress(axes, f"Change of avg@n from {baseline}", "percentage points, with interval over the same problems", "x")
  _legend(axes)
  return _png(figure)


def _dress(axes: Axes, title: str, unit: str, grid: str, *, lines: int = 1) -> None:
  axes.set_title(title, loc="left", fontsize=11, fontweight="bold", pad=9 + 13 * lines)
  axes.set_xlabel(unit, fontsize=9)
  axes.tick_params(labelsize=9, labelcolor=_GREY, color="#BBBBBB")
  axes.spines[["top", "right"]].set_visible(False)
  axes.spines[["left", "bottom"]].set_color("#BBBBBB")
  axes.grid(axis=grid, color="#E6E6E6", linewidth=0.8)
  axes.set_axisbelow(True)


def _legend(axes: Axes) -> None:
  axes.legend(
    loc="lower left", bbox_to_anchor=(-0.015, 0.99), ncols=_LEGEND_COLUMNS, fontsize=8, frameon=False, borderpad=0.1,
    handlelength=1.3, handletextpad=0.4, columnspacing=1.0,
  )  # fmt: skip


def _png(figure: Figure) -> bytes:
  file = io.BytesIO()
  figure.savefig(file, format="png", metadata={"Software": None})
  return file.getvalue()
