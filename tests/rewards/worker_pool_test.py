"""The worker pool: an item that hangs, raises or ends its process affects no other item and not the caller."""

import os
import signal
import subprocess
import sys
import time

import pytest

from rspo_jax.rewards import worker_pool
from rspo_jax.rewards.worker_pool import Outcome, WorkerPool

ITEMS = """
import os, signal, sys, time

def run(item):
  action, *more = item if isinstance(item, tuple) else (item,)
  if action == "sleep":
    time.sleep(*more)
  elif action == "sleep, then pid":
    time.sleep(*more)
    return os.getpid()
  elif action == "hang":
    time.sleep(1e6)
  elif action == "deaf":
    for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
      signal.signal(number, signal.SIG_IGN)
    9 ** 9 ** 9 ** 9
  elif action == "c code":
    9 ** 9 ** 9 ** 9
  elif action == "write and hang":
    open(more[0], "w").write(str(os.getpid()))
    9 ** 9 ** 9 ** 9
  elif action == "raise":
    raise KeyError("one")
  elif action == "raise oddly":
    class Odd(Exception):
      def __str__(self):
        raise ValueError
    raise Odd
  elif action == "exit":
    sys.exit("bye")
  elif action == "end":
    os._exit(3)
  elif action == "unpicklable":
    return lambda: None
  elif action == "memory":
    return len(bytes(3 << 30))
  elif action == "pid":
    return os.getpid()
  elif action == "modules":
    return sorted(sys.modules)
  elif action == "large":
    return b"x" * more[0]
  return item

def prepare(argument):
  started = os.getpid()
  return lambda item: (argument, item, started == os.getpid())
"""


@pytest.fixture(autouse=True)
def _module(tmp_path, monkeypatch):
  (tmp_path / "pool_items.py").write_text(ITEMS)
  monkeypatch.syspath_prepend(tmp_path)


def make_pool(workers=2, timeout=1.0, **settings):
  return WorkerPool("pool_items:run", workers=workers, timeout=timeout, **settings)


def ok(*values):
  return [Outcome("ok", value) for value in values]


def alive(pid):
  try:
    with open(f"/proc/{pid}/stat") as stat:
      return stat.read().rpartition(")")[2].split()[0] != "Z"
  except FileNotFoundError:
    return False


def gone(pids, seconds=5.0):
  """Whether all of these processes end within `seconds`."""
  end = time.monotonic() + seconds
  while any(map(alive, pids)) and time.monotonic() < end:
    time.sleep(0.02)
  return not any(map(alive, pids))


def test_outcomes_are_in_the_order_of_the_items():
  items = [("sleep", 0.05) if number % 7 == 0 else number for number in range(200)]
  with make_pool() as pool:
    assert pool.map(items) == ok(*items)
    assert pool.map([]) == []
    assert pool.map([1]) == ok(1)


def test_consecutive_items_go_to_the_same_worker_until_another_is_idle():
  with make_pool() as pool:
    while len({outcome.value for outcome in pool.map([("sleep, then pid", 0.02)] * 2)}) < 2:
      pass  # one is still starting
    pids = [outcome.value for outcome in pool.map([("sleep, then pid", 0.1)] * 6 + [("sleep, then pid", 0.001)] * 6)]
  first, second = pids[0], pids[-1]
  assert first != second
  assert pids == [first] * pids.count(first) + [second] * pids.count(second)
  assert pids.count(second) > 6


@pytest.mark.parametrize("action", ["hang", "c code", "deaf"])
def test_an_item_is_killed_at_its_time_limit_and_others_are_unaffected(action):
  with make_pool() as pool:
    pool.map([0, 0])
    begin = time.monotonic()
    outcomes = pool.map([1, action, *range(50)])
    assert 1.0 <= time.monotonic() - begin < 10.0
    assert outcomes == [*ok(1), Outcome("timeout", "over 1 s"), *ok(*range(50))]
    assert pool.map([2, 3]) == ok(2, 3)


def test_hanging_items_are_killed_while_others_keep_answering():
  with make_pool(timeout=2.0) as pool:
    pool.map([0, 0])
    outcomes = pool.map(["hang", *[("sleep, then pid", 0.01)] * 400])
  assert [outcome.status for outcome in outcomes] == ["timeout", *["ok"] * 400]
  # The second worker replaced the one that hung, while items were still queued for both.
  assert len({outcome.value for outcome in outcomes[1:]}) == 2


@pytest.mark.parametrize(
  ("item", "status", "value"),
  [
    ("raise", "error", "KeyError: 'one'"),
    ("raise oddly", "error", "Odd"),
    ("exit", "error", "SystemExit: bye"),
    ("unpicklable", "error", "pickle"),
    ("memory", "error", "MemoryError"),
    ("end", "died", "exit status 3"),
  ],
)
def test_a_failing_item_affects_no_other(item, status, value):
  with make_pool(workers=1, memory_mib=2048) as pool:
    before, outcome, after = pool.map([1, item, 2])
  assert [before, after] == ok(1, 2)
  assert outcome.status == status
  assert value in outcome.value


