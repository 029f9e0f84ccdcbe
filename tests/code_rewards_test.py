"""Code rewards: right programs earn 1, wrong ones 0, and no trick gets a verdict or does harm."""

import contextlib
import dataclasses
import gzip
import json
import os
import pathlib
import re
import select
import socket
import textwrap
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rspo_jax import code_guests, sandbox
from rspo_jax.code_guests import Handle, decode, encode
from rspo_jax.code_rewards import CodeReward, CodeTask, extract_code, judge, task_of
from rspo_jax.data import Example
from rspo_jax.rewards import RewardResult, score_completions
from rspo_jax.sandbox import Sandbox, find_sandbox, sandbox_of
from rspo_jax.sandbox_process import Limits
from tests.code_attacks import RED_TEAM, SECRET

LIMITS = Limits(wall_seconds=30.0, cpu_seconds=1, memory_bytes=256 * 2**20, output_bytes=200_000)
HUMANEVAL = pathlib.Path(__file__).parent.parent.parent / "shared" / "data" / "humaneval.jsonl.gz"


@pytest.fixture(scope="module")
def box():
  try:
    return find_sandbox()
  except RuntimeError as error:
    pytest.skip(str(error)[:300])


def verdict(box, completion, task):
  return judge(completion, task if isinstance(task, CodeTask) else task_of(task), sandbox=box, limits=LIMITS)


def attack_on(box, name, task, traps=None):
  """The verdict on one of the red team, its words in capitals replaced."""
  program = textwrap.dedent(RED_TEAM[name])
  for word, value in (traps or {}).items():
    program = program.replace(word, value)
  return verdict(box, program, task)


# What travels between candidate and checker.

HASHABLE = st.recursive(
  st.none() | st.booleans() | st.integers() | st.integers(-(10**40), 10**40) | st.text() | st.binary()
  | st.floats(allow_nan=False) | st.complex_numbers(allow_nan=False),
  lambda inner: st.lists(inner, max_size=4).map(tuple) | st.frozensets(inner, max_size=4),
  max_leaves=6,
)  # fmt: skip
VALUES = st.recursive(
  HASHABLE,
  lambda inner: (
    st.lists(inner, max_size=4) | st.dictionaries(HASHABLE, inner, max_size=4) | st.sets(HASHABLE, max_size=4)
  ),
  max_leaves=12,
)


def shape(value):
  """A value with the types of all that is in it, for True == 1 == 1.0."""
  if isinstance(value, dict):
    return [(shape(key), shape(item)) for key, item in value.items()]
  if isinstance(value, (list, tuple)):
    return type(value), [shape(item) for item in value]
  if isinstance(value, (set, frozenset)):
    return type(value), sorted(repr(shape(item)) for item in value)
  return type(value), repr(value)


@settings(max_examples=60, deadline=None)
@given(VALUES)
def test_values_arrive_as_they_were(value):
  assert shape(decode(json.loads(json.dumps(encode(value))))) == shape(value)


def test_iterables_arrive_as_iterators_and_ranges_as_ranges():
  def sent(value):
    return decode(json.loads(json.dumps(encode(value))))

  assert list(sent(character for character in "abc")) == ["a", "b", "c"]
  assert sorted(sent({1: "x", 2: "y"}.keys())) == [1, 2]
  assert sent(range(10**18)) == range(10**18)
  assert next(sent(zip([1], [2.0], strict=True))) == (1, 2.0)


def test_objects_of_a_class_arrive_as_what_they_are_made_of():
  class Same(str):
    def __eq__(self, other):
      return True

    __hash__ = str.__hash__

  received = decode(json.loads(json.dumps(encode(Same("a")))))
  assert type(received) is str and received != "b"


def test_a_handle_says_nothing_about_its_object():
  kept = []
  handle = decode(encode(object(), lambda value: kept.append(value) or 0))
  for question in (bool, hash, lambda it: it == 1, lambda it: it != 1, lambda it: it in [1], len, list, float):
    with pytest.raises(TypeError):
      question(handle)
  assert decode(encode(handle), kept.__getitem__) is kept[0]
  with pytest.raises(TypeError, match="function cannot be handed"):
    encode(lambda: None)
  assert isinstance(handle, Handle)


# Finding the program in a completion.


