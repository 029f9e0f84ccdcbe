"""The progress display shows correct numbers on a terminal and elsewhere, and never stops a run."""

import io
import re

import pytest
from rich.console import Console

from experiments.reporting.progress import Progress, table

ROW = {"reward/mean": 0.25, "reward/success": 0.125, "speed/sample_tokens_per_second": 12345.6}


class Clock:
  def __init__(self):
    self.now = 100.0

  def __call__(self):
    return self.now


def plain(width=200):
  return Console(file=io.StringIO(), force_terminal=False, width=width)


def terminal(width=120, encoding="utf-8"):
  stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="replace", write_through=True)
  return Console(file=stream, force_terminal=True, width=width, _environ={"TERM": "xterm-256color"})


def shown(console):
  """All text written so far, without colours and cursor movements."""
  file = console.file
  text = file.getvalue() if isinstance(file, io.StringIO) else file.buffer.getvalue().decode(file.encoding)
  return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)


def test_off_a_terminal_lines_are_printed_at_the_given_interval_and_at_the_end():
  clock, console = Clock(), plain()
  with Progress(every=5.0, console=console, clock=clock) as progress:
    progress.start("rl", total=12)
    for step in range(1, 13):
      clock.now += 2.0
      progress.update(step, ROW)
  lines = shown(console).splitlines()
  assert [line.split()[1] for line in lines] == ["1/12", "4/12", "7/12", "10/12", "12/12"]
  assert lines[1] == "rl  4/12  left 0:16  reward 0.250  success 0.125  12,346 tok/s  elapsed 0:08"


def test_the_remaining_time_follows_recent_steps_without_the_first_one():
  clock, console = Clock(), plain()
  with Progress(every=0.0, console=console, clock=clock) as progress:
    progress.start("rl", total=1000, done=100)
    for step, seconds in zip(range(101, 161), [60.0] + [3.0] * 29 + [1.0] * 30, strict=True):
      clock.now += seconds
      progress.update(step, ROW)
  lines = shown(console).splitlines()
  assert "left 14:59:00" in lines[0]  # after the first step: 899 steps of 60 s
  assert "left 44:54" in lines[1]  # 898 steps of 3 s
  assert "left 14:00" in lines[-1]  # 840 steps of 1 s
  assert "elapsed 2:57" in lines[-1]


def test_on_a_terminal_one_line_is_updated_and_texts_are_printed_above_it():
  console = terminal()
  with Progress(console=console) as progress:
    progress.start("warm_start", total=4)
    progress.update(2, {"loss/warm_start": 1.5})
    progress.print("saved [step 2]")
    progress.start("rl", total=10)
    progress.update(5, ROW)
  text = shown(console)
  assert "saved [step 2]" in text
  assert "warm_start  2/4" in text  # of the phase that ended
  assert "━" in text
  assert "5/10  left " in text.splitlines()[-1]
  assert "reward 0.250  success 0.125  12,346 tok/s" in text.splitlines()[-1]


@pytest.mark.parametrize("width", [20, 40, 80])
def test_the_live_line_never_wraps(width):
  console = terminal(width)
  with Progress(console=console) as progress:
    progress.start("rl", total=1000)
    progress.update(500, ROW | {"eval/success": 0.5})
    assert len(console.render_lines(progress._render())) == 1
  assert "500/1000" in shown(console)


def test_on_a_terminal_without_unicode_the_bar_is_ascii():
  console = terminal(encoding="ascii")
  with Progress(console=console) as progress:
    progress.start("rl", total=10)
    progress.update(5, ROW)
    progress.print("naïve")
    progress.table("T", ["a", "b"], [["x", 1]])
  text = shown(console)
  assert "#####" in text
  assert "5/10" in text


class BrokenFile(io.StringIO):
  def write(self, text):
    raise OSError("the disk is full")


@pytest.mark.parametrize("force_terminal", [True, False])
def test_a_display_that_fails_does_not_stop_the_run(force_terminal):
  console = Console(file=BrokenFile(), force_terminal=force_terminal, _environ={"TERM": "xterm"})
  done = 0
  with Progress(every=0.0, console=console) as progress:
    progress.start("rl", total=3)
    for step in (1, 2, 3):
      progress.update(step, ROW)
      progress.print("text")
      done += 1
  assert done == 3


def test_an_exception_in_the_run_is_propagated_and_the_cursor_is_restored():
  console = terminal()

  def run():
    with Progress(console=console) as progress:
      progress.start("rl", total=3)
      raise KeyError("the run's own")

  with pytest.raises(KeyError, match="the run's own"):
    run()
  written = console.file.buffer.getvalue().decode()
  assert written.rfind("\x1b[?25h") > written.rfind("\x1b[?25l") >= 0  # shown again after it was hidden


def test_a_table_is_aligned_text_off_a_terminal_and_has_borders_on_one():
  columns, rows = ["", "before", "after"], [["T=1 (avg@8)", "0.10", 0.64], ["greedy [x]", 1, "0.7"]]
  console = plain(width=10)  # narrower than the table: no wrapping in a log
  table("held-out", columns, rows, console=console)
  assert shown(console).splitlines() == [
    "held-out",
    "             before  after",
    "T=1 (avg@8)    0.10   0.64",
    "greedy [x]        1    0.7",
  ]
  console = terminal()
  table("held-out", columns, rows, console=console)
  text = shown(console)
  assert "│ greedy [x]  │      1 │   0.7 │" in text
  assert "held-out" in text
