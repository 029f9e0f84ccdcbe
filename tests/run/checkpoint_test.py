"""Checkpoints are restored bitwise, survive kills and damage, and refuse states of another model."""

import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rspo_jax.run.checkpoint import CheckpointError, CheckpointMismatchError, Checkpoints
from rspo_jax.run.fingerprints import fingerprints
from rspo_jax.run.leaves import abstract
from rspo_jax.types import TrainState
from tests.support.paths import ROOT

# After a damaged read Orbax cancels its other reads, which warn when they are garbage-collected.
pytestmark = [
  pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
  pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning"),
]


def make_mesh(*shape):
  devices = np.array(jax.devices()[: int(np.prod(shape))])
  return Mesh(devices.reshape(shape), ("data", "fsdp")[: len(shape)])


def make_state(seed=0, mesh=None, width=8):
  """A small TrainState with the structure of a real one: nested params, two dtypes, a nested optax state."""
  params = {
    "embed": {"table": jax.random.normal(jax.random.key(seed), (16, width))},
    "layers": [{"w": jnp.full((width, 4), seed, jnp.bfloat16)}, {"w": jnp.arange(4.0)}],
  }
  tx = optax.apply_if_finite(
    optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.warmup_constant_schedule(0.0, 1e-3, 5))), 10
  )
  state = TrainState(params, tx.init(params), jnp.int32(seed))
  mesh = mesh or make_mesh(1)

  def place(x):
    spec = PartitionSpec(*mesh.axis_names) if x.ndim == 2 and x.shape[0] % mesh.size == 0 else PartitionSpec()
    return jax.device_put(x, NamedSharding(mesh, spec))

  return jax.tree.map(place, state)


def assert_same(got, want):
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def save_steps(workdir, steps, **kwargs):
  with Checkpoints(workdir, **kwargs) as checkpoints:
    for step in steps:
      checkpoints.save(step, make_state(step), {"phase": "rl", "data": {"next_index": step}}, {"eval/success": 0.5})


def test_state_meta_and_step_are_restored_exactly(tmp_path):
  state = make_state(3)
  meta = {"phase": "rl", "data": {"next_index": 7, "epoch": {}}, "seed": 0, "none": None, "list": [1, 2.5, "x"]}
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.restore(state) is None
    assert checkpoints.save(3, state, meta) is True
    assert checkpoints.save(3, state, meta) is False
  with Checkpoints(tmp_path) as checkpoints:
    restored = checkpoints.restore(abstract(state))
  assert (restored.meta, restored.step) == (meta, 3)
  assert isinstance(restored.state, TrainState)
  assert isinstance(restored.state.opt_state, optax.ApplyIfFiniteState)
  assert_same(restored.state, state)


def test_restored_state_has_the_requested_shardings_not_the_saved_ones(tmp_path):
  save_mesh, load_mesh = make_mesh(4), make_mesh(2, 2)
  state = make_state(1, save_mesh)
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, state, {})
    requested = abstract(make_state(1, load_mesh))
    restored = checkpoints.restore(requested)
  assert_same(restored.state, state)
  for got, want in zip(jax.tree.leaves(restored.state), jax.tree.leaves(requested), strict=True):
    assert got.sharding == want.sharding
  assert len(restored.state.params["embed"]["table"].sharding.device_set) == 4


def test_state_may_be_donated_while_it_is_being_saved(tmp_path):
  state = {"w": jnp.zeros((512, 1024))}
  want = fingerprints(state)
  step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(0, state, {})
    for _ in range(3):
      state = step(state)
    jax.block_until_ready(state)
    checkpoints.wait()
    assert fingerprints(checkpoints.restore(state).state) == want


def test_the_newest_and_the_best_steps_are_kept(tmp_path):
  state = {"w": jnp.zeros(3)}
  success = {1: 0.2, 2: 0.9, 3: 0.9, 4: 0.1, 5: float("nan"), 6: None, 7: 0.3}
  with Checkpoints(tmp_path, keep=2) as checkpoints:
    assert checkpoints.best_step() is None
    for step, value in success.items():
      checkpoints.save(step, state, {"at": step}, None if value is None else {"eval/success": value})
  with Checkpoints(tmp_path, keep=2) as checkpoints:
    assert checkpoints.steps() == [3, 6, 7]
    assert checkpoints.latest_step() == 7
    assert checkpoints.best_step() == 3
    assert checkpoints.restore_step(3, state).meta == {"at": 3}
    assert checkpoints.restore(state).step == 7