@pytest.mark.parametrize(
  ("completion", "code"),
  [
    ("  return 1\n", "  return 1\n"),
    ("Think.\n```python\nx = 1\n```\nNo:\n```python\nx = 2\n```\nDone.", "x = 2\n"),
    ("```py\nx = 1\n```\noutput:\n```\n1\n```", "x = 1\n"),
    ("```\nx = 1\n```", "x = 1\n"),
    ("```Python3\nx = 1", "x = 1"),
    ("  ```python\n  x = 1\n  ```", "  x = 1\n"),
    ("```python\nx = '''\n```js\n'''\n```", "x = '''\n```js\n'''\n"),
    ("  return 1\n```", "  return 1\n```"),
    ("", ""),
  ],
)
def test_the_last_python_block_is_the_program(completion, code):
  assert extract_code(completion) == code


PROMPT = 'from math import floor\n\ndef half(x):\n  """Half of x, rounded down."""\n'


@pytest.mark.parametrize(
  "text",
  [
    "  return floor(x / 2)\n",
    "  return floor(x / 2)\n\ndef other():\n  pass\n",
    "  return floor(x / 2)\n\nThis halves x.\n",
    "  return floor(x / 2)\n```\nmore",
    "def half(x):\n  return floor(x / 2)\n",
    "from __future__ import annotations\ndef half(x: int):\n  return x // 2\n",
    "half = lambda x: x // 2",
  ],
)
def test_a_completion_goes_on_where_the_prompt_ends_or_is_a_whole_program(text):
  names = {}
  exec(code_guests.assemble(PROMPT, text, "half"), names)
  assert names["half"](7) == 3


@pytest.mark.parametrize("text", ["", " \n", "The answer is 3.", "def half(x:", "x = '\0'", "  return ("])
def test_what_does_not_compile_is_no_program(text):
  assert code_guests.assemble("", text, "half") is None


# Records of data sets.


def test_records_are_read_by_their_field_names():
  humaneval = {"task_id": "1", "prompt": "p", "test": "t", "entry_point": "f", "canonical_solution": "c"}
  assert task_of(humaneval) == CodeTask(prompt="p", test="t", entry_point="f")
  mbpp = {"prompt": "Write ...", "code": "c", "test_imports": ["import math"], "test_list": ["assert f(1) == 2"]}
  assert task_of(mbpp) == CodeTask(setup="import math\n", asserts=("assert f(1) == 2",))
  cases = CodeTask(cases=(("1", "2"), ("3", "4")))
  pairs = {"inputs": ["1", "3"], "outputs": ["2", "4"]}
  for record in (
    pairs,
    {"input_output": pairs},
    {"input_output": json.dumps(pairs)},
    {"cases": [["1", "2"], ["3", "4"]]},
  ):
    assert task_of(record) == cases


@pytest.mark.parametrize(
  ("record", "message"),
  [
    ({"prompt": "x"}, "no tests among prompt; want exactly one of"),
    ({"test": "x", "cases": []}, "cases, test among cases, test; want exactly one"),
    ({"test": "x", "prompt": "x"}, "lacks entry_point"),
    ({"test_list": []}, "want a list of assert statements"),
    ({"inputs": ["1"], "outputs": []}, "1 inputs for 0 outputs"),
    ({"cases": []}, "want pairs of text"),
    ({"cases": [["1", 2]]}, "want pairs of text"),
  ],
)
def test_records_without_usable_tests_are_refused(record, message):
  with pytest.raises(ValueError, match=message):
    task_of(record)


# Right and wrong programs.

CHECKED = {
  "prompt": PROMPT,
  "entry_point": "half",
  "test": """
def check(candidate):
  print('["right", ""]')
  assert candidate(7) == 3
  assert candidate(x=-1) == -1, str(candidate(-1))
  assert all(candidate(floor(n)) == n // 2 for n in range(20))
  try:
    candidate("x")
  except TypeError:
    return
  assert False
""",
}


@pytest.mark.parametrize(
  ("completion", "why"),
  [
    ("  return floor(x / 2)\n", "right"),
    ("Here:\n```python\ndef half(x):\n  print('half of', x)\n  return x // 2\n```", "right"),
    ("  return x // 2 + 1\n", "wrong answer"),
    ("  return None\n", "wrong answer"),
    ("  return x // 2 if x > 0 else 0\n", "wrong answer"),
    ("  return int(x) // 2\n", "error"),
    ("  return 1 / 0\n", "error"),
    ("  return object()\n", "error"),
    ("  pass\n", "wrong answer"),
    ("other = 1\n", "wrong answer"),
    ("  return ((\n", "no code"),
    ("", "no code"),
    ("```python\n```", "no code"),
  ],
)
def test_a_function_is_judged_by_check(box, completion, why):
  found = verdict(box, completion, CHECKED)
  assert (found.success, found.why) == (why == "right", why), found


