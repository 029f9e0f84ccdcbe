"""The pictures of a run, small multiples drawn from its rows of metrics."""

import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps, ticker
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart by every kind of colour vision; the order keeps lightness apart as well.
BLUE, ORANGE, GREEN, PURPLE, SKY, BLACK = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#222222"
_GREY = "#666666"
_SHADES = colormaps["cividis"]
_FINE = (1, 1.5, 2, 3, 4, 5, 6, 8)  # ticks of a log axis that spans less than a decade


class Curve(NamedTuple):
  """One line: a metric, how it is called, its colour. marker: of what is measured only now and then."""

  metric: str
  label: str
  color: str
  marker: str = ""


class Panel(NamedTuple):
  """One picture. name: of its file. unit: of the y axis. bounds: y limits that are shown whatever the data."""

  name: str
  title: str
  unit: str
  curves: tuple[Curve, ...]
  explanation: str
  phase: str = "rl"
  log: bool = False
  bounds: tuple[float | None, float | None] = (None, None)


PANELS = (
  Panel(
    "success", "Success", "share of completions",
    (
      Curve("reward/success", "training problems", BLUE),
      Curve("eval/success", "held-out, sampled", ORANGE, marker="o"),
      Curve("eval/greedy_success", "held-out, greedy", GREEN, marker="D"),
    ),
    "Completions that solve their problem. The held-out problems are never trained on.", bounds=(0, 1),
  ),
  Panel(
    "reward", "Reward", "mean reward", (Curve("reward/mean", "mean of a step's completions", BLUE),),
    "What training maximises.", bounds=(0, None),
  ),
  Panel(
    "entropy", "Policy entropy", "nats per token", (Curve("policy/entropy", "mean over tokens", BLUE),),
    "Falling slowly is learning; near zero the policy no longer explores.", bounds=(0, None),
  ),
  Panel(
    "ratio", "Importance ratio", "new / old probability (log)",
    (
      Curve("ratio/max", "max", PURPLE), Curve("ratio/p99", "p99", ORANGE),
      Curve("ratio/p50", "median", BLACK), Curve("ratio/p1", "p1", BLUE),
    ),
    "How far the updates of one step moved tokens from the policy that sampled them; 1 is not at all.", log=True,
  ),
  Panel(
    "clip", "Clipped terms, floored tokens", "share",
    (
      Curve("clip/low", "low", BLUE), Curve("clip/high", "high", ORANGE),
      Curve("clip/effective", "no gradient", PURPLE), Curve("shift/floor_fraction", "gamma at floor", GREEN),
    ),
    "Tokens held at a bound, those that lost their gradient to it, those whose routing moved beyond gamma's floor.",
    bounds=(0, None),
  ),
  Panel(
    "gamma", "Router-shift weight gamma", "gamma",
    (Curve("shift/gamma_mean", "mean", BLUE), Curve("shift/gamma_p10", "p10", ORANGE)),
    "Trust in a token after its routing moved; 1 where the router stood still.", bounds=(None, 1),
  ),
  Panel(
    "drift", "Router drift by layer", "unit of the deviation", (Curve("shift/layer_drift", "layer", BLUE),),
    "How the router's view of the old experts changed: by default mean absolute change of log-probability, nats.",
    bounds=(0, None),
  ),
  Panel(
    "overlap", "What is left of the old policy", "share",
    (Curve("router/overlap", "old experts still chosen", BLUE), Curve("ratio/ess", "effective sample size", ORANGE)),
    "1 right after sampling; falls as the updates of one step move router and policy.", bounds=(None, 1),
  ),
  Panel(
    "replay", "What routing explains", "share of squared log-ratio",
    (
      Curve("replay/experts_share", "old experts pinned", BLUE, marker="o"),
      Curve("replay/gates_share", "and their gates", ORANGE, marker="D"),
    ),
    "1: importance ratios come from the router alone; 0: it has no part in them.",
  ),
  Panel(
    "noise", "Gradient noise over signal", "variance / squared norm (log)",
    (
      Curve("noise/all", "all", BLACK, marker="o"), Curve("noise/router", "router", ORANGE, marker="o"),
      Curve("noise/experts", "experts", BLUE, marker="o"), Curve("noise/attention", "attention", GREEN, marker="o"),
      Curve("noise/embedding", "embedding", PURPLE, marker="o"),
    ),
    "Of a minibatch's gradient, from the spread of its pieces; above 1 it is mostly noise.", log=True,
  ),
  Panel(
    "kl", "Divergence from the sampling policy", "nats per token", (Curve("kl/approx", "KL(old, new), k3", BLUE),),
    "How far the updates of one step carry the policy.", bounds=(0, None),
  ),
  Panel(
    "gradient", "Gradient norm", "global norm (log)", (Curve("grad/norm", "before clipping, mean of updates", BLUE),),
    "Spikes tell of instability; a fall to nothing, of groups without signal.", log=True,
  ),
  Panel(
    "length", "Response length", "tokens",
    (Curve("length/mean", "mean", BLUE), Curve("length/max", "longest", SKY)),
    "With the end token.", bounds=(0, None),
  ),
  Panel(
    "rates", "Groups and form", "share",
    (
      Curve("reward/format", "in the asked form", BLUE), Curve("groups/zero_variance", "groups without signal", ORANGE),
      Curve("length/truncated", "cut off at the limit", GREEN),
    ),
    "A group whose completions all earn the same teaches nothing.", bounds=(0, 1),
  ),
  Panel(
    "load", "Expert load", "tokens over mean tokens", (Curve("router/load_max_over_mean", "busiest expert", BLUE),),
    "1 is even; experts / active experts is the worst there can be.", bounds=(1, None),
  ),
  Panel(
    "router_entropy", "Router entropy", "nats", (Curve("router/entropy", "mean over tokens and layers", BLUE),),
    "Falling towards 0: the routers decide ever more sharply.", bounds=(0, None),
  ),
  Panel(
    "dead", "Experts without a token", "share of experts", (Curve("router/dead_fraction", "all layers", BLUE),),
    "Experts that got no token of a minibatch.", bounds=(0, 1),
  ),
  Panel(
    "warm_start", "Warm-start loss", "nats per token", (Curve("loss/warm_start", "cross-entropy", BLUE),),
    "Supervised loss on the demonstrations, before RL.", phase="warm_start", bounds=(0, None),
  ),
  Panel(
    "speed", "Speed", "tokens per second",
    (
      Curve("speed/sample_tokens_per_second", "sampling", BLUE),
      Curve("speed/score_tokens_per_second", "scoring", GREEN),
      Curve("speed/train_tokens_per_second", "training", ORANGE),
    ),
    "The first step compiles.", bounds=(0, None),
  ),
)  # fmt: skip


