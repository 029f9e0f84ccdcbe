"""The Countdown data set as a TFDS builder; see `rspo_jax.tasks.tfds_folders`."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from rspo_jax.tasks import tfds_folders
from rspo_jax.tasks.countdown.generate import CountdownSpec, SolvedProblem, make_problems
from rspo_jax.tasks.countdown.problem import Problem, check

_LETTERS = {"+": "a", "-": "s", "*": "m", "/": "d"}  # add, subtract, multiply, divide; valid in folder names


@dataclasses.dataclass
class CountdownConfig(tfds.core.BuilderConfig):
  """A builder configuration whose name, and therefore whose folder, encodes the whole spec."""

  spec: CountdownSpec = dataclasses.field(default_factory=CountdownSpec)

  @classmethod
  def from_spec(cls, spec: CountdownSpec) -> "CountdownConfig":
    letters = "".join(_LETTERS[operator] for operator in spec.operators)
    name = (
      f"n{spec.numbers}_{spec.low}to{spec.high}_t{spec.target_low}to{spec.target_high}_{letters}"
      f"_train{spec.train}_test{spec.test}_seed{spec.seed}"
    )
    return cls(name=name, description="Countdown problems with right and wrong expressions.", spec=spec)


class Countdown(tfds.core.GeneratorBasedBuilder):
  """Features: numbers [n] int32, target int32; demonstration (a solution) and wrong_demonstration, text."""

  # Part of the folder name. Increase it with every change that gives other records for the same spec.
  VERSION = tfds.core.Version("1.0.0")

  def _info(self):
    return self.dataset_info_from_configs(
      features=tfds.features.FeaturesDict(
        {
          "numbers": tfds.features.Tensor(shape=(self.builder_config.spec.numbers,), dtype=np.int32),
          "target": tfds.features.Scalar(dtype=np.int32),
          "demonstration": tfds.features.Text(),
          "wrong_demonstration": tfds.features.Text(),
        }
      ),
      description="Reach the target with each number exactly once.",
      disable_shuffling=True,  # the problems are already in random order
    )

  def _split_generators(self, dl_manager):
    del dl_manager
    return {split: self._generate_examples(rows) for split, rows in make_problems(self.builder_config.spec).items()}

  def _generate_examples(self, rows):
    return enumerate(map(_record, rows))


def _record(row: SolvedProblem) -> dict[str, Any]:
  return {
    "numbers": np.array(row.problem.numbers, np.int32),
    "target": row.problem.target,
    "demonstration": row.solution,
    "wrong_demonstration": row.wrong_answer,
  }


def problem_from_record(record: dict[str, Any], operators: str) -> SolvedProblem:
  """Converts a record read by TFDS. Raises ValueError or KeyError unless it has a problem and its two expressions."""
  problem = Problem(tuple(np.asarray(record["numbers"]).tolist()), np.asarray(record["target"]).item())
  row = SolvedProblem(problem, record["demonstration"].decode("ascii"), record["wrong_demonstration"].decode("ascii"))
  reasons = check(row.solution, problem, operators).reason, check(row.wrong_answer, problem, operators).reason
  if reasons != ("right", "wrong value"):
    raise ValueError(f"{row} has demonstrations with the verdicts {reasons}; want right and wrong value")
  return row


def data_folder(spec: CountdownSpec, root: Path) -> Path:
  """The folder below `root` that contains the files of this spec."""
  return tfds_folders.data_folder(Countdown, CountdownConfig.from_spec(spec), root)


def prepare(spec: CountdownSpec, root: Path) -> dict[str, Any]:
  """{split: records} of this spec; see `tfds_folders.prepare`."""
  return tfds_folders.prepare(Countdown, CountdownConfig.from_spec(spec), root)
