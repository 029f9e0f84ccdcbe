"""Progress of a run: one live line on a terminal, elsewhere a plain line every few seconds."""

import collections
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

_log = logging.getLogger(__name__)
_BAR_WIDTH = 20
_PACE_STEPS = 20  # the remaining time is estimated from the mean duration of this many steps

# label and metric, in the order shown; metrics without a value are left out
_SHOWN = (
  ("loss", "loss/warm_start"),
  ("reward", "reward/mean"),
  ("success", "reward/success"),
  ("held-out", "eval/success"),
)
_SPEEDS = ("speed/sample_tokens_per_second", "speed/train_tokens_per_second")


class Progress:
  """Live progress, phase by phase. Only process 0 shows it, and an error of the display never stops a run.

      with Progress() as progress:
        progress.start("rl", total=100, done=restored)
        for step in range(restored + 1, 101):
          progress.update(step, writer.write("rl", step, metrics))

  Args:
    every: seconds between plain lines if the output is not a terminal.
    console: where to print; the default is stdout.
    clock: a monotonic clock, seconds.
  """

  def __init__(self, *, every: float = 5.0, console: Console | None = None, clock=time.monotonic):
    self._enabled = jax.process_index() == 0
    self._console = console or _stdout()
    self._every = every
    self._clock = clock
    self._live: Live | None = None
    self._phase, self._total = "", 0
    self._values: dict[str, Any] = {}
    self._started_at = clock()
    self._ends: collections.deque[tuple[int, float]] = collections.deque(maxlen=_PACE_STEPS + 1)
    self._shown_at: float | None = None

  def __enter__(self) -> "Progress":
    if self._enabled and _is_live(self._console):
      try:
        self._live = Live(console=self._console, get_renderable=self._render, refresh_per_second=4)
        self._live.start()
      except Exception:
        self._disable()
    return self

  def __exit__(self, *_: object) -> None:
    live, self._live = self._live, None
    if live is not None:
      try:
        live.stop()
      except Exception:
        _log.warning("the progress display failed", exc_info=True)

  def start(self, phase: str, total: int, done: int = 0) -> None:
    """Starts a phase of `total` steps; `done` of them were taken before the run was resumed."""
    if self._live is not None and self._phase:
      self.print(self._line().plain)  # the live line shows the new phase; this line of the old one remains
    self._phase, self._total, self._values = phase, total, {}
    self._started_at = self._clock()
    self._ends.clear()
    self._ends.append((done, self._started_at))
    self._shown_at = None

  def update(self, step: int, values: Mapping[str, Any]) -> None:
    """Records that `step` steps of the phase are done. values: metrics by name, as from `MetricsWriter.write`."""
    if not self._enabled:
      return
    try:
      now = self._clock()
      self._values.update(values)
      if len(self._ends) == 2 and self._ends[0][1] == self._started_at:
        self._ends.popleft()  # the first step includes compilation
      self._ends.append((step, now))
      due = self._shown_at is None or now - self._shown_at >= self._every or step >= self._total
      if self._live is None and due:
        self._shown_at = now
        self._console.print(self._line(), soft_wrap=True)
    except Exception:
      self._disable()

  def print(self, text: str) -> None:
    """Prints a line above the live one."""
    if self._enabled:
      try:
        self._console.print(Text(text), soft_wrap=True)
      except Exception:
        self._disable()

  def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """As the function `table`, but does not disturb the live line."""
    table(title, columns, rows, console=self._console)

  def _disable(self) -> None:
    _log.warning("the progress display failed; the run continues without it", exc_info=True)
    self._enabled = False
    self.__exit__()

  def _line(self) -> Text:
    return Text("  ".join([self._phase, *self._facts()]))

  def _facts(self) -> list[str]:
    """The texts after the name of the phase, the most important first, because a narrow terminal crops the line."""
    (first, start), (last, end) = self._ends[0], self._ends[-1]
    facts = [f"{last}/{self._total}"]
    if last > first:
      facts.append(f"left {_duration((end - start) / (last - first) * max(self._total - last, 0))}")
    values = self._values
    facts += [f"{label} {values[name]:.3f}" for label, name in _SHOWN if _is_number(values.get(name))]
    facts += [f"{values[name]:,.0f} tok/s" for name in _SPEEDS if _is_number(values.get(name))][:1]
    return [*facts, f"elapsed {_duration(self._clock() - self._started_at)}"]

  def _render(self) -> Text:
    """The live line. It must not raise: rich calls it in another thread, where an exception would be lost."""
    try:
      line = self._live_line() if self._phase else Text("")
    except Exception as error:
      line = Text(f"progress: {error!r}")
    line.no_wrap, line.overflow = True, "crop"
    return line

  def _live_line(self) -> Text:
    facts = "  ".join(self._facts())
    width = max(0, min(_BAR_WIDTH, self._console.width - len(facts) - len(self._phase) - 5))
    full = min(width, width * self._ends[-1][0] // max(self._total, 1))
    done, rest = ("#", ".") if self._console.options.ascii_only else ("━", "─")
    bar = ((done * full, "green"), (rest * (width - full), "dim"), "  " if width else "")
    return Text.assemble((self._phase, "bold cyan"), "  ", *bar, facts)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], *, console: Console | None = None) -> None:
  """Prints a table (process 0 only): with borders on a terminal, as aligned text elsewhere.

  Args:
    rows: a cell for each column, printed with `str`; the first is aligned left, the others right.
  """
  if jax.process_index() != 0:
    return
  console = console or _stdout()
  cells = [[str(cell) for cell in row] for row in rows]
  if _is_live(console):
    bordered = Table(title=Text(title, style="bold"), title_justify="left")
    for index, column in enumerate(columns):
      bordered.add_column(Text(column), justify="left" if index == 0 else "right")
    for row in cells:
      bordered.add_row(*(Text(cell) for cell in row))
    console.print(bordered)
    return
  lines = [list(columns), *cells]
  widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
  console.print(Text(title), soft_wrap=True)
  for line in lines:
    padded = [
      cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(line, widths, strict=True))
    ]
    console.print(Text("  ".join(padded)), soft_wrap=True)


def _stdout() -> Console:
  if hasattr(sys.stdout, "reconfigure"):
    sys.stdout.reconfigure(errors="replace")  # an encoding that lacks a character prints "?" instead of raising
  return Console(file=sys.stdout)


def _is_live(console: Console) -> bool:
  return console.is_terminal and not console.is_dumb_terminal


def _is_number(value: Any) -> bool:
  return isinstance(value, int | float)


def _duration(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
