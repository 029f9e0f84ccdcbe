"""Metrics are written under documented names as valid JSON lines, and the file of a resumed run has no gap."""

import json
import logging

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from rspo_jax.run.metrics import METRICS, MetricsWriter, deterministic, read_metrics


def row(step, seconds=1.0):
  return {
    "reward/mean": jnp.float32(0.1 * step),
    "shift/layer_drift": jnp.arange(2.0) * step,
    "seconds/step": seconds,
    "updates/skipped": 0,
  }


def write_run(workdir, rows, seconds=1.0):
  with MetricsWriter(workdir) as writer:
    for phase, step in rows:
      writer.write(phase, step, row(step, seconds))


def lines(workdir):
  return [(r["phase"], r["step"]) for r in read_metrics(workdir / "metrics.jsonl")]


def scalars(workdir, phase):
  """(tag, step, value) of every scalar in the phase's event files, read from the record format."""
  found = []
  for path in sorted((workdir / "tensorboard" / phase).glob("events.*")):
    data, offset = path.read_bytes(), 0
    while offset < len(data):
      length = int.from_bytes(data[offset : offset + 8], "little")
      event = event_pb2.Event.FromString(data[offset + 12 : offset + 12 + length])
      offset += 8 + 4 + length + 4
      found += [(v.tag, event.step, v.simple_value) for v in event.summary.value]
  return found


def test_every_metric_name_is_group_slash_name_with_a_description():
  assert len(METRICS) > 40
  for name, meaning in METRICS.items():
    group, _, rest = name.partition("/")
    assert group.isidentifier(), name
    assert rest.isidentifier(), name
    assert meaning.endswith("."), name
    assert "\n" not in meaning, name


def test_a_row_is_read_back_with_its_types_and_bits(tmp_path):
  values = {
    "reward/mean": jnp.float32(0.1),
    "reward/std": 0.25,
    "policy/entropy": jnp.bfloat16(1.5),
    "shift/layer_drift": jnp.asarray([0.1, 0.2], jnp.bfloat16),
    "updates/skipped": jnp.int32(3),
    "length/max": np.int64(7),
  }
  with MetricsWriter(tmp_path) as writer:
    plain = writer.write("rl", 5, values)
  (got,) = read_metrics(tmp_path / "metrics.jsonl")
  assert list(got)[:3] == ["phase", "step", "time"]
  assert {k: v for k, v in got.items() if k in values} == plain
  assert (got["phase"], got["step"], got["updates/skipped"], got["length/max"]) == ("rl", 5, 3, 7)
  assert type(got["updates/skipped"]) is int
  assert got["reward/mean"] == float(np.float32(0.1))
  assert got["shift/layer_drift"] == [float(jnp.bfloat16(0.1)), float(jnp.bfloat16(0.2))]


def test_non_finite_values_are_valid_json_and_are_read_back(tmp_path):
  drift = [1.0, float("inf")]
  with MetricsWriter(tmp_path) as writer:
    writer.write("rl", 1, {"grad/norm": jnp.nan, "ratio/max": -jnp.inf, "shift/layer_drift": jnp.asarray(drift)})

  def refuse(constant):
    raise AssertionError(f"{constant} is not JSON")

  json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
  (got,) = read_metrics(tmp_path / "metrics.jsonl")
  assert np.isnan(got["grad/norm"])
  assert got["ratio/max"] == -np.inf
  assert got["shift/layer_drift"] == drift


def test_unknown_names_and_values_that_are_not_numbers_are_refused(tmp_path):
  with MetricsWriter(tmp_path) as writer:
    with pytest.raises(ValueError, match=r"unknown metric reward/avg;.*METRICS"):
      writer.write("rl", 1, {"reward/mean": 1.0, "reward/avg": 1.0})
    for bad in ("high", None, np.zeros((2, 2))):
      with pytest.raises(ValueError, match="metric reward/mean is"):
        writer.write("rl", 1, {"reward/mean": bad})
  assert not (tmp_path / "metrics.jsonl").exists()