@pytest.mark.parametrize(
  ("asserts", "why"),
  [
    (["assert total([1, 2]) == 3", "assert set(pairs(2)) == {(0, 1)}"], "right"),
    (["assert total([1, 2]) == 4"], "wrong answer"),
    (["assert math.isclose(total([0.1, 0.2]), 0.3)"], "right"),
    (["assert sum(10, 15) == 6", "assert sum(100, 150) == 93"], "right"),
    (["assert weight(Box(3, kind='x')) == 3"], "right"),
    (["assert Box(3, kind='x') == Box(3, kind='x')"], "error"),
    (["assert all(total(x) == y for x, y in [([1], 1), ([], 0)])"], "right"),
    (["assert missing(1) == 1"], "error"),
    (["assert True"], "error"),
  ],
)
def test_a_program_is_judged_by_asserts(box, asserts, why):
  program = """
import collections, math
def total(numbers): return math.fsum(numbers)
def pairs(n): return collections.deque([(i, j) for j in range(n) for i in range(j)])
def sum(a, b): return {10: 6, 100: 93}[a]
class Box:
  def __init__(self, weight, kind): self.weight = weight
  def __eq__(self, other): return True
def weight(box): return box.weight
"""
  found = verdict(box, program, {"test_list": asserts})
  assert found.why == why, found


def test_builtins_in_asserts_are_not_the_candidates(box):
  program = "def f(x): return 0\ndef set(*_): return 1\nabs = len = set"
  for statement in ("set(f(1)) == set([1])", "abs(f(2) - 7) < 1e-6", "f(0) == 0 and len(f(3)) == 1"):
    asserts = ["assert f(9) == 0", f"assert {statement}"]
    assert not verdict(box, program, {"test_list": asserts}).success


ECHO = {"inputs": ["2\n1 2\n3 4\n", "0\n"], "outputs": ["3\n7\n", ""]}


@pytest.mark.parametrize(
  ("program", "why"),
  [
    ("for _ in range(int(input())): print(sum(map(int, input().split())))", "right"),
    ("for _ in range(int(input())): print(sum(map(int, input().split())), '  ')\nprint()", "right"),
    ("if __name__ == '__main__':\n  for _ in range(int(input())): print(sum(map(int, input().split())))", "right"),
    ("for _ in range(int(input())): print(sum(map(int, input().split())))\nraise SystemExit(0)", "right"),
    ("for _ in range(int(input())): print(sum(map(int, input().split())))\nraise SystemExit(1)", "error"),
    ("for _ in range(int(input())): print('', sum(map(int, input().split())))", "wrong answer"),
    ("for _ in range(int(input())): print(sum(map(int, input().split())), end=' ')", "wrong answer"),
    ("print(3)\nprint(7)", "wrong answer"),
    ("print(input(input(input(input()))))", "error"),
    ("raise SystemExit(0)", "wrong answer"),
    ("import os; os._exit(0)", "wrong answer"),
    ("while True: pass", "timeout"),
    ("x = bytearray(10**12)", "memory"),
    ("while True: print('spam')", "output"),
    ("This adds numbers.", "no code"),
  ],
)
def test_a_program_is_judged_by_what_it_writes(box, program, why):
  found = verdict(box, program, ECHO)
  assert (found.success, found.why) == (why == "right", why), found


def test_methods_can_be_tested_and_exceptions_keep_their_kind(box):
  test = """
def check(candidate):
  assert candidate(2) == 4
  try:
    candidate(-1)
  except ValueError as error:
    assert str(error) == "no"
  else:
    assert False
"""
  task = CodeTask(test=test, entry_point="Solution().square")
  program = """
class Mine(ValueError): pass
class Solution:
  def square(self, x):
    if x < 0: raise Mine('no')
    return x * x
"""
  assert verdict(box, program, task).why == "right"
  assert not verdict(box, program.replace("x * x", "x + 3"), task).success


# Programs that want a verdict they have not earned, or harm.


class Watched:
  """A sandbox whose processes all hold one pipe open: who is left at the end can be seen there."""

  def __init__(self, box, writer):
    self._box, self._writer = box, writer

  def start(self, program, *, fds, **options):
    return self._box.start(program, fds=(*fds, self._writer), **options)