def draw(rows: Sequence[Mapping[str, Any]]) -> dict[str, bytes]:
  """Draws every panel that has something to show.

  Args:
    rows: as `rspo_jax.run.metrics.read_metrics` gives them. What is not finite, or not positive on a log axis, is left
      out and counted on the picture.
  Returns:
    Name of the panel -> PNG.
  """
  pictures = {panel.name: _draw_panel(panel, rows) for panel in PANELS}
  return {name: picture for name, picture in pictures.items() if picture is not None}


def smooth(values: np.ndarray, width: int) -> np.ndarray:
  """Centred mean over `width` values, fewer at the ends; [N], NaN values are left out (NaN where none is left)."""
  known = np.isfinite(values)
  window = np.ones(width)
  total = np.convolve(np.where(known, values, 0.0), window, "full")
  count = np.convolve(known.astype(float), window, "full")
  start = (width - 1) // 2
  total, count = total[start : start + len(values)], count[start : start + len(values)]
  return np.where(count > 0, total / np.where(count > 0, count, 1), np.nan)


def _series(rows: Sequence[Mapping[str, Any]], phase: str, metric: str) -> tuple[np.ndarray, np.ndarray]:
  """Steps [N] and values [N, W] of a metric, W = 1 for a scalar; rows of another width than the first are left out."""
  found = [(row["step"], np.atleast_1d(row[metric])) for row in rows if row["phase"] == phase and metric in row]
  found = [(step, value) for step, value in found if len(value) == len(found[0][1])]
  if not found:
    return np.zeros(0), np.zeros((0, 1))
  return np.array([step for step, _ in found]), np.stack([value for _, value in found]).astype(float)