def test_each_line_is_on_disk_when_write_returns(tmp_path):
  writer = MetricsWriter(tmp_path)
  for step in (1, 2):
    writer.write("rl", step, row(step))
    assert lines(tmp_path) == [("rl", s) for s in range(1, step + 1)]
  writer.close()


WHOLE = [("warm_start", s) for s in (1, 2, 3)] + [("rl", s) for s in (1, 2, 3, 4)]


@pytest.mark.parametrize(
  ("phase", "step", "kept"),
  [("rl", 2, 5), ("rl", 0, 3), ("warm_start", 2, 2), ("warm_start", 3, 3), ("warm_start", 0, 0), ("", 0, 0)],
)
def test_an_interrupted_run_has_the_same_rows_as_an_uninterrupted_one(tmp_path, phase, step, kept):
  whole, broken = tmp_path / "whole", tmp_path / "broken"
  whole.mkdir()
  broken.mkdir()
  write_run(whole, WHOLE)
  write_run(broken, WHOLE, seconds=9.0)
  with open(broken / "metrics.jsonl", "a") as file:
    file.write('{"phase": "rl", "step": 5, "rew')  # the kill
  with MetricsWriter(broken) as writer:
    writer.truncate(phase, step)
    assert lines(broken) == WHOLE[:kept]
    for rest_phase, rest_step in WHOLE[kept:]:
      writer.write(rest_phase, rest_step, row(rest_step, seconds=9.0))
  got, want = (read_metrics(d / "metrics.jsonl") for d in (broken, whole))
  assert got != want  # the clock
  assert [deterministic(r) for r in got] == [deterministic(r) for r in want]
  for name in ("warm_start", "rl"):
    events = [[s for s in scalars(d, name) if not s[0].startswith("seconds/")] for d in (broken, whole)]
    assert events[0] == events[1]
  assert not list(broken.glob("*.tmp")) + list(broken.glob(".*"))


def test_truncating_to_a_phase_without_rows_keeps_all_earlier_rows(tmp_path):
  write_run(tmp_path, WHOLE[:3])
  with MetricsWriter(tmp_path) as writer:
    writer.truncate("rl", 0)
  assert lines(tmp_path) == WHOLE[:3]


def test_truncating_a_new_run_does_nothing(tmp_path):
  with MetricsWriter(tmp_path) as writer:
    writer.truncate("", 0)
    writer.write("rl", 1, row(1))
  assert lines(tmp_path) == [("rl", 1)]


def test_incomplete_lines_are_skipped_and_named(tmp_path, caplog):
  write_run(tmp_path, WHOLE[:2])
  path = tmp_path / "metrics.jsonl"
  good = path.read_bytes().splitlines(keepends=True)
  path.write_bytes(good[0] + b"\xff\xfe{\n" + b"[1]\n" + b'{"step": 1}\n' + good[1] + good[1][:-1])
  with caplog.at_level(logging.WARNING):
    assert lines(tmp_path) == WHOLE[:2]
  messages = [r.getMessage() for r in caplog.records]
  assert len(messages) == 4
  for number, message in zip((2, 3, 4, 6), messages, strict=True):
    assert f"{path}, line {number}:" in message


def test_tensorboard_has_a_tag_for_each_vector_element_and_a_run_for_each_phase(tmp_path):
  write_run(tmp_path, [("warm_start", 1), ("rl", 3)])
  assert ("reward/mean", 1, pytest.approx(0.1)) in scalars(tmp_path, "warm_start")
  got = scalars(tmp_path, "rl")
  assert ("shift/layer_drift/00", 3, 0.0) in got
  assert ("shift/layer_drift/01", 3, 3.0) in got
  assert not any(tag in ("phase", "step", "time") for tag, _, _ in got)


def test_deterministic_leaves_out_only_the_fields_of_clock_and_machine():
  names = dict.fromkeys(METRICS, 1) | {"phase": "rl", "step": 1, "time": 2.0}
  left_out = set(names) - set(deterministic(names))
  assert left_out == {"time"} | {n for n in METRICS if n.split("/")[0] in ("seconds", "speed", "memory")}
