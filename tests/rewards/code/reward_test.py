"""Code rewards: reading records and completions, verdicts on programs, and the reward."""

import dataclasses
import gzip
import json
import re

import pytest

from rspo_jax.data.examples import Example
from rspo_jax.rewards.base import RewardResult, score_completions
from rspo_jax.rewards.code import sandbox
from rspo_jax.rewards.code.harness import assemble
from rspo_jax.rewards.code.reward import CodeReward, CodeTask, extract_code, run_task, task_from_record
from rspo_jax.rewards.code.sandbox import Sandbox, make_sandbox
from rspo_jax.rewards.code.sandbox_process import Limits
from tests.support.code_cases import verdict
from tests.support.paths import DOCS, SHARED

HUMANEVAL = SHARED / "humaneval.jsonl.gz"


# The program in a completion.


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
def test_a_completion_continues_the_prompt_or_is_a_whole_program(text):
  names = {}
  exec(assemble(PROMPT, text, "half"), names)
  assert names["half"](7) == 3


@pytest.mark.parametrize("text", ["", " \n", "The answer is 3.", "def half(x:", "x = '\0'", "  return ("])
def test_text_that_does_not_compile_is_no_program(text):
  assert assemble("", text, "half") is None


# Records of data sets.


def test_field_names_determine_the_format_of_a_record():
  humaneval = {"task_id": "1", "prompt": "p", "test": "t", "entry_point": "f", "canonical_solution": "c"}
  assert task_from_record(humaneval) == CodeTask(prompt="p", test="t", entry_point="f")
  mbpp = {"prompt": "Write ...", "code": "c", "test_imports": ["import math"], "test_list": ["assert f(1) == 2"]}
  assert task_from_record(mbpp) == CodeTask(setup="import math\n", asserts=("assert f(1) == 2",))
  cases = CodeTask(cases=(("1", "2"), ("3", "4")))
  pairs = {"inputs": ["1", "3"], "outputs": ["2", "4"]}
  for record in (
    pairs,
    {"input_output": pairs},
    {"input_output": json.dumps(pairs)},
    {"cases": [["1", "2"], ["3", "4"]]},
  ):
    assert task_from_record(record) == cases


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
    task_from_record(record)


# Correct and incorrect programs.

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
def test_verdicts_on_a_function_tested_by_check(box, completion, reason):
  result = verdict(box, completion, CHECKED)
  assert (result.success, result.reason) == (reason == "right", reason), result


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
def test_verdicts_on_a_program_tested_by_asserts(box, asserts, reason):
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
  result = verdict(box, program, {"test_list": asserts})
  assert result.reason == reason, result


def test_asserts_use_the_checkers_builtins(box):
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
def test_verdicts_on_a_program_tested_by_its_output(box, program, reason):
  result = verdict(box, program, ECHO)
  assert (result.success, result.reason) == (reason == "right", reason), result


def test_methods_can_be_tested_and_exceptions_keep_their_builtin_base(box):
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
class Negative(ValueError): pass
class Solution:
  def square(self, x):
    if x < 0: raise Negative('no')
    return x * x
"""
  assert verdict(box, program, task).reason == "right"
  assert not verdict(box, program.replace("x * x", "x + 3"), task).success


# Rewards.


def test_the_reward_is_one_for_a_correct_program_and_zero_otherwise(box):
  reward, example = CodeReward(), Example(PROMPT, CHECKED)
  for gold in (CHECKED, task_from_record(CHECKED)):
    assert reward("  return x // 2\n", example._replace(gold=gold)) == RewardResult(1.0, True, True, "right")
  assert reward("  return x\n", example) == RewardResult(0.0, False, True, "wrong answer")
  prose = reward("It is easy.", Example("", {"test_list": ["assert f(1) == 1"]}))
  assert prose == RewardResult(0.0, False, False, "no code")


def test_results_of_a_parallel_batch_are_in_order(box):
  texts = ["  return x // 2\n", "  return x\n", "  import os; os._exit(0)\n", "  return ("] * 3
  scores = score_completions(CodeReward(workers=3), texts, [Example(PROMPT, CHECKED)] * len(texts))
  assert scores.success.tolist() == scores.reward.tolist() == [True, False, False, False] * 3
  assert scores.reason == ("right", "wrong answer", "error", "no code") * 3


def test_limits_reach_the_programs_and_invalid_options_are_refused(box):
  assert CodeReward(cpu_seconds=1)("  while True: pass\n", Example(PROMPT, CHECKED)).reason == "timeout"
  for options, message in (
    ({"workers": 0}, "workers is 0"),
    ({"seconds": 1}, "no limit seconds"),
    ({"cpu_seconds": 0}, "cpu_seconds is 0"),
  ):
    with pytest.raises(ValueError, match=message):
      CodeReward(**options)


@pytest.mark.parametrize("gold", [{"prompt": "x"}, 7, None])
def test_an_unusable_gold_is_reported_with_its_prompt(box, gold):
  with pytest.raises(ValueError, match="The gold of the example with prompt 'half' cannot be used"):
    CodeReward()("x = 1", Example("half", gold))


def test_weak_isolation_is_refused_without_allow_weak(monkeypatch):
  monkeypatch.setattr(sandbox, "_strongest", lambda: Sandbox("rlimits", b""))
  with pytest.raises(RuntimeError, match="allow_weak=True"):
    CodeReward()
  CodeReward(allow_weak=True)


def test_rlimits_give_the_same_verdicts():
  weak = make_sandbox("rlimits")
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

_correct_{name} = {name}
def {name}(*arguments):
  result = _correct_{name}(*arguments)
  kinds = ((bool, lambda: not result), ((int, float), lambda: result + 1), (str, lambda: result + "?"))
  kinds += (((list, tuple), lambda: result[:0] if result else type(result)((0,))),)
  return next((change() for kind, change in kinds if isinstance(result, kind)), "wrong")
"""


def correct_and_corrupted_reasons(box, record):
  task, solution = task_from_record(record), record["canonical_solution"]
  whole = f"So:\n```python\n{record['prompt']}{solution}\n```\n"
  corrupted = solution + CORRUPT.format(name=record["entry_point"])
  return [run_task(text, task, sandbox=box).reason for text in (solution, whole, corrupted)]


@pytest.mark.parametrize("number", [0, 4, 32, 38, 50, 53, 95, 115, 129, 162])
def test_canonical_solutions_pass_and_corrupted_ones_fail(box, humaneval, number):
  alone, whole, corrupted = correct_and_corrupted_reasons(box, humaneval[number])
  assert (alone, whole) == ("right", "right")
  assert corrupted in ("wrong answer", "error")


@pytest.mark.slow
def test_all_canonical_solutions_pass_and_all_corrupted_ones_fail(box, humaneval):
  assert len(humaneval) == 164
  for record in humaneval:
    alone, whole, corrupted = correct_and_corrupted_reasons(box, record)
    assert (alone, whole) == ("right", "right"), record["task_id"]
    assert corrupted in ("wrong answer", "error"), record["task_id"]


# The document.

DOCUMENT = (DOCS / "code_rewards.md").read_text()


def test_the_documents_example_prints_its_output(box, capsys):
  code, printed = re.findall(r"^```\w*\n(.*?)^```$", DOCUMENT, re.MULTILINE | re.DOTALL)[:2]
  exec(code, {})
  assert capsys.readouterr().out == printed


def test_the_documents_limits_are_the_defaults():
  rows = re.findall(r"^\| `(\w+)` \| ([\d.]+) \|", DOCUMENT, re.MULTILINE)
  assert dict(rows) == {name: str(value) for name, value in dataclasses.asdict(Limits()).items()}
