"""Data sets that are made here, kept in folders by TFDS: written as array_record files, read without TensorFlow."""

import contextlib
import fcntl
import io
import logging
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds


def folder_of(kind: type[tfds.core.GeneratorBasedBuilder], config: tfds.core.BuilderConfig, root: Path) -> Path:
  """The folder under the root that holds this configuration's files."""
  return root / kind.name / config.name / str(kind.VERSION)


def prepare(kind: type[tfds.core.GeneratorBasedBuilder], config: tfds.core.BuilderConfig, root: Path) -> dict[str, Any]:
  """{split: records} of the data set under a root folder, made first if it is not there.

  TFDS writes to a temporary folder and renames it, so what exists is whole. A lock keeps processes that start together
  from making it twice; the system drops it when a process dies. Reading needs no lock and no permission to write.

  Args:
    kind: has the splits 'train' and 'test'. config: its name says all that its records depend on.
  Raises:
    ValueError: what the builder raises for a spec that cannot be met, or files that cannot be read (names their folder
      and the cure).
  """
  tfds.disable_progress_bar()
  made = folder_of(kind, config, root)

  def builder():
    return kind(config=config, data_dir=root, file_format="array_record")

  with _quiet():
    if not made.exists():
      root.mkdir(parents=True, exist_ok=True)
      with open(root / f"{kind.name}.lock", "a") as lock:
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
