"""Flags of a command and the report of a mistake: the config file, the workdir, one line for an error."""

import re
import sys
from collections.abc import Callable

from absl import app, flags, logging
from ml_collections import config_flags

from experiments.setup.config_flags import renamed_key
from rspo_jax.rollout.remote_engine import EngineError


def run_app(main: Callable[[], None], workdir_help: str) -> None:
  """Runs a command that takes --config and --workdir; it ends the process.

  Args:
    main: called with the flags parsed; a ValueError or EngineError it raises is shown as one message without a trace.
    workdir_help: what --workdir is.
  """
  config_flags.DEFINE_config_file("config", None, "Config file; its fields are flags: --config.steps=10.")
  flags.DEFINE_string("workdir", None, workdir_help)
  flags.mark_flags_as_required(["config", "workdir"])
  logging.set_verbosity(logging.WARNING)

  def guarded(argv: list[str]) -> None:
    if len(argv) > 1:
      raise app.UsageError(f"unexpected arguments {argv[1:]}; settings are given as --config.group.name=value")
    try:
      main()
    except (ValueError, EngineError) as error:
      # A user's mistake, or an engine that cannot be reached: the message gives the cure, and a trace would hide it
      # (--verbosity=1 shows it).
      logging.debug("", exc_info=True)
      sys.exit(f"error: {error}")

  app.run(guarded, flags_parser=parse_flags)


def parse_flags(argv: list[str]) -> list[str]:
  """absl's parser, with ml_collections' bare exceptions turned into one line that names the flag."""
  try:
    rest = flags.FLAGS(argv)
    _ = flags.FLAGS.config  # a file that cannot be loaded raises here
    return rest
  except flags.Error as error:
    # A config file that raises arrives as its whole traceback; the last line says what is wrong.
    sys.exit(f"error: {str(error).strip().splitlines()[-1].strip()} (--help lists the flags)")
  except (AttributeError, KeyError, TypeError, OSError) as error:
    given = [arg for arg in argv if arg.startswith(("--config", "-config"))]
    for arg in given:
      key = re.match(r"-*config\.([\w.]+)", arg)
      if key and (new := renamed_key(key[1])):
        sys.exit(f"error: config.{key[1]} is now config.{new}.")
    reason = " ".join(str(error).replace("\\n", " ").replace("\\'", "'").split()).strip("\"'")
    sys.exit(f"error: no such setting or file in {' '.join(given)} ({reason})")