@pytest.fixture
def witness(tmp_path, monkeypatch):
  """Puts a case's traps up; afterwards nothing may have happened."""
  secret, harm = tmp_path / "kept" / "secret", tmp_path / "harm"
  secret.parent.mkdir()
  secret.write_text("hunter2 expected-")
  monkeypatch.setenv("RSPO_JAX_SECRET", "hunter2")
  reader, writer = os.pipe()
  try:
    with socket.create_server(("127.0.0.1", 0)) as server:
      traps = {"SECRET": str(secret), "HARM": str(harm), "PORT": str(server.getsockname()[1])}
      yield traps, writer
      os.close(writer)
      while select.select([reader], [], [], 10)[0] and os.read(reader, 4096):
        pass  # some attacks write to whatever is open
      assert select.select([reader], [], [], 0)[0], "a process is left"
      server.settimeout(0.05)
      with pytest.raises(TimeoutError):
        server.accept()
    assert secret.read_text() == "hunter2 expected-"
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
  finally:
    with contextlib.suppress(OSError):
      os.close(writer)
    os.close(reader)


@pytest.mark.parametrize("attack", RED_TEAM)
def test_no_attack_succeeds_or_does_harm(box, attack, witness):
  traps, writer = witness
  found = attack_on(Watched(box, writer), attack, SECRET, traps)
  assert not found.success and found.why != "right", found
  assert "hunter2" not in found.detail
  if "found" in RED_TEAM[attack]:
    assert "found" not in found.detail


def test_the_red_team_would_pass_if_it_knew_the_answer(box):
  assert verdict(box, "def secret(x): return f'expected-{4697 + x}'", SECRET).why == "right"


def test_namespaces_alone_hold_without_a_filter(box, witness):
  # As where libseccomp is missing. Six forks are 64 processes.
  traps, writer = witness
  for attack in ("fork bomb", "leaves a daemon", "kills its parents", "network"):
    assert not attack_on(Watched(Sandbox(box.isolation, b""), writer), attack, SECRET, traps).success
  time.sleep(1.2)  # the daemon would have written by now


@pytest.mark.parametrize(
  ("attack", "why"),
  [
    ("memory bomb", "memory"),
    ("endless output", "output"),
    ("endless answer", "output"),
    ("endless loop", "timeout"),
    ("exits with 0", "error"),
  ],
)
def test_an_attack_is_called_by_its_name(box, attack, why):
  assert attack_on(box, attack, SECRET).why == why


@pytest.mark.parametrize(
  "test",
  [
    "assert all(map(candidate, [1, 2]))",
    "for _ in map(candidate, [1]): return\n  assert False",
    "try: candidate(1)\n  except: pass",
    "try: candidate(1)\n  except Exception: pass\n  try: candidate(2)\n  except BaseException: pass",
    "assert candidate(1) or True",
    "pass",
  ],
)
def test_tests_that_swallow_errors_do_not_excuse_a_candidate_that_leaves_or_stops_loops(box, test):
  task = CodeTask(test=f"def check(candidate):\n  {test}\n", entry_point="f")
  for body in ("raise StopIteration", "import os; os._exit(0)", "raise SystemExit"):
    swallowed = "except" in test and body == "raise StopIteration"  # an error like any other
    assert verdict(box, f"def f(x): {body}", task).success == swallowed


def test_an_answer_that_grows_in_the_tests_hands_harms_only_them(box):
  task = {"test_list": ["assert list(f(1)) == [1]"]}
  assert verdict(box, "def f(x): return range(10**12)", task).why == "memory"


def test_a_program_on_stdin_cannot_read_what_is_expected(box, witness):
  program = textwrap.dedent(RED_TEAM["looks for the answer in files and processes"])
  program = program.replace("SECRET", witness[0]["SECRET"]) + "\nprint(secret(0))"
  found = verdict(box, program, {"cases": [["", "expected-4711"]]})
  assert (found.success, found.why) == (False, "wrong answer") and "None" in found.detail


# Rewards.


def test_a_right_program_earns_one_and_any_other_nothing(box):
  reward, example = CodeReward(), Example(PROMPT, CHECKED)
  for gold in (CHECKED, task_of(CHECKED)):
    assert reward("  return x // 2\n", example._replace(gold=gold)) == RewardResult(1.0, True, True, "right")
  assert reward("  return x\n", example) == RewardResult(0.0, False, True, "wrong answer")
  prose = reward("It is easy.", Example("", {"test_list": ["assert f(1) == 1"]}))
  assert prose == RewardResult(0.0, False, False, "no code")