def _draw_panel(panel: Panel, rows: Sequence[Mapping[str, Any]]) -> bytes | None:
  figure = Figure(figsize=(4.6, 3.0), dpi=110)
  FigureCanvasAgg(figure)
  axes = figure.add_axes((0.155, 0.155, 0.81, 0.66))  # the same place in every picture
  drawn, left_out = 0, 0
  for curve in panel.curves:
    steps, values = _series(rows, panel.phase, curve.metric)
    bad = ~np.isfinite(values) | ((values <= 0) & panel.log)
    values = np.where(bad, np.nan, values)
    left_out += int(bad.sum())
    if not np.isfinite(values).any():
      continue
    drawn += 1
    for column, (label, color) in enumerate(_lines(curve, values.shape[1])):
      _draw_line(axes, steps, values[:, column], label, color, marker=curve.marker, log=panel.log)
  if not drawn:
    return None
  last_step = max(row["step"] for row in rows if row["phase"] == panel.phase)
  _dress(axes, panel, last_step, left_out)
  file = io.BytesIO()
  figure.savefig(file, format="png", metadata={"Software": None})
  return file.getvalue()


def _lines(curve: Curve, count: int) -> list[tuple[str, Any]]:
  """Label and colour of each line of a curve: a vector's run from dark to light, first to last."""
  if count == 1:
    return [(curve.label, curve.color)]
  shades = np.linspace(0.0, 0.85, count)
  named = {0, count // 2, count - 1} if count > 6 else set(range(count))
  return [(f"{curve.label} {i + 1}" if i in named else "_", _SHADES(shade)) for i, shade in enumerate(shades)]


def _draw_line(axes, steps, values, label, color, *, marker: str, log: bool) -> None:
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


def _dress(axes, panel: Panel, last_step: int, left_out: int) -> None:
  axes.set_title(panel.title, loc="left", fontsize=11, fontweight="bold", pad=20)
  axes.legend(
    loc="lower left", bbox_to_anchor=(-0.015, 0.99), ncols=9, fontsize=8, frameon=False, borderpad=0.1,
    handlelength=1.1, handletextpad=0.4, columnspacing=1.0,
  )  # fmt: skip
  axes.set_xlabel("warm-start step" if panel.phase == "warm_start" else "RL step", fontsize=9)
  axes.set_ylabel(panel.unit, fontsize=9)
  axes.tick_params(labelsize=8, labelcolor=_GREY, color="#BBBBBB")
  axes.spines[["top", "right"]].set_visible(False)
  axes.spines[["left", "bottom"]].set_color("#BBBBBB")
  axes.grid(axis="y", color="#E6E6E6", linewidth=0.8)
  axes.set_axisbelow(True)
  # The same range for every panel of a phase, so that the eye can go down a column.
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
  zero = 0.0 if panel.log else 1e-9 * (high - low)  # a tick at 0 may come as 1e-17
  axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda y, _: _tick(0.0 if abs(y) < zero else y)))
  if left_out:
    axes.annotate(
      f"{left_out} values left out: not finite{' or not positive' if panel.log else ''}",
      (1, 0), xytext=(0, 3), xycoords="axes fraction", textcoords="offset points",
      ha="right", va="bottom", fontsize=7, color=ORANGE,
    )  # fmt: skip


def _tick(value: float) -> str:
  """Short enough for the room that every picture has: 200k for 200,000."""
  return f"{value / 1000:,.10g}k" if abs(value) >= 10_000 else f"{value:,.10g}"


def _set_bounds(axes, wanted_low: float | None, wanted_high: float | None) -> None:
  low, high = axes.dataLim.intervaly
  low = low if wanted_low is None else min(low, wanted_low)
  high = high if wanted_high is None else max(high, wanted_high)
  if high - low < 1e-9 * max(abs(low), abs(high), 1e-3):  # a constant: leave it room
    low, high = (low, low + 1) if wanted_low is not None else (low - 0.5, high + (wanted_high is None) * 0.5)
  margin = 0.04 * (high - low)
  axes.set_ylim(low - margin, high + margin)
