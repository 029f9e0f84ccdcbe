"""The Knights and Knaves data set as a TFDS builder; see `rspo_jax.tasks.tfds_folders`."""

import dataclasses
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from rspo_jax.tasks import tfds_folders
from rspo_jax.tasks.knights.generate import KnightsSpec, SolvedProblem, make_problems
from rspo_jax.tasks.knights.problem import Problem, answer_text, compact_roles, compact_text, parse

# Not, and, or, implies, equivalent, count; valid in folder names.
_LETTERS = {"!": "n", "&": "a", "|": "o", ">": "i", "=": "e", "#": "c"}


@dataclasses.dataclass
class KnightsConfig(tfds.core.BuilderConfig):
  """A builder configuration whose name, and therefore whose folder, encodes the whole spec."""

  spec: KnightsSpec = dataclasses.field(default_factory=KnightsSpec)

  @classmethod
  def from_spec(cls, spec: KnightsSpec) -> "KnightsConfig":
    letters = "".join(_LETTERS[operator] for operator in spec.operators) or "none"
    name = (
      f"p{spec.people}_d{spec.depth}_{letters}_train{spec.train}_test{spec.test}_names{spec.namings}_seed{spec.seed}"
    )
    return cls(name=name, description="Knights and Knaves problems with wrong answers.", spec=spec)


class Knights(tfds.core.GeneratorBasedBuilder):
  """Features, all in compact text: statements ('!B;A&C;#2'), solution ('A1B0C0') and wrong (another answer)."""

  # Part of the folder name. Increase it with every change that gives other records for the same spec.
  VERSION = tfds.core.Version("1.0.0")

  def _info(self):
    return self.dataset_info_from_configs(
      features=tfds.features.FeaturesDict({name: tfds.features.Text() for name in ("statements", "solution", "wrong")}),
      description="Knights only tell the truth, knaves only lie: find out who is what.",
      disable_shuffling=True,  # the problems are already in random order
    )

  def _split_generators(self, dl_manager):
    del dl_manager
    return {split: self._generate_examples(rows) for split, rows in make_problems(self.builder_config.spec).items()}

  def _generate_examples(self, rows):
    return enumerate(map(_record, rows))


def _record(row: SolvedProblem) -> dict[str, str]:
  return {
    "statements": compact_text(row.problem.statements),
    "solution": answer_text(row.problem.solution),
    "wrong": answer_text(row.wrong_answer),
  }


def problem_from_record(record: dict[str, Any]) -> SolvedProblem:
  """Converts a record read by TFDS. Raises ValueError or KeyError unless it has a problem and its two answers."""
  statements, solution, wrong = (record[name].decode("ascii") for name in ("statements", "solution", "wrong"))
  problem = Problem(parse(statements))
  if solution != answer_text(problem.solution):
    raise ValueError(f"{statements!r} has the solution {solution!r}; want {answer_text(problem.solution)!r}")
  roles = compact_roles(wrong, len(problem.statements))
  if roles is None or roles == problem.solution:
    raise ValueError(f"{statements!r} has the wrong answer {wrong!r}; want a well-formed answer that is wrong")
  return SolvedProblem(problem, roles)


def data_folder(spec: KnightsSpec, root: Path) -> Path:
  """The folder below `root` that contains the files of this spec."""
  return tfds_folders.data_folder(Knights, KnightsConfig.from_spec(spec), root)


def prepare(spec: KnightsSpec, root: Path) -> dict[str, Any]:
  """{split: records} of this spec; see `tfds_folders.prepare`."""
  return tfds_folders.prepare(Knights, KnightsConfig.from_spec(spec), root)