def test_a_batch_is_judged_side_by_side_and_stays_in_order(box):
  texts = ["  return x // 2\n", "  return x\n", "  import os; os._exit(0)\n", "  return ("] * 3
  scores = score_completions(CodeReward(workers=3), texts, [Example(PROMPT, CHECKED)] * len(texts))
  assert scores.success.tolist() == scores.reward.tolist() == [True, False, False, False] * 3
  assert scores.why == ("right", "wrong answer", "error", "no code") * 3


def test_settings_of_the_reward_are_checked(box):
  assert CodeReward(cpu_seconds=1)("  while True: pass\n", Example(PROMPT, CHECKED)).why == "timeout"
  for settings_, message in (
    ({"workers": 0}, "workers is 0"),
    ({"seconds": 1}, "no limit seconds"),
    ({"cpu_seconds": 0}, "cpu_seconds is 0"),
  ):
    with pytest.raises(ValueError, match=message):
      CodeReward(**settings_)


@pytest.mark.parametrize("gold", [{"prompt": "x"}, 7, None])
def test_a_gold_of_another_kind_names_its_prompt(box, gold):
  with pytest.raises(ValueError, match="The gold of the example with prompt 'half' cannot be used"):
    CodeReward()("x = 1", Example("half", gold))


def test_weak_isolation_is_refused_unless_asked_for(monkeypatch):
  monkeypatch.setattr(sandbox, "_strongest", lambda: Sandbox("rlimits", b""))
  with pytest.raises(RuntimeError, match="allow_weak=True"):
    CodeReward()
  CodeReward(allow_weak=True)


def test_limits_alone_judge_alike():
  weak = sandbox_of("rlimits")
  for completion, why in (("  return x // 2\n", "right"), ("  return x\n", "wrong answer"), ("  return (", "no code")):
    assert verdict(weak, completion, CHECKED).why == why
  assert verdict(weak, "print(sum(map(int, input().split())))", {"cases": [["1 2", "3"]]}).success


# HumanEval.


@pytest.fixture(scope="module")
def humaneval():
  if not HUMANEVAL.exists():
    pytest.skip(f"{HUMANEVAL.name} is not in ../shared/data")
  with gzip.open(HUMANEVAL, "rt") as file:
    return [json.loads(line) for line in file]


CORRUPT = """

_right_{name} = {name}
def {name}(*arguments):
  result = _right_{name}(*arguments)
  kinds = ((bool, lambda: not result), ((int, float), lambda: result + 1), (str, lambda: result + "?"))
  kinds += (((list, tuple), lambda: result[:0] if result else type(result)((0,))),)
  return next((wrong() for kind, wrong in kinds if isinstance(result, kind)), "wrong")
"""


def right_and_corrupted(box, record):
  task, solution = task_of(record), record["canonical_solution"]
  whole = f"So:\n```python\n{record['prompt']}{solution}\n```\n"
  corrupted = solution + CORRUPT.format(name=record["entry_point"])
  return [judge(text, task, sandbox=box).why for text in (solution, whole, corrupted)]


@pytest.mark.parametrize("number", [0, 4, 32, 38, 50, 53, 95, 115, 129, 162])
def test_canonical_solutions_pass_and_corrupted_ones_do_not(box, humaneval, number):
  right, whole, corrupted = right_and_corrupted(box, humaneval[number])
  assert (right, whole) == ("right", "right")
  assert corrupted in ("wrong answer", "error")


@pytest.mark.slow
def test_all_canonical_solutions_pass_and_no_corrupted_one_does(box, humaneval):
  assert len(humaneval) == 164
  for record in humaneval:
    right, whole, corrupted = right_and_corrupted(box, record)
    assert (right, whole) == ("right", "right"), record["task_id"]
    assert corrupted in ("wrong answer", "error"), record["task_id"]


# The document.

DOCUMENT = (pathlib.Path(__file__).parent.parent / "docs" / "code_rewards.md").read_text()


def test_the_documents_code_prints_what_it_says(box, capsys):
  code, printed = re.findall(r"^```\w*\n(.*?)^```$", DOCUMENT, re.MULTILINE | re.DOTALL)[:2]
  exec(code, {})
  assert capsys.readouterr().out == printed


def test_the_documents_limits_are_the_defaults():
  rows = re.findall(r"^\| `(\w+)` \| ([\d.]+) \|", DOCUMENT, re.MULTILINE)
  assert dict(rows) == {name: str(value) for name, value in dataclasses.asdict(Limits()).items()}
