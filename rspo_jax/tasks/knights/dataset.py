"""The Knights and Knaves data set as a TFDS builder."""

import dataclasses
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from rspo_jax.tasks import tfds_folders
from rspo_jax.tasks.knights.generate import KnightsSpec, Worked, make_problems
from rspo_jax.tasks.knights.problem import Problem, answer_text, compact_roles, compact_text, parse

# Not, and, or, implies, equivalent, count: safe in a folder's name.
_LETTERS = {"!": "n", "&": "a", "|": "o", ">": "i", "=": "e", "#": "c"}


@dataclasses.dataclass
class KnightsConfig(tfds.core.BuilderConfig):
  """A builder configuration whose name, and so whose folder, says the whole spec."""

  spec: KnightsSpec = dataclasses.field(default_factory=KnightsSpec)

  @classmethod
  def of(cls, spec: KnightsSpec) -> "KnightsConfig":
    letters = "".join(_LETTERS[operator] for operator in spec.operators) or "none"
    name = (
      f"p{spec.people}_d{spec.depth}_{letters}_train{spec.train}_test{spec.test}_names{spec.namings}_seed{spec.seed}"
    )
    return cls(name=name, description="Knights and Knaves problems with wrong answers.", spec=spec)


class Knights(tfds.core.GeneratorBasedBuilder):
  """Features, all of them compact text: statements ('!B;A&C;#2'), solution ('A1B0C0') and wrong (another answer)."""

  # Part of the folder's name: raise it whenever the same spec would give other records.
  VERSION = tfds.core.Version("1.0.0")

  def _info(self):
    return self.dataset_info_from_configs(
      features=tfds.features.FeaturesDict({name: tfds.features.Text() for name in ("statements", "solution", "wrong")}),
      description="Knights only tell the truth, knaves only lie: find out who is what.",
      disable_shuffling=True,  # the problems come in random order already
    )

  def _split_generators(self, dl_manager):
    del dl_manager
    return {split: self._generate_examples(worked) for split, worked in make_problems(self.builder_config.spec).items()}

  def _generate_examples(self, worked):
    for index, (problem, wrong) in enumerate(worked):
      yield (
        index,
        {
          "statements": compact_text(problem.statements),
          "solution": answer_text(problem.solution),
          "wrong": answer_text(wrong),
        },
      )


def worked_of(record: dict) -> Worked:
  """One record as TFDS reads it. Raises (ValueError, KeyError) if it is not a problem with its two answers."""
  statements, solution, wrong = (record[name].decode("ascii") for name in ("statements", "solution", "wrong"))
  problem = Problem(parse(statements))
  if solution != answer_text(problem.solution):
    raise ValueError(f"{statements!r} has the solution {solution!r}; want {answer_text(problem.solution)!r}")
  roles = compact_roles(wrong, len(problem.statements))
  if roles is None or roles == problem.solution:
    raise ValueError(f"{statements!r} has the wrong answer {wrong!r}; want a well-formed one that is wrong")
  return Worked(problem, roles)


def folder_of(spec: KnightsSpec, root: Path) -> Path:
  """The folder under the root that holds this spec's files."""
  return tfds_folders.folder_of(Knights, KnightsConfig.of(spec), root)


def prepare(spec: KnightsSpec, root: Path) -> dict[str, Any]:
  """{split: records} of this spec, made first if they are not there; see `tfds_folders.prepare`."""
  return tfds_folders.prepare(Knights, KnightsConfig.of(spec), root)
