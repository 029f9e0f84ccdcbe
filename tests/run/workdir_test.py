"""A workdir belongs to one config, and its JSON files are written atomically."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from rspo_jax.run.workdir import claim_workdir, dump_json_atomic

CONFIG = {"seed": 0, "optimizer": {"learning_rate": 1e-3, "betas": (0.9, 0.99)}, "log": {"every": 5}, "workdir": "a"}


def test_the_same_config_is_accepted_again_and_free_keys_may_change(tmp_path):
  workdir = tmp_path / "runs" / "one"
  claim_workdir(workdir, CONFIG)
  claim_workdir(workdir, CONFIG)
  changed = CONFIG | {"workdir": "b", "log": {"every": 9}}
  claim_workdir(workdir, changed, free_keys=("workdir", "log"))
  assert json.loads((workdir / "config.json").read_text())["log"] == {"every": 9}


def test_another_config_is_refused_and_the_differing_keys_are_named(tmp_path):
  claim_workdir(tmp_path, CONFIG)
  before = (tmp_path / "config.json").read_bytes()
  other = {"seed": 1, "optimizer": {"learning_rate": 1e-3}, "log": {"every": 5}, "workdir": "b", "extra": "x"}
  with pytest.raises(ValueError, match="another config") as caught:
    claim_workdir(tmp_path, other)
  lines = str(caught.value).splitlines()
  assert lines[0].startswith(str(tmp_path))
  assert lines[1:-1] == [
    '  extra: (absent) -> "x"',
    "  optimizer.betas: [0.9, 0.99] -> (absent)",
    "  seed: 0 -> 1",
  ]
  assert "--workdir" in lines[-1]
  assert (tmp_path / "config.json").read_bytes() == before


def test_an_unusable_workdir_is_refused(tmp_path):
  file = tmp_path / "file"
  file.write_text("x")
  for path in (file, file / "below"):
    with pytest.raises(ValueError, match="cannot be used"):
      claim_workdir(path, CONFIG)
  (tmp_path / "old" / "checkpoints").mkdir(parents=True)
  with pytest.raises(ValueError, match=r"no config\.json"):
    claim_workdir(tmp_path / "old", CONFIG)
  for broken in ("{", "[1]"):
    (tmp_path / "config.json").write_text(broken)
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
      claim_workdir(tmp_path, CONFIG)


def test_json_is_replaced_completely_or_not_at_all(tmp_path):
  path = tmp_path / "summary.json"
  dump_json_atomic(path, {"a": np.float32(0.5), "b": jnp.arange(2), "c": (1, 2)})
  assert json.loads(path.read_text()) == {"a": 0.5, "b": [0, 1], "c": [1, 2]}
  with pytest.raises(ValueError, match="JSON"):
    dump_json_atomic(path, {"a": float("nan")})
  with pytest.raises(TypeError):
    dump_json_atomic(path, {"a": object()})
  assert json.loads(path.read_text())["a"] == 0.5
  assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]