def test_an_older_step_a_missing_step_and_a_read_only_save_are_refused(tmp_path):
  save_steps(tmp_path, [5])
  with Checkpoints(tmp_path) as checkpoints:
    with pytest.raises(ValueError, match=r"step 4 is older than .*checkpoints/5.*--workdir"):
      checkpoints.save(4, make_state(), {})
    with pytest.raises(ValueError, match=r"no checkpoint at .*checkpoints/9; the steps there are \[5\]"):
      checkpoints.restore_step(9, make_state())
    with pytest.raises(ValueError, match="cannot be kept as JSON"):
      checkpoints.save(6, make_state(), {"bad": object()})
    with pytest.raises(ValueError, match=r"leaf \['w'\].*no sharding"):
      checkpoints.restore({"w": jax.ShapeDtypeStruct((2,), jnp.float32)})
  with Checkpoints(tmp_path, read_only=True) as reader:
    with pytest.raises(ValueError, match="read-only"):
      reader.save(6, make_state(), {})
    assert reader.restore(make_state()).step == 5
  with pytest.raises(ValueError, match="keep is 0"):
    Checkpoints(tmp_path, keep=0)
  with pytest.raises(ValueError, match="no checkpoints at"):
    Checkpoints(tmp_path / "nowhere", read_only=True)


def test_another_model_is_refused_and_the_differing_leaves_are_named(tmp_path):
  save_steps(tmp_path, [1, 2])
  other = make_state(width=12)
  other = other.replace(params=other.params | {"head": jnp.zeros((2,))}, step=other.step.astype(jnp.uint32))
  with Checkpoints(tmp_path) as checkpoints, pytest.raises(CheckpointMismatchError) as caught:
    checkpoints.restore(other)
  message = str(caught.value)
  assert f"{tmp_path / 'checkpoints' / '2'}" in message
  assert ".params['embed']['table']: float32[16, 8] -> float32[16, 12]" in message
  assert ".params['head']: absent -> float32[2]" in message
  assert ".step: int32[] -> uint32[]" in message
  assert ".params['layers'][1]['w']" not in message  # the same in both
  assert "--workdir" in message


def checkpoint_files(workdir, step):
  return sorted(p for p in (workdir / "checkpoints" / str(step)).rglob("*") if p.is_file())


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_damage_to_any_file_of_the_newest_checkpoint_is_detected_or_harmless(tmp_path, damage, caplog):
  """For each file: restore gives the newest state bitwise, or the previous one with a warning."""
  save_steps(tmp_path, [1, 2])
  states = {1: make_state(1), 2: make_state(2)}
  fallen_back = 0
  for path in checkpoint_files(tmp_path, 2):
    whole = path.read_bytes()
    if damage == "truncate":
      path.write_bytes(whole[: len(whole) // 2])
    elif damage == "remove":
      path.unlink()
    else:
      middle = len(whole) // 2
      path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 0x10]) + whole[middle + 1 :] if whole else b"?")
    caplog.clear()
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
      restored = checkpoints.restore(states[1])
    assert_same(restored.state, states[restored.step])
    assert restored.meta == {"phase": "rl", "data": {"next_index": restored.step}}
    if restored.step == 1:
      fallen_back += 1
      warnings = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
      assert any(f"checkpoint {tmp_path / 'checkpoints' / '2'} cannot be read" in w for w in warnings)
    path.write_bytes(whole)
  assert fallen_back >= 2  # at least for the arrays and for the metadata


def test_an_empty_step_folder_is_skipped_and_unrelated_files_are_ignored(tmp_path):
  """An interrupted deletion leaves such a folder."""
  save_steps(tmp_path, [1, 2])
  shutil.rmtree(tmp_path / "checkpoints" / "2")
  (tmp_path / "checkpoints" / "2").mkdir()
  (tmp_path / "checkpoints" / "notes.txt").write_text("x")
  (tmp_path / "checkpoints" / "old").mkdir()
  with Checkpoints(tmp_path, keep=1) as checkpoints:
    assert checkpoints.restore(make_state()).step == 1
    assert checkpoints.best_step() == 1
    checkpoints.save(3, make_state(3), {})
    checkpoints.wait()
    assert checkpoints.restore(make_state()).step == 3


def test_a_flipped_bit_in_raw_array_data_is_detected(tmp_path):
  """Random mantissas are stored uncompressed, so only the fingerprints protect them."""
  state = {"w": jax.random.normal(jax.random.key(0), (256, 256))}
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, state, {})
  path = max(checkpoint_files(tmp_path, 1), key=lambda p: p.stat().st_size)
  whole = path.read_bytes()
  rng = random.Random(0)
  for _ in range(5):
    at = rng.randrange(len(whole))
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :])
    with Checkpoints(tmp_path, read_only=True) as checkpoints, pytest.raises(CheckpointError):
      checkpoints.restore(state)


def test_after_falling_back_the_run_saves_the_damaged_step_again(tmp_path):
  save_steps(tmp_path, [1, 2])
  max(checkpoint_files(tmp_path, 2), key=lambda p: p.stat().st_size).write_bytes(b"")
  with Checkpoints(tmp_path, keep=1) as checkpoints:
    assert checkpoints.restore(make_state()).step == 1
    assert checkpoints.latest_step() == 1
    checkpoints.save(2, make_state(2), {"again": True}, {"eval/success": 0.5})
    checkpoints.wait()
    assert checkpoints.restore(make_state()).meta == {"again": True}
  assert len(list((tmp_path / "unreadable").glob("2-*"))) == 1
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.steps() == [2]


