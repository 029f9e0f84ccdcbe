"""Python programs for child processes that import single modules of the library quickly."""

import pathlib

from tests.support.paths import ROOT


def skip_package_code(*packages: str) -> str:
  """Source text to run first in a child process: it replaces packages by stubs, so that importing one of their modules
  does not run their `__init__`, which may import JAX and take seconds. Name parents before their children."""
  source = "import sys, types\n"
  for package in packages:
    folder = str(pathlib.Path(ROOT, *package.split(".")))
    source += f"sys.modules[{package!r}] = stub = types.ModuleType({package!r}); stub.__path__ = [{folder!r}]\n"
  return source
