"""F3: the Countdown data set as a TFDS builder, written as array_record files and read without TensorFlow."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from rspo_jax.countdown import Problem
from rspo_jax.countdown_problems import CountdownSpec, make_problems

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
    return {
      split: self._generate_examples(worked)
      for split, worked in make_problems(self.builder_config.spec).items()
    }

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


def problem_of(record: dict) -> Problem:
  """The problem of one record as TFDS reads it. ValueError or KeyError if the record is not one of ours."""
  return Problem(tuple(np.asarray(record["numbers"]).tolist()), np.asarray(record["target"]).item())


def prepare(spec: CountdownSpec, folder: Path) -> dict[str, Any]:
  """{split: records} of the data set under a folder, made first if it is not there. One process at a time.

  Raises:
    ValueError: a spec that cannot be met, or files that cannot be read (names their folder and the cure).
  """
  tfds.disable_progress_bar()
  config = CountdownConfig.of(spec)
  made = folder / Countdown.name / config.name / str(Countdown.VERSION)
  try:
    builder = Countdown(config=config, data_dir=folder, file_format="array_record")
    if not made.exists():
      builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
    return builder.as_data_source()
  except Exception as error:
    if not made.exists():
      raise
    raise ValueError(
      f"The data set in {made} cannot be read ({type(error).__name__}: {error}). Delete that folder and start again; "
      "it will be made anew."
    ) from error
