"""Code rewards: right programs earn 1, wrong ones 0, and no trick gets a verdict or does harm."""

import dataclasses
import gzip
import json
import re

import pytest

from rspo_jax.data.examples import Example
from rspo_jax.rewards.base import RewardResult, score_completions
from rspo_jax.rewards.code import sandbox
from rspo_jax.rewards.code.harness import assemble
from rspo_jax.rewards.code.reward import CodeReward, CodeTask, extract_code, run_task, task_of
from rspo_jax.rewards.code.sandbox import Sandbox, find_sandbox, sandbox_of
from rspo_jax.rewards.code.sandbox_process import Limits
from tests.support.code_cases import verdict
from tests.support.paths import DOCS, SHARED

HUMANEVAL = SHARED / "humaneval.jsonl.gz"


@pytest.fixture(scope="module")
def box():
  try:
    return find_sandbox()
  except RuntimeError as error:
    pytest.skip(str(error)[:300])


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
  exec(assemble(PROMPT, text, "half"), names)
  assert names["half"](7) == 3


@pytest.mark.parametrize("text", ["", " \n", "The answer is 3.", "def half(x:", "x = '\0'", "  return ("])
def test_what_does_not_compile_is_no_program(text):
  assert assemble("", text, "half") is None


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
  ("completion", "reason"),
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
def test_a_function_is_judged_by_check(box, completion, reason):
  found = verdict(box, completion, CHECKED)
  assert (found.success, found.reason) == (reason == "right", reason), found


@pytest.mark.parametrize(
  ("asserts", "reason"),
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
def test_a_program_is_judged_by_asserts(box, asserts, reason):
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
  assert found.reason == reason, found


def test_builtins_in_asserts_are_not_the_candidates(box):
  program = "def f(x): return 0\ndef set(*_): return 1\nabs = len = set"
  for statement in ("set(f(1)) == set([1])", "abs(f(2) - 7) < 1e-6", "f(0) == 0 and len(f(3)) == 1"):
    asserts = ["assert f(9) == 0", f"assert {statement}"]
    assert not verdict(box, program, {"test_list": asserts}).success


ECHO = {"inputs": ["2\n1 2\n3 4\n", "0\n"], "outputs": ["3\n7\n", ""]}


@pytest.mark.parametrize(
  ("program", "reason"),
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
def test_a_program_is_judged_by_what_it_writes(box, program, reason):
  found = verdict(box, program, ECHO)
  assert (found.success, found.reason) == (reason == "right", reason), found


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
  assert verdict(box, program, task).reason == "right"
  assert not verdict(box, program.replace("x * x", "x + 3"), task).success


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
  assert scores.reason == ("right", "wrong answer", "error", "no code") * 3


def test_settings_of_the_reward_are_checked(box):
  assert CodeReward(cpu_seconds=1)("  while True: pass\n", Example(PROMPT, CHECKED)).reason == "timeout"
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
  for completion, reason in (
    ("  return x // 2\n", "right"),
    ("  return x\n", "wrong answer"),
    ("  return (", "no code"),
  ):
    assert verdict(weak, completion, CHECKED).reason == reason
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
  return [run_task(text, task, sandbox=box).reason for text in (solution, whole, corrupted)]


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

DOCUMENT = (DOCS / "code_rewards.md").read_text()


def test_the_documents_code_prints_what_it_says(box, capsys):
  code, printed = re.findall(r"^```\w*\n(.*?)^```$", DOCUMENT, re.MULTILINE | re.DOTALL)[:2]
  exec(code, {})
  assert capsys.readouterr().out == printed


def test_the_documents_limits_are_the_defaults():
  rows = re.findall(r"^\| `(\w+)` \| ([\d.]+) \|", DOCUMENT, re.MULTILINE)
  assert dict(rows) == {name: str(value) for name, value in dataclasses.asdict(Limits()).items()}
