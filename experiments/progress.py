"""F4: what a run shows while it works: one live line on a terminal, a plain line now and then elsewhere."""

import collections
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

_log = logging.getLogger(__name__)
_RECENT_STEPS = 20


class Progress:
  """Live progress of one phase after another. Only process 0 shows anything, and no failure in here stops a run.

      with Progress() as progress:
        progress.start("rl", total=100, done=restored_step)
        for step in ...:
          progress.update(step, row)

  Args:
    every: seconds between plain lines where stdout is no terminal.
    console: where to write; the default is stdout.
  """

  def __init__(self, *, every: float = 5.0, console: Console | None = None):
    self._shows = jax.process_index() == 0
    self._console = console or Console(file=sys.stdout)
    self._every = every
    self._live: Live | None = None
    self._began = time.monotonic()
    self._phase, self._total, self._step = "", 0, 0
    self._values: dict[str, Any] = {}
    self._ends: collections.deque[tuple[int, float]] = collections.deque(maxlen=_RECENT_STEPS + 1)
    self._last_line = -float("inf")

  def __enter__(self) -> "Progress":
    if self._shows and self._console.is_terminal:
      try:
        self._live = Live(
          console=self._console, get_renderable=self._render, refresh_per_second=4, transient=False
        )
        self._live.start()
      except Exception:
        self._give_up()
    return self

  def __exit__(self, *_: object) -> None:
    if self._live is not None:
      try:
        self._live.stop()
      except Exception:
        _log.warning("progress display failed", exc_info=True)
      self._live = None

  def start(self, phase: str, total: int, done: int = 0) -> None:
    """Begins a phase of `total` steps, `done` of them in an earlier start of the run."""
    self._phase, self._total, self._step, self._values = phase, total, done, {}
    self._began = time.monotonic()
    self._ends.clear()
    self._ends.append((done, self._began))
    self._last_line = -float("inf")

  def update(self, step: int, values: Mapping[str, Any]) -> None:
    """`step` steps of the phase are done; `values` are metrics (`rspo_jax.metrics.METRICS` names) to show from."""
    if not self._shows:
      return
    try:
      now = time.monotonic()
      self._step = step
      self._values.update(values)
      self._ends.append((step, now))
      if self._live is None and (now - self._last_line >= self._every or step >= self._total):
        self._last_line = now
        self._console.print(Text("  ".join([f"{self._phase} {step}/{self._total}", *self._facts()])))
    except Exception:
      self._give_up()

  def print(self, text: str) -> None:
    """A line that stays, above the live one."""
    if self._shows:
      self._console.print(Text(text))

  def _give_up(self) -> None:
    _log.warning("progress display failed; the run goes on without it", exc_info=True)
    self._shows = False
    self.__exit__()

  def _remaining(self) -> float | None:
    """Seconds left by the pace of the recent steps, None before the first."""
    (first, start), (last, end) = self._ends[0], self._ends[-1]
    if last <= first:
      return None
    return (end - start) / (last - first) * max(self._total - last, 0)

  def _facts(self) -> list[str]:
    facts = []
    for label, name, form in (
      ("loss", "loss/warm_start", "{:.3f}"),
      ("reward", "reward/mean", "{:.3f}"),
      ("success", "reward/success", "{:.3f}"),
      ("held-out", "eval/success", "{:.3f}"),
    ):
      if isinstance(self._values.get(name), int | float):
        facts.append(f"{label} {form.format(self._values[name])}")
    for name in ("speed/sample_tokens_per_second", "speed/train_tokens_per_second"):
      if isinstance(self._values.get(name), int | float):
        facts.append(f"{self._values[name]:,.0f} tok/s")
        break
    facts.append(f"elapsed {_clock(time.monotonic() - self._began)}")
    left = self._remaining()
    if left is not None:
      facts.append(f"left {_clock(left)}")
    return facts

  def _render(self) -> Table | Text:
    if not self._phase:
      return Text("")
    grid = Table.grid(padding=(0, 2))
    bar = ProgressBar(total=max(self._total, 1), completed=self._step, width=20)
    grid.add_row(
      Text(self._phase, style="bold cyan"),
      bar,
      f"{self._step}/{self._total}",
      *(Text(f) for f in self._facts()),
    )
    return grid


def table(
  title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], *, console: Console | None = None
) -> None:
  """Prints a table (process 0 only): drawn on a terminal, aligned text elsewhere. Cells are shown by `str`."""
  if jax.process_index() != 0:
    return
  console = console or Console(file=sys.stdout)
  cells = [[str(cell) for cell in row] for row in rows]
  if console.is_terminal:
    drawn = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
      drawn.add_column(column, justify="left" if index == 0 else "right")
    for row in cells:
      drawn.add_row(*(Text(cell) for cell in row))
    console.print(drawn)
    return
  widths = [max(len(line[i]) for line in [list(columns), *cells]) for i in range(len(columns))]
  out = [title]
  for line in [list(columns), *cells]:
    first = line[0].ljust(widths[0])
    out.append(
      "  ".join([first, *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))])
    )
  console.print(Text("\n".join(out)), soft_wrap=True)


def _clock(seconds: float) -> str:
  minutes, seconds = divmod(int(seconds + 0.5), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
