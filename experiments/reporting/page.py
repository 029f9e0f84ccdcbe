"""The report of a run: `report.html`, one self-contained file, and its figures in `plots/`."""

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jinja2

from experiments.reporting import plots
from experiments.reporting.answers import shown_answers
from experiments.reporting.panels import PANELS
from experiments.reporting.summary import read_rows
from experiments.reporting.summary_text import before_after_rows, sampling_temperature, warm_start_note
from rspo_jax.run.metrics import METRICS
from rspo_jax.run.workdir import write_text_atomic


def write_report(workdir: Path, summary: Mapping[str, Any]) -> None:
  """Writes `plots/*.png` and `report.html`. Process 0 only. summary: as from `summary.summarize`."""
  if jax.process_index() != 0:
    return
  workdir = Path(workdir)
  figures = plots.draw(read_rows(workdir))
  (workdir / "plots").mkdir(exist_ok=True)
  for name, figure in figures.items():
    (workdir / "plots" / f"{name}.png").write_bytes(figure)
  environment = jinja2.Environment(
    loader=jinja2.PackageLoader("experiments", "reporting"), autoescape=True, undefined=jinja2.StrictUndefined,
    trim_blocks=True, lstrip_blocks=True,
  )  # fmt: skip
  html = environment.get_template("report.html.jinja").render(
    summary=summary,
    temperature=sampling_temperature(summary),
    table=before_after_rows(summary),
    warm_start_note=warm_start_note(summary["warm_start"]),
    panels=[(panel, base64.b64encode(figures[panel.name]).decode()) for panel in PANELS if panel.name in figures],
    absent=[panel.title for panel in PANELS if panel.name not in figures],
    answers=shown_answers(workdir),
    config=_config_text(workdir),
    glossary=METRICS,
  )
  write_text_atomic(workdir / "report.html", html)


def _config_text(workdir: Path) -> str:
  path = workdir / "config.json"
  return path.read_text(encoding="utf-8") if path.exists() else ""