def test_if_no_checkpoint_can_be_read_the_error_names_all_of_them_and_the_cure(tmp_path):
  save_steps(tmp_path, [1, 2])
  for step in (1, 2):
    max(checkpoint_files(tmp_path, step), key=lambda p: p.stat().st_size).write_bytes(b"")
  with Checkpoints(tmp_path) as checkpoints, pytest.raises(CheckpointError) as caught:
    checkpoints.restore(make_state())
  message = str(caught.value)
  assert str(tmp_path / "checkpoints" / "1") in message
  assert str(tmp_path / "checkpoints" / "2") in message
  assert "--workdir" in message


def test_a_load_that_fails_once_is_retried_and_its_traceback_is_logged(tmp_path, monkeypatch, caplog):
  save_steps(tmp_path, [1, 2])
  with Checkpoints(tmp_path) as checkpoints:
    load, calls = checkpoints._load, []

    def flaky(step, requested):
      calls.append(step)
      if len(calls) == 1:
        raise RuntimeError("for an unknown reason")
      return load(step, requested)

    monkeypatch.setattr(checkpoints, "_load", flaky)
    assert checkpoints.restore(make_state()).step == 2
  assert calls == [2, 2]
  assert "Traceback" in caplog.text
  assert "for an unknown reason" in caplog.text


SAVER = """
import sys
import jax, jax.numpy as jnp
from rspo_jax.run.checkpoint import Checkpoints
jax.config.update("jax_platforms", "cpu")
with Checkpoints(sys.argv[1], keep=1) as checkpoints:
  template = {"w": jnp.zeros((256, 256)), "step": jnp.int32(0)}
  restored = checkpoints.restore(template)
  step = restored.step if restored else 0
  if restored:
    assert restored.meta["step"] == step == int(restored.state["step"])
    assert bool((restored.state["w"] == step).all())
  print("ready", step, flush=True)
  while True:
    step += 1
    state = {"w": jnp.full((256, 256), float(step)), "step": jnp.int32(step)}
    checkpoints.save(step, state, {"step": step}, {"eval/success": step})
    print("saving", step, flush=True)
"""


def start_saver(workdir):
  env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
  return subprocess.Popen(
    [sys.executable, "-c", SAVER, str(workdir)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
  )


def test_a_run_killed_while_it_saves_continues_from_the_newest_complete_step(tmp_path):
  rng = random.Random(0)
  last = 0
  for _ in range(3):
    saver = start_saver(tmp_path)
    ready = saver.stdout.readline().split()
    assert ready[:1] == ["ready"], saver.communicate()[1]
    assert int(ready[1]) >= max(last - 1, 0)  # save N had started, so save N - 1 was complete
    while True:
      last = int(saver.stdout.readline().split()[1])
      if last >= int(ready[1]) + 4:
        break
    time.sleep(rng.uniform(0.0, 0.1))
    saver.send_signal(signal.SIGKILL)
    saver.wait()
    rest = saver.stdout.read().split()
    last = int(rest[-1]) if rest and rest[-1].isdigit() and len(rest) % 2 == 0 else last
    saver.stderr.close()
  template = {"w": jnp.zeros((256, 256)), "step": jnp.int32(0)}
  with Checkpoints(tmp_path) as checkpoints:
    restored = checkpoints.restore(template)
    assert last - 1 <= restored.step <= last
    assert bool((restored.state["w"] == restored.step).all())
  left_behind = [p.name for p in (tmp_path / "checkpoints").iterdir() if not p.name.isdigit()]
  assert left_behind == []


def test_a_second_process_on_the_same_workdir_is_refused(tmp_path):
  saver = start_saver(tmp_path)
  try:
    assert saver.stdout.readline().startswith("ready")
    with pytest.raises(ValueError, match=r"another process is writing to .*--workdir"):
      Checkpoints(tmp_path)
    Checkpoints(tmp_path, read_only=True).close()
  finally:
    saver.kill()
    saver.communicate()
  Checkpoints(tmp_path).close()


def test_fingerprints_detect_one_bit_and_a_swap_and_are_independent_of_the_sharding():
  sharding = NamedSharding(make_mesh(2, 2), PartitionSpec("fsdp", "data"))
  for dtype in (jnp.float32, jnp.bfloat16, jnp.uint8, jnp.bool_):
    base = (np.arange(32).reshape(8, 4) % 2).astype(dtype)
    bit, columns, rows = base.copy(), base.copy(), base.copy()
    bit.view(np.uint8)[5, 0] ^= 1
    columns[0] = columns[0, ::-1]
    rows[:2, 0] = [1, 0]  # was [0, 0]
    rows[2:4, 0] = [0, 0]
    tables = [jnp.asarray(x) for x in (base, bit, columns, rows)]
    prints = fingerprints(tables)
    assert prints[0] not in prints[1:]
    assert fingerprints([jax.device_put(x, sharding) for x in tables]) == prints
  assert fingerprints([jnp.float32(0.0)]) != fingerprints([jnp.float32(-0.0)])