def test_large_items_and_results_are_sent_while_another_item_hangs():
  with make_pool() as pool:
    outcomes = pool.map(["hang", ("large", 5_000_000), b"y" * 5_000_000, 3])
  assert [outcome.status for outcome in outcomes] == ["timeout", "ok", "ok", "ok"]
  assert (len(outcomes[1].value), len(outcomes[2].value)) == (5_000_000, 5_000_000)


def test_workers_are_replaced_after_recycle_items():
  with make_pool(workers=1, recycle=3) as pool:
    pids = [outcome.value for outcome in pool.map(["pid"] * 8)]
  assert [pids.count(pid) for pid in dict.fromkeys(pids)] == [3, 3, 2]
  assert gone(pids)


def test_a_worker_killed_while_idle_is_replaced():
  with make_pool(workers=1) as pool:
    (first,) = pool.map(["pid"])
    os.kill(first.value, signal.SIGKILL)
    assert gone([first.value])
    (second,) = pool.map(["pid"])
    assert second.status == "ok"
    assert second.value != first.value


def test_a_worker_loads_neither_jax_nor_the_callers_main_module_nor_our_package():
  assert "jax" in sys.modules
  with make_pool(workers=1) as pool:
    (modules,) = pool.map(["modules"])
  assert not {name.partition(".")[0] for name in modules.value} & {"jax", "numpy", "rspo_jax", "pytest"}


def test_with_an_argument_the_function_returns_the_function_to_run():
  with WorkerPool("pool_items:prepare", argument="{1}", workers=1, timeout=5.0) as pool:
    assert pool.map(["a", "b"]) == ok(("{1}", "a", True), ("{1}", "b", True))


def test_closing_ends_busy_and_idle_workers():
  pool = make_pool()
  pids = [worker._process.pid for worker in pool._workers]
  pool.close()
  assert gone(pids)
  with pytest.raises(RuntimeError, match="closed"):
    pool.map([1])


def test_answers_of_an_interrupted_batch_do_not_reach_the_next():
  class Unpicklable:
    def __reduce__(self):
      raise KeyboardInterrupt

  with make_pool(workers=2) as pool:
    with pytest.raises(KeyboardInterrupt):
      pool.map([("sleep", 0.2), Unpicklable()])
    assert pool.map([1, 2, 3, 4]) == ok(1, 2, 3, 4)


CALLER = """
import sys
from rspo_jax.rewards.worker_pool import WorkerPool
pool = WorkerPool("pool_items:run", workers=2, timeout=1.0)
pids = {outcome.value for outcome in pool.map([("sleep", 0.1), "pid", "pid", "pid"])}
print(*[worker._process.pid for worker in pool._workers], flush=True)
pool.map([("write and hang", sys.argv[1])])
"""


def test_workers_end_after_their_caller_is_killed_even_if_they_hang(tmp_path):
  written = tmp_path / "pid"
  environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.getcwd(), *sys.path])}
  command = [sys.executable, "-c", CALLER, str(written)]
  with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as caller:
    pids = [int(pid) for pid in caller.stdout.readline().split()]
    while not written.exists():
      time.sleep(0.02)
    assert all(map(alive, pids))
    caller.kill()
  assert gone(pids, 1.0 + worker_pool.ORPHAN_SECONDS + 3.0)


def test_a_function_that_cannot_be_loaded_is_an_error_after_a_few_starts(tmp_path, capfd):
  (tmp_path / "broken_items.py").write_text("raise ImportError('no such thing')\n")
  with (
    WorkerPool("broken_items:run", workers=1, timeout=1.0) as pool,
    pytest.raises(RuntimeError, match=r"broken_items:run fail to start \(exit status 1\)"),
  ):
    pool.map([1])
  assert "no such thing" in capfd.readouterr().err


@pytest.mark.parametrize(
  "path", ["no_such_module:run", "pool_items", "pool_items:", "json.nothing:run", ":run", "sys:exit"]
)
def test_unknown_function_paths_are_refused(path):
  with pytest.raises(ValueError, match="package.module:function"):
    WorkerPool(path, workers=1, timeout=1.0)


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"workers": 0}, "workers is 0"),
    ({"recycle": 0}, "recycle is 0"),
    ({"memory_mib": 0}, "memory_mib is 0"),
    ({"timeout": 0.0}, "timeout is 0"),
    ({"timeout": float("inf")}, "timeout is inf"),
    ({"timeout": float("nan")}, "timeout is nan"),
  ],
)
def test_settings_out_of_range_are_refused(settings, message):
  with pytest.raises(ValueError, match=message):
    make_pool(**settings)
