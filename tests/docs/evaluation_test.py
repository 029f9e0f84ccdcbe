"""The code and the flags of docs/evaluation.md work."""

import re

from experiments.configs import evaluate_math
from tests.support.paths import DOCS

DOCUMENT = (DOCS / "evaluation.md").read_text()


def test_the_code_of_the_document_prints_the_documented_output(capsys):
  example = r"^```python\n(.*?)^```$\n\nprints\n\n```\n(.*?)^```$"
  ((code, printed),) = re.findall(example, DOCUMENT, re.DOTALL | re.MULTILINE)
  exec(compile(code, "docs/evaluation.md", "exec"), {})
  assert capsys.readouterr().out == printed


def test_every_flag_of_the_document_exists():
  flags = re.findall(r"--config\.([\w.]+)=", DOCUMENT)
  assert len(flags) > 5
  for flag in flags:
    node = evaluate_math.get_config()
    for name in flag.split("."):
      assert name in node, flag
      node = node[name]
