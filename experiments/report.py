"""Writes the report of a run again, or of a run that has not ended yet.

    python -m experiments.report --workdir=runs/countdown_tiny

Writes `report.html` and `plots/` into the workdir, from the files that `experiments.train` wrote there.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import ml_collections
from absl import app, flags, logging

from experiments.reporting.answers import read_answers
from experiments.reporting.page import write_report
from experiments.reporting.summary import read_rows, summarize
from experiments.setup.config_flags import read_config
from rspo_jax.files import read_json


def main(argv: Sequence[str]) -> None:
  del argv
  workdir = Path(flags.FLAGS.workdir)
  cure = "Pass the workdir of a run (experiments.train)."
  if (workdir / "summary.json").exists():
    summary = read_json(workdir / "summary.json", cure=cure)
  elif (workdir / "config.json").exists():
    config = read_config(ml_collections.ConfigDict(read_json(workdir / "config.json", cure=cure)))
    seconds = Counter()
    for row in read_rows(workdir):
      seconds[row["phase"]] += row.get("seconds/step", 0.0)
    summary = summarize(workdir, config, seconds, len(read_answers(workdir, "before")))
    summary["device"] = None  # the devices of this process are not those of the run
  else:
    raise app.UsageError(f"{workdir} has neither summary.json nor config.json. {cure}")
  write_report(workdir, summary)
  print(workdir / "report.html")


if __name__ == "__main__":
  flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
  logging.set_verbosity(logging.WARNING)
  app.run(main)
