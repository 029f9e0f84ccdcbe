"""Where things lie, seen from a test."""

import pathlib

ROOT = pathlib.Path(__file__).parents[2]
DOCS = ROOT / "docs"
SHARED = ROOT.parent / "shared" / "data"  # real benchmark files; tests that need them skip where they are absent
