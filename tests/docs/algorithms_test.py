"""Code, names, defaults and flags of docs/algorithms.md agree with the program."""

import ast
import contextlib
import dataclasses
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
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)  # (language, content)
COMMANDS = [content for language, content in BLOCKS if not language and "experiments.train" in content]


def table(first, text=TEXT):
  """The rows of the table whose first column is `first`: a list of {column: cell}."""
  blocks = [block for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE) if block.startswith(f"| {first} |")]
  assert len(blocks) == 1, f"{len(blocks)} tables begin with the column {first!r}"
  columns, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in blocks[0].splitlines())
  assert rows
  assert all(len(row) == len(columns) for row in rows), f"a | inside a cell of the table of {first!r}"
  return [dict(zip(columns, row, strict=True)) for row in rows]


def code(cell):
  """The words in code font."""
  return re.findall(r"`([^`]+)`", cell)


def with_flags(flags, objective=None):
  """The options of an update by the demo's config with flags [(path, text)], as a run makes them."""
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


def test_the_code_of_the_document_prints_the_documented_output():
  example = r"^```python\n(.*?)^```$(?:\n\nprints\n\n```\n(.*?)^```$)?"
  blocks = re.findall(example, TEXT, re.MULTILINE | re.DOTALL)
  assert len(blocks) == TEXT.count("```python") > 0
  assert sum(bool(printed) for _, printed in blocks) == len(re.findall(r"^prints$", TEXT, re.MULTILINE)) > 0
  namespace = {}
  for source, printed in blocks:
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
      exec(compile(source, "docs/algorithms.md", "exec"), namespace)
    assert output.getvalue() == printed


def test_the_table_of_objectives_equals_the_recipes():
  rows = {name: row for row in table("name") for name in code(row["name"])}
  assert rows.keys() == OBJECTIVES.keys()
  assert len(rows) == len(table("name"))
  for name, recipe in OBJECTIVES.items():
    row = rows[name]
    assert code(row["aggregation"]) == [recipe.aggregation], name
    assert code(row["baseline, scale"]) == [recipe.baseline, recipe.scale], name


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_table_has_the_defaults_of_the_function(name):
  (row,) = (row for row in table("name") if code(row["name"]) == [name])
  documented = dict(default.split("=") for default in code(row["defaults"]))
  parameters = inspect.signature(OBJECTIVES[name].objective).parameters
  own = {option: parameters[option].default for option in objective_options(OBJECTIVES[name].objective)}
  assert {key: ast.literal_eval(value) for key, value in documented.items()} == own


@pytest.mark.parametrize(
  ("first", "names"),
  [
    ("aggregation", AGGREGATIONS),
    ("estimator", KL_ESTIMATORS),
    ("placement", PLACEMENTS),
    ("correction", CORRECTIONS),
  ],
)
def test_a_table_lists_all_names_of_the_code(first, names):
  assert [code(row[first]) for row in table(first)] == [[name] for name in names]


def test_the_table_of_router_shift_lists_all_its_values():
  listed = {}
  for row in table("option"):
    listed.setdefault(row["option"], []).extend(code(row["value"]))
  assert listed == {"deviation": list(DEVIATIONS), "layers": list(LAYERS), "level": list(LEVELS)}


def test_every_metric_in_code_font_exists():
  metrics = {word for word in code(re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL)) if re.fullmatch(r"\w+/\w+", word)}
  assert metrics
  assert not metrics - METRICS.keys()


def test_every_metric_of_an_update_is_in_the_document():
  groups = ("ratio", "clip", "kl", "shift", "router", "mismatch", "noise", "replay")
  documented = {name for block in re.findall(r"^\| `.*$", TEXT.split("## 7.")[1], re.MULTILINE) for name in code(block)}
  assert not {name for name in METRICS if name.split("/")[0] in groups} - documented


def test_every_config_field_in_the_document_exists():
  paths = re.findall(r"`config\.([\w.]+)`", TEXT) + [path for path, _ in re.findall(FLAG, TEXT)]
  assert len(paths) > 20
  for path in paths:
    resolve(path)


@pytest.mark.parametrize("flag", sorted(set(re.findall(FLAG, TEXT))), ids="=".join)
def test_every_flag_is_valid_with_some_objective(flag):
  if flag[0] == "objective.name":
    with_flags([flag])
    return
  errors = []
  for name in OBJECTIVES:
    try:
      with_flags([flag], objective=name)
    except ValueError as error:
      errors.append(str(error))
  assert len(errors) < len(OBJECTIVES), errors[0]


def test_every_command_gives_a_valid_config():
  assert COMMANDS
  for command in COMMANDS:
    assert (ROOT / re.search(r"--config=(\S+)", command).group(1)).exists()
    with_flags(re.findall(FLAG, command))


def test_the_command_and_the_code_give_the_same_update():
  (source,) = (content for language, content in BLOCKS if language == "python" and "UpdateOptions(" in content)
  (command,) = (command for command in COMMANDS if "--workdir=runs/composed" in command)
  namespace = {}
  with contextlib.redirect_stdout(io.StringIO()):
    exec(compile(source, "docs/algorithms.md", "exec"), namespace)
  by_hand, by_flags = namespace["options"], with_flags(re.findall(FLAG, command))
  # The floor of router shift waits for the warm start of the command's config.
  shift = dataclasses.replace(by_hand.shift, floor_begin=countdown_tiny.get_config().warm_start.steps)
  by_hand = dataclasses.replace(by_hand, shift=shift)
  for field in ("aggregation", "shift", "replay", "mismatch", "kl_coefficient", "kl_estimator"):
    assert getattr(by_hand, field) == getattr(by_flags, field), field
  hand, flags = (inspect.signature(options.objective).parameters for options in (by_hand, by_flags))
  assert {name: p.default for name, p in hand.items()} == {name: p.default for name, p in flags.items()}


def test_every_paper_cited_is_cited_in_the_code():
  number = r"\b\d{4}\.\d{5}(?!\d)"
  cited = set(re.findall(number, TEXT))
  in_code = set(re.findall(number, "".join(path.read_text() for path in (ROOT / "rspo_jax").rglob("*.py"))))
  assert cited
  assert not cited - in_code
