"""The flags --config and --workdir of a command, and one line instead of a traceback for a user's mistake."""

import re
import sys
from collections.abc import Callable

from absl import app, flags, logging
from ml_collections import config_flags

from experiments.setup.renamed_keys import renamed_key
from rspo_jax.rollout.remote_client import EngineError


def run_app(main: Callable[[], None], workdir_help: str) -> None:
  """Runs a command with the flags --config and --workdir. It does not return: the process exits.

  Args:
    main: called after the flags are parsed. If it raises a ValueError or an EngineError, the message is printed without
      a traceback, and the exit status is 1.
    workdir_help: help text of --workdir.
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
      # The message gives the cure, and a traceback would hide it; --verbosity=1 shows the traceback.
      logging.debug("", exc_info=True)
      sys.exit(f"error: {error}")

  app.run(guarded, flags_parser=parse_flags)


def parse_flags(argv: list[str]) -> list[str]:
  """Parses the flags; returns the other arguments. Exits with one line that names the flag at fault.

  absl reports its own errors well, but ml_collections lets bare exceptions pass.
  """
  try:
    rest = flags.FLAGS(argv)
    _ = flags.FLAGS.config  # loads the file
    return rest
  except flags.Error as error:
    # For a config file that raises, the error is the whole traceback, and its last line the message.
    sys.exit(f"error: {str(error).strip().splitlines()[-1].strip()} (--help lists the flags)")
  except (AttributeError, KeyError, TypeError, OSError) as error:
    settings = [arg for arg in argv if arg.startswith(("--config", "-config"))]
    for setting in settings:
      match = re.match(r"-*config\.([\w.]+)", setting)
      if match and (new := renamed_key(match[1])):
        sys.exit(f"error: config.{match[1]} is now config.{new}.")
    reason = " ".join(str(error).replace("\\n", " ").replace("\\'", "'").split()).strip("\"'")
    sys.exit(f"error: no such setting or file in {' '.join(settings)} ({reason})")
