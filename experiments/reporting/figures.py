"""The style that all figures share: colours, axes, legends, PNG encoding."""

import io
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Okabe and Ito's palette, distinguishable with every type of colour vision; the order separates lightness as well.
BLUE, ORANGE, GREEN, PURPLE, SKY, BLACK = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#222222"
GREY = "#666666"


def new_figure(width: float, height: float, *, dpi: int, **options: Any) -> Figure:
  """A figure outside of pyplot, so that matplotlib's global state stays unchanged. width, height: inches."""
  figure = Figure(figsize=(width, height), dpi=dpi, **options)
  FigureCanvasAgg(figure)
  return figure


def style_axes(axes: Axes, *, grid: str, label_size: int) -> None:
  """Light spines and a grid along one axis. grid: "x" or "y". label_size: of the ticks, points."""
  axes.tick_params(labelsize=label_size, labelcolor=GREY, color="#BBBBBB")
  axes.spines[["top", "right"]].set_visible(False)
  axes.spines[["left", "bottom"]].set_color("#BBBBBB")
  axes.grid(axis=grid, color="#E6E6E6", linewidth=0.8)
  axes.set_axisbelow(True)


def add_legend(axes: Axes, *, columns: int, handle_length: float) -> None:
  """A legend without frame above the axes, flush left."""
  axes.legend(
    loc="lower left", bbox_to_anchor=(-0.015, 0.99), ncols=columns, fontsize=8, frameon=False, borderpad=0.1,
    handlelength=handle_length, handletextpad=0.4, columnspacing=1.0,
  )  # fmt: skip


def to_png(figure: Figure) -> bytes:
  """The PNG of a figure; without matplotlib's version in its metadata, so that equal figures are equal bytes."""
  file = io.BytesIO()
  figure.savefig(file, format="png", metadata={"Software": None})
  return file.getvalue()
