"""The figures of a training run, small multiples of its metrics (`panels.PANELS`)."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps, ticker
from matplotlib.axes import Axes

from experiments.reporting.figures import ORANGE, add_legend, new_figure, style_axes, to_png
from experiments.reporting.panels import PANELS, Curve, Panel

_SHADES = colormaps["cividis"]
_FINE = (1, 1.5, 2, 3, 4, 5, 6, 8)  # ticks of a log axis that spans less than a decade


def draw(rows: Sequence[Mapping[str, Any]]) -> dict[str, bytes]:
  """Draws every panel whose metrics were measured.

  Args:
    rows: as from `rspo_jax.run.metrics.read_metrics`. Values that are not finite, or not positive on a log axis, are
      left out; the figure shows their number.
  Returns:
    Name of the panel -> PNG.
  """
  figures = {panel.name: _draw_panel(panel, rows) for panel in PANELS}
  return {name: figure for name, figure in figures.items() if figure is not None}


def smooth(values: np.ndarray, width: int) -> np.ndarray:
  """Centred moving mean [N] over `width` values, fewer at the ends; NaN is ignored, a window of NaN only gives NaN."""
  finite = np.isfinite(values)
  window = np.ones(width)
  total = np.convolve(np.where(finite, values, 0.0), window, "full")
  count = np.convolve(finite.astype(float), window, "full")
  start = (width - 1) // 2
  total, count = total[start : start + len(values)], count[start : start + len(values)]
  return np.where(count > 0, total / np.where(count > 0, count, 1), np.nan)


def _series(rows: Sequence[Mapping[str, Any]], phase: str, metric: str) -> tuple[np.ndarray, np.ndarray]:
  """Steps [N] and values [N, W] of a metric, W = 1 for a scalar; rows of another width than the first are left out."""
  points = [(row["step"], np.atleast_1d(row[metric])) for row in rows if row["phase"] == phase and metric in row]
  points = [(step, value) for step, value in points if len(value) == len(points[0][1])]
  if not points:
    return np.zeros(0), np.zeros((0, 1))
  return np.array([step for step, _ in points]), np.stack([value for _, value in points]).astype(float)


def _draw_panel(panel: Panel, rows: Sequence[Mapping[str, Any]]) -> bytes | None:
  figure = new_figure(4.6, 3.0, dpi=110)
  axes = figure.add_axes((0.155, 0.155, 0.81, 0.66))  # fixed, so that all figures have their axes at the same position
  drawn, left_out = 0, 0
  for curve in panel.curves:
    steps, values = _series(rows, panel.phase, curve.metric)
    invalid = ~np.isfinite(values) | ((values <= 0) & panel.log)
    values = np.where(invalid, np.nan, values)
    left_out += int(invalid.sum())
    if not np.isfinite(values).any():
      continue
    drawn += 1
    for column, (label, color) in enumerate(_lines(curve, values.shape[1])):
      _draw_line(axes, steps, values[:, column], label, color, marker=curve.marker, log=panel.log)
  if not drawn:
    return None
  last_step = max(row["step"] for row in rows if row["phase"] == panel.phase)
  _finish_axes(axes, panel, last_step)
  if left_out:
    _note_left_out(axes, left_out, log=panel.log)
  return to_png(figure)


def _lines(curve: Curve, count: int) -> list[tuple[str, Any]]:
  """Label and colour of each line of a curve; those of a vector go from dark to light, first element to last."""
  if count == 1:
    return [(curve.label, curve.color)]
  shades = np.linspace(0.0, 0.85, count)
  named = {0, count // 2, count - 1} if count > 6 else set(range(count))
  return [(f"{curve.label} {i + 1}" if i in named else "_", _SHADES(shade)) for i, shade in enumerate(shades)]


def _draw_line(axes: Axes, steps, values, label: str, color, *, marker: str, log: bool) -> None:
  if marker:
    axes.plot(steps, values, marker=marker, color=color, label=label, linewidth=0.8, markersize=5, zorder=3)
    return
  width = max(1, len(steps) // 10)
  if width < 3:
    axes.plot(steps, values, color=color, label=label, linewidth=1.5, marker="o" if len(steps) < 3 else None)
    return
  axes.plot(steps, values, color=color, linewidth=0.6, alpha=0.35)
  line = np.exp(smooth(np.log(values), width)) if log else smooth(values, width)
  axes.plot(steps, line, color=color, label=label, linewidth=1.8)


def _finish_axes(axes: Axes, panel: Panel, last_step: int) -> None:
  axes.set_title(panel.title, loc="left", fontsize=11, fontweight="bold", pad=20)
  add_legend(axes, columns=9, handle_length=1.1)
  axes.set_xlabel("warm-start step" if panel.phase == "warm_start" else "RL step", fontsize=9)
  axes.set_ylabel(panel.unit, fontsize=9)
  style_axes(axes, grid="y", label_size=8)
  # The same range in every panel of a phase, so that the figures of a column can be compared.
  axes.set_xlim(-0.02 * max(last_step, 1), 1.02 * max(last_step, 1))
  axes.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=True))
  if panel.log:
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    wide = high / low > 10
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1,) if high / low > 1e4 else (1, 2, 5) if wide else _FINE))
    axes.yaxis.set_minor_locator(ticker.NullLocator())
  else:
    _set_bounds(axes, *panel.bounds)
  low, high = axes.get_ylim()
  zero = 0.0 if panel.log else 1e-9 * (high - low)  # the locator may return 1e-17 for 0
  axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda y, _: _tick(0.0 if abs(y) < zero else y)))


def _note_left_out(axes: Axes, count: int, *, log: bool) -> None:
  axes.annotate(
    f"{count} values left out: not finite{' or not positive' if log else ''}",
    (1, 0), xytext=(0, 3), xycoords="axes fraction", textcoords="offset points",
    ha="right", va="bottom", fontsize=7, color=ORANGE,
  )  # fmt: skip


def _tick(value: float) -> str:
  """The label of a tick, short enough for the left margin: 200k for 200,000."""
  return f"{value / 1000:,.10g}k" if abs(value) >= 10_000 else f"{value:,.10g}"


def _set_bounds(axes: Axes, lower: float | None, upper: float | None) -> None:
  low, high = axes.dataLim.intervaly
  low = low if lower is None else min(low, lower)
  high = high if upper is None else max(high, upper)
  if high - low < 1e-9 * max(abs(low), abs(high), 1e-3):  # constant data: widen the range
    low, high = (low, low + 1) if lower is not None else (low - 0.5, high + (upper is None) * 0.5)
  margin = 0.04 * (high - low)
  axes.set_ylim(low - margin, high + margin)
