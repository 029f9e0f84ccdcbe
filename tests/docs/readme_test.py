"""The code and the flags of README.md."""

import contextlib
import io
import re

from tests.support.documents import FLAG, resolve
from tests.support.paths import ROOT

TEXT = (ROOT / "README.md").read_text()


def test_the_ten_lines_print_the_documented_output():
  code, printed = re.search(r"```python\n(.*?)```\n\nprints\n\n```\n(.*?)```", TEXT, re.DOTALL).groups()
  output = io.StringIO()
  with contextlib.redirect_stdout(output):
    exec(compile(code, "README.md", "exec"), {})
  assert output.getvalue() == printed


def test_every_flag_exists():
  flags = [path for path, _ in re.findall(FLAG, TEXT)] + re.findall(r"`config\.([\w.]+)`", TEXT)
  assert len(flags) > 10
  for path in flags:
    resolve(path)
