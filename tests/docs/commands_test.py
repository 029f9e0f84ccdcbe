"""What docs/algorithms.md says of names, defaults and flags is what the program has."""

import ast
import contextlib
import inspect
import io
import re

import pytest

from experiments.configs import countdown_tiny
from experiments.setup.build import update_options
from experiments.setup.config_flags import read_config
from rspo_jax.objectives.advantages import BASELINES, SCALES
from rspo_jax.objectives.aggregation import AGGREGATIONS
from rspo_jax.objectives.mismatch import CORRECTIONS
from rspo_jax.objectives.penalties import KL_ESTIMATORS
from rspo_jax.objectives.table import OBJECTIVES, objective_options
from rspo_jax.router.shift import DEVIATIONS, LAYERS, LEVELS
from rspo_jax.run.metrics import METRICS
from rspo_jax.types import PLACEMENTS
from tests.support.documents import FLAG, resolve
from tests.support.paths import ROOT

TEXT = (ROOT / "docs" / "algorithms.md").read_text()
FENCES = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)  # (language, content)
COMMANDS = [content for language, content in FENCES if not language and "experiments.train" in content]


def table(first, text=TEXT):
  """The rows of the table whose first heading is `first`: a list of {heading: cell}."""
  blocks = [block for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE) if block.startswith(f"| {first} |")]
  assert len(blocks) == 1, f"{len(blocks)} tables begin with the column {first!r}"
  heads, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in blocks[0].splitlines())
  assert rows
  assert all(len(row) == len(heads) for row in rows), f"a | inside a cell of the table of {first!r}"
  return [dict(zip(heads, row, strict=True)) for row in rows]


def code(cell):
  """What stands in code font."""
  return re.findall(r"`([^`]+)`", cell)


def with_flags(flags, objective=None):
  """The demo's config with flags [(path, text)], read and wired as a run does before it compiles."""
  given = countdown_tiny.get_config()
  if objective is not None:
    given.objective.name = objective
  for path, text in flags:
    resolve(path)
    *groups, last = path.split(".")
    node = given
    for group in groups:
      node = node[group]
    kind = node.get_type(last)
    node[last] = {"true": True, "false": False}[text] if kind is bool else kind(text)
  config = read_config(given)
  assert config.advantage.baseline in (None, *BASELINES)
  assert config.advantage.scale in (None, *SCALES)
  return update_options(config)


def test_the_code_runs_and_prints_what_the_document_says():
  shown = r"^```python\n(.*?)^```$(?:\n\nprints\n\n```\n(.*?)^```$)?"
  blocks = re.findall(shown, TEXT, re.MULTILINE | re.DOTALL)
  assert len(blocks) == TEXT.count("```python") > 0
  assert sum(bool(printed) for _, printed in blocks) == len(re.findall(r"^prints$", TEXT, re.MULTILINE)) > 0
  namespace = {}
  for source, wanted in blocks:
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
      exec(compile(source, "docs/algorithms.md", "exec"), namespace)
    assert output.getvalue() == wanted


def test_the_table_of_objectives_is_the_code_s():
  rows = {name: row for row in table("name") for name in code(row["name"])}
  assert rows.keys() == OBJECTIVES.keys()
  assert len(rows) == len(table("name"))
  for name, recipe in OBJECTIVES.items():
    row = rows[name]
    assert code(row["aggregation"]) == [recipe.aggregation], name
    assert code(row["baseline, scale"]) == [recipe.baseline, recipe.scale], name


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_defaults_in_the_table_are_those_of_the_function(name):
  (row,) = (row for row in table("name") if code(row["name"]) == [name])
  told = dict(default.split("=") for default in code(row["defaults"]))
  parameters = inspect.signature(OBJECTIVES[name].objective).parameters
  own = {option: parameters[option].default for option in objective_options(OBJECTIVES[name].objective)}
  assert {key: ast.literal_eval(value) for key, value in told.items()} == own


@pytest.mark.parametrize(
  ("first", "names"),
  [
    ("aggregation", AGGREGATIONS),
    ("estimator", KL_ESTIMATORS),
    ("placement", PLACEMENTS),
    ("correction", CORRECTIONS),
  ],
)
def test_a_table_lists_all_names_that_the_code_knows(first, names):
  assert [code(row[first]) for row in table(first)] == [[name] for name in names]


def test_the_table_of_router_shift_lists_all_its_values():
  listed = {}
  for row in table("option"):
    listed.setdefault(row["option"], []).extend(code(row["value"]))
  assert listed == {"deviation": list(DEVIATIONS), "layers": list(LAYERS), "level": list(LEVELS)}


def test_every_metric_in_code_font_is_documented_where_metrics_are():
  named = {word for word in code(re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL)) if re.fullmatch(r"\w+/\w+", word)}
  assert named
  assert not named - METRICS.keys()


def test_no_metric_of_an_update_or_a_probe_is_left_out():
  groups = ("ratio", "clip", "kl", "shift", "router", "mismatch", "noise", "replay")
  told = {name for block in re.findall(r"^\| `.*$", TEXT.split("## 7.")[1], re.MULTILINE) for name in code(block)}
  assert not {name for name in METRICS if name.split("/")[0] in groups} - told


def test_every_config_field_in_the_document_exists():
  paths = re.findall(r"`config\.([\w.]+)`", TEXT) + [path for path, _ in re.findall(FLAG, TEXT)]
  assert len(paths) > 20
  for path in paths:
    resolve(path)


@pytest.mark.parametrize("flag", sorted(set(re.findall(FLAG, TEXT))), ids="=".join)
def test_every_flag_gives_a_config_that_some_objective_takes(flag):
  if flag[0] == "objective.name":
    with_flags([flag])
    return
  refusals = []
  for name in OBJECTIVES:
    try:
      with_flags([flag], objective=name)
    except ValueError as error:
      refusals.append(str(error))
  assert len(refusals) < len(OBJECTIVES), refusals[0]


def test_every_command_is_a_config_as_a_whole():
  assert COMMANDS
  for command in COMMANDS:
    assert (ROOT / re.search(r"--config=(\S+)", command).group(1)).exists()
    with_flags(re.findall(FLAG, command))


def test_the_command_composes_what_the_code_composes():
  (source,) = (content for language, content in FENCES if language == "python" and "UpdateOptions(" in content)
  (command,) = (command for command in COMMANDS if "--workdir=runs/composed" in command)
  namespace = {}
  with contextlib.redirect_stdout(io.StringIO()):
    exec(compile(source, "docs/algorithms.md", "exec"), namespace)
  by_hand, by_flags = namespace["options"], with_flags(re.findall(FLAG, command))
  for field in ("aggregation", "shift", "replay", "mismatch", "kl_coefficient", "kl_estimator"):
    assert getattr(by_hand, field) == getattr(by_flags, field), field
  hand, flags = (inspect.signature(options.objective).parameters for options in (by_hand, by_flags))
  assert {name: p.default for name, p in hand.items()} == {name: p.default for name, p in flags.items()}


def test_every_paper_cited_is_cited_in_the_code():
  number = r"\b\d{4}\.\d{5}(?!\d)"
  cited = set(re.findall(number, TEXT))
  in_code = set(re.findall(number, "".join(path.read_text() for path in (ROOT / "rspo_jax").glob("*.py"))))
  assert cited
  assert not cited - in_code


def test_every_file_the_document_names_exists():
  named = re.findall(r"\b(?:rspo_jax|models|experiments|tests)/[\w/]+\.py\b", TEXT)
  assert named
  for path in named:
    assert (ROOT / path).exists(), path
