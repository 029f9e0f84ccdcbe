"""What the README shows is what happens."""

import contextlib
import io
import re

from tests.support.paths import ROOT


def test_the_ten_lines_print_what_the_readme_says():
  text = (ROOT / "README.md").read_text()
  code, printed = re.search(r"```python\n(.*?)```\n\nprints\n\n```\n(.*?)```", text, re.DOTALL).groups()
  output = io.StringIO()
  with contextlib.redirect_stdout(output):
    exec(compile(code, "README.md", "exec"), {})
  assert output.getvalue() == printed


def test_every_file_and_make_target_the_documents_name_exists():
  makefile = (ROOT / "Makefile").read_text()
  for name in ("README.md", "BUILD.md", "BENCHMARKS.md"):
    text = (ROOT / name).read_text()
    for target in re.findall(r"`make (\w+)`", text):
      assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{name} names make {target}"
    for path in re.findall(r"\b(?:rspo_jax|models|experiments|benchmarks|tests)/[\w/]+\.py\b", text):
      assert (ROOT / path).exists(), f"{name} names {path}"
    for path in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
      assert (ROOT / path).exists(), f"{name} links {path}"
