"""F3: the Countdown data set as a TFDS builder, written as array_record files and read without TensorFlow."""

import contextlib
import dataclasses
import fcntl
import io
import logging
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from rspo_jax.countdown import Problem, check
from rspo_jax.countdown_problems import CountdownSpec, Worked, make_problems

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
  verdicts = check(worked.right, problem, operators).why, check(worked.wrong, problem, operators).why
  if verdicts != ("right", "wrong value"):
    raise ValueError(f"{worked} has demonstrations that are judged {verdicts}, not right and wrong value")
  return worked


def folder_of(spec: CountdownSpec, root: Path) -> Path:
  """The folder under the root that holds this spec's files."""
  return root / Countdown.name / CountdownConfig.of(spec).name / str(Countdown.VERSION)


def prepare(spec: CountdownSpec, root: Path) -> dict[str, Any]:
  """{split: records} of the data set under a root folder, made first if it is not there.

  TFDS writes to a temporary folder and renames it, so what exists is whole. A lock keeps processes that start together
  from making it twice; the system drops it when a process dies. Reading needs no lock and no permission to write.

  Raises:
    ValueError: a spec that cannot be met, or files that cannot be read (names their folder and the cure).
  """
  tfds.disable_progress_bar()
  made = folder_of(spec, root)

  def builder():
    return Countdown(config=CountdownConfig.of(spec), data_dir=root, file_format="array_record")

  with _quiet():
    if not made.exists():
      root.mkdir(parents=True, exist_ok=True)
      with open(root / "countdown.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        builder().download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
    try:
      return {split: _fetch(builder().as_data_source(split)) for split in ("train", "test")}
    except Exception as error:
      raise ValueError(
        f"The data set in {made} cannot be read ({type(error).__name__}: {error}). Delete that folder and start "
        "again: it will be made anew."
      ) from error


def _fetch(source):
  """All records at once, which is three times as fast as one by one; the source itself if some cannot be read."""
  try:
    return source.__getitems__(range(len(source)))
  except Exception:
    return source  # whoever reads one by one finds out which


@contextlib.contextmanager
def _quiet():
  """TFDS prints a banner and warns that a configuration is not in its catalogue; neither is news here."""
  log = logging.getLogger("absl")
  level = log.level
  log.setLevel(logging.ERROR)
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      yield
  finally:
    log.setLevel(level)
