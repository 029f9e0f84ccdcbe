"""The Countdown data set as a TFDS builder, written as array_record files and read without TensorFlow."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from rspo_jax.tasks import tfds_folders
from rspo_jax.tasks.countdown.generate import CountdownSpec, Worked, make_problems
from rspo_jax.tasks.countdown.problem import Problem, check

_LETTERS = {
  "+": "a",
  "-": "s",
  "*": "m",
  "/": "d",
}  # add, subtract, multiply, divide: safe in a folder's name


@dataclasses.dataclass
class CountdownConfig(tfds.core.BuilderConfig):
  """A builder configuration whose name, and so whose folder, says the whole spec."""

  spec: CountdownSpec = dataclasses.field(default_factory=CountdownSpec)

  @classmethod
  def of(cls, spec: CountdownSpec) -> "CountdownConfig":
    letters = "".join(_LETTERS[operator] for operator in spec.operators)
    name = (
      f"n{spec.numbers}_{spec.low}to{spec.high}_t{spec.target_low}to{spec.target_high}_{letters}"
      f"_train{spec.train}_test{spec.test}_seed{spec.seed}"
    )
    return cls(name=name, description="Countdown problems with right and wrong expressions.", spec=spec)


class Countdown(tfds.core.GeneratorBasedBuilder):
  """Features: numbers [n] int32, target int32, demonstration (right) and wrong_demonstration text."""

  # Part of the folder's name: raise it whenever the same spec would give other records.
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
      disable_shuffling=True,  # the problems come in random order already
    )

  def _split_generators(self, dl_manager):
    del dl_manager
    return {split: self._generate_examples(worked) for split, worked in make_problems(self.builder_config.spec).items()}

  def _generate_examples(self, worked):
    for index, (problem, right, wrong) in enumerate(worked):
      yield (
        index,
        {
          "numbers": np.array(problem.numbers, np.int32),
          "target": problem.target,
          "demonstration": right,
          "wrong_demonstration": wrong,
        },
      )


def worked_of(record: dict, operators: str) -> Worked:
  """One record as TFDS reads it. Raises (ValueError, KeyError) if it is not a problem with its two expressions."""
  problem = Problem(tuple(np.asarray(record["numbers"]).tolist()), np.asarray(record["target"]).item())
  worked = Worked(problem, record["demonstration"].decode("ascii"), record["wrong_demonstration"].decode("ascii"))
  verdicts = check(worked.right, problem, operators).reason, check(worked.wrong, problem, operators).reason
  if verdicts != ("right", "wrong value"):
    raise ValueError(f"{worked} has demonstrations that are judged {verdicts}, not right and wrong value")
  return worked


def folder_of(spec: CountdownSpec, root: Path) -> Path:
  """The folder under the root that holds this spec's files."""
  return tfds_folders.folder_of(Countdown, CountdownConfig.of(spec), root)


def prepare(spec: CountdownSpec, root: Path) -> dict[str, Any]:
  """{split: records} of this spec, made first if they are not there; see `tfds_folders.prepare`."""
  return tfds_folders.prepare(Countdown, CountdownConfig.of(spec), root)
