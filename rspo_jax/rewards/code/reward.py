"""Reward for programs: a completion is run against tests in a sandbox.

A function under test is checked by two processes in separate sandboxes. One runs the candidate and receives only the
arguments of the calls that the tests make. The other runs the tests: it holds the expected values, and receives plain
data (`harness.encode`) or the name of an exception from the candidate. The verdict 'right' is written by the tests'
process, after the tests have run to their end and the candidate has answered at least one call. So it does not depend
on the candidate's exit status, on its output or on modifications of its own interpreter (frames, builtins, asserts,
modules, objects that are equal to everything). A program for stdin and stdout is checked by its output, which is
compared in this process.

Limitations:
- A candidate passes if it returns the values that the tests expect, however it obtains them. Weak tests stay weak.
- Arguments are copies: the tests see neither changes in place nor whether two results are the same object.
- Functions and objects of the tests' own classes cannot be arguments. Objects of the candidate's classes (and Fraction,
  Decimal and similar ones) can only be passed back to the candidate.
- Helpers called by a HumanEval test are those of the prompt, not those of the candidate.
- Custom exceptions are received as their nearest builtin base class.
- With 'rlimits' (`sandbox.find_sandbox(allow_weak=True)`) a candidate can read the memory of the tests' process.
"""

import contextlib
import functools
import inspect
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import CodeType
from typing import Any, NamedTuple

from rspo_jax.data.examples import Example
from rspo_jax.rewards.base import RewardResult
from rspo_jax.rewards.code import harness
from rspo_jax.rewards.code.sandbox import Sandbox, find_sandbox
from rspo_jax.rewards.code.sandbox_process import Limits, Run, collect


class CodeTask(NamedTuple):
  """The tests of a program: exactly one of test, asserts and cases.

  Attributes:
    prompt: Python code that the completion continues, as in HumanEval; '' if the completion is a whole program.
    setup: Python code that the tests need; it runs after the prompt.
    test: Python code that binds `check(candidate)`.
    entry_point: the function under test, by name or as an expression such as `Solution().solve`. Optional for asserts:
      '' means the name that is not bound otherwise.
    asserts: assert statements, as in MBPP.
    cases: pairs (stdin, expected stdout).
  """

  prompt: str = ""
  setup: str = ""
  test: str = ""
  entry_point: str = ""
  asserts: tuple[str, ...] = ()
  cases: tuple[tuple[str, str], ...] = ()


class Verdict(NamedTuple):
  """The result of checking a program.

  Attributes:
    success: it passes its tests.
    reason: 'right', 'wrong answer', 'error', 'timeout', 'memory', 'output' (too much of it) or 'no code'.
    detail: the exception or the first failed case, truncated; may contain text written by the candidate.
  """

  success: bool
  reason: str
  detail: str = ""


def task_from_record(record: Mapping[str, Any]) -> CodeTask:
  """Converts a record of a data set; its field names determine the format.

  HumanEval: prompt, test, entry_point. MBPP: test_list, and test_setup_code or test_imports; its prompt is a question
  and is not used. Stdin and stdout: cases, or inputs and outputs, which may be nested in input_output, also as JSON.
  Raises:
    ValueError: no or several of these formats, or malformed fields; the message names them.
  """
  tests = sorted(set(record) & {"test", "test_list", "cases", "inputs", "input_output"})
  if len(tests) != 1:
    raise ValueError(
      f"A code record has {', '.join(tests) or 'no tests'} among {', '.join(sorted(record))}; want exactly one of test "
      "(with prompt and entry_point), test_list, cases, inputs (with outputs) and input_output."
    )
  if tests == ["test"]:
    if missing := [name for name in ("prompt", "entry_point") if not isinstance(record.get(name), str)]:
      raise ValueError(f"A code record with test lacks {' and '.join(missing)}.")
    return CodeTask(record["prompt"], record.get("setup", ""), record["test"], record["entry_point"])
  if tests == ["test_list"]:
    setup = "\n".join([*(record.get("test_imports") or ()), record.get("test_setup_code") or ""])
    asserts = tuple(record["test_list"])
    if not asserts or not all(isinstance(text, str) for text in asserts):
      raise ValueError(f"test_list is {record['test_list']!r}; want a list of assert statements.")
    return CodeTask(setup=setup, asserts=asserts, entry_point=record.get("entry_point", ""))
  if tests == ["input_output"]:
    pairs = record["input_output"]
    return task_from_record(json.loads(pairs) if isinstance(pairs, str) else pairs)
  if tests == ["inputs"]:
    inputs, outputs = record["inputs"], record.get("outputs", ())
    if len(inputs) != len(outputs):
      raise ValueError(f"{len(inputs)} inputs for {len(outputs)} outputs; want equal numbers.")
    cases = tuple(zip(inputs, outputs, strict=True))
  else:
    cases = tuple(tuple(case) for case in record["cases"])
  if not cases or not all(len(case) == 2 and all(isinstance(text, str) for text in case) for case in cases):
    raise ValueError(f"The cases are {str(cases)[:200]}; want pairs of text: stdin and the expected stdout.")
  return CodeTask(cases=cases)


def extract_code(completion: str) -> str:
  """The program in a completion: its last block fenced as Python, else its last fenced block, else the whole text.

  A block without a closing fence extends to the end of the text.
  """
  blocks, lines = [], None
  for line in completion.splitlines(keepends=True):
    fence = line.strip()
    if lines is None and fence.startswith("```"):
      lines = []
      blocks.append((fence[3:].strip().lower(), lines))
    elif lines is not None and fence == "```":
      lines = None
    elif lines is not None:
      lines.append(line)
  blocks = [(language, "".join(lines)) for language, lines in blocks if "".join(lines).strip()]
  python = [code for language, code in blocks if language in ("python", "py", "python3")]
  return (python or [code for _, code in blocks] or [completion])[-1]


def run_task(
  completion: str, task: CodeTask, *, sandbox: Sandbox | None = None, limits: Limits | None = None
) -> Verdict:
  """Runs a completion's program against the tests of a task. Thread-safe.

  Args:
    completion: text; see `extract_code`, and `harness.assemble` for how it is combined with a prompt.
    task: its tests; see `task_from_record`.
    sandbox: `find_sandbox()` if None.
    limits: limits of each process (one per case, or candidate and tests); `Limits()` if None.
  Raises:
    RuntimeError: no sandbox is available, or it could not be set up.
  """
  sandbox, limits, code = sandbox or find_sandbox(), limits or Limits(), extract_code(completion)
  if not code.strip():
    return Verdict(False, "no code")
  return _check_output(code, task, sandbox, limits) if task.cases else _check_calls(code, task, sandbox, limits)


def _check_output(code: str, task: CodeTask, sandbox: Sandbox, limits: Limits) -> Verdict:
  for index, (stdin, expected) in enumerate(task.cases):
    run = sandbox.run(code, stdin=stdin.encode(), limits=limits)
    if run.status != "ok":
      return _failure(run)
    stdout = run.stdout.decode(errors="replace")
    if _lines(stdout) != _lines(expected):
      return Verdict(False, "wrong answer", f"case {index}: {stdout[:200]!r}, not {expected[:200]!r}")
  return Verdict(True, "right")


def _lines(text: str) -> list[str]:
  return [line.rstrip() for line in text.rstrip().split("\n")]


def _failure(run: Run) -> Verdict:
  """The verdict for a program that failed or was stopped."""
  reason = run.status if run.status in ("timeout", "memory", "output", "no code") else "error"
  last = run.stderr.decode(errors="replace").strip().rpartition("\n")[2]
  return Verdict(False, reason, f"{run.status}: {last[:1000]}" if last else run.status)


@functools.cache
def _harness_program(function: str) -> CodeType:
  return compile(f"{inspect.getsource(harness)}\n{function}(**JOB)\n", "<harness>", "exec")


def _check_calls(code: str, task: CodeTask, sandbox: Sandbox, limits: Limits) -> Verdict:
  calls, answers = os.pipe(), os.pipe()

  def start(function, calls_end, answers_end, **arguments):
    job = {**arguments, "entry_point": task.entry_point, "calls": calls_end, "answers": answers_end}
    return sandbox.start(_harness_program(function), names={"JOB": job}, limits=limits, fds=(calls_end, answers_end))

  try:
    with contextlib.ExitStack() as on_error:
      candidate = start("serve", calls[0], answers[1], prompt=task.prompt, text=code)
      on_error.callback(candidate.close)
      tests = {"setup": f"{task.prompt}\n{task.setup}", "test": task.test, "asserts": task.asserts}
      checker = start("check", calls[1], answers[0], **tests, longest=limits.output_bytes)
      on_error.pop_all()
  finally:  # closed here so that each process sees the end of the pipe when the other one ends
    for end in (*calls, *answers):
      os.close(end)
  candidate_run, checker_run = collect([candidate, checker], until=checker)
  try:
    reason, detail = json.loads(checker_run.stdout)
  except ValueError:  # the checker was stopped before it wrote a verdict
    return _failure(checker_run if candidate_run.status in ("ok", "killed") else candidate_run)
  return _failure(candidate_run) if reason == "gone" else Verdict(reason == "right", reason, detail)


class CodeReward:
  """1 for a program that passes its tests, else 0. `success` is the same; `format` is False for 'no code'.

  An example's gold is a `CodeTask`, or a record for `task_from_record`.
  """

  def __init__(self, *, workers: int | None = None, allow_weak: bool = False, **limits: Any):
    """Selects the sandbox, so that a missing one is reported before training starts.

    Args:
      workers: completions that a batch checks in parallel; the number of cores if None.
      allow_weak: see `sandbox.find_sandbox`.
      **limits: fields of `Limits`.
    Raises:
      RuntimeError: no permitted sandbox is available.
      ValueError: workers below 1, or an unknown or invalid limit.
    """
    self._workers = os.cpu_count() or 1 if workers is None else workers
    if self._workers < 1:
      raise ValueError(f"workers is {workers}; want 1 or more.")
    if unknown := sorted(set(limits) - set(Limits.__dataclass_fields__)):
      raise ValueError(f"There is no limit {', '.join(unknown)}; there are {', '.join(Limits.__dataclass_fields__)}.")
    self._limits = Limits(**limits)
    self._sandbox = find_sandbox(allow_weak=allow_weak)

  def __call__(self, text: str, example: Example) -> RewardResult:
    """The result of one completion. Raises as `run_task` does, and ValueError for an unusable gold."""
    verdict = run_task(text, _task(example), sandbox=self._sandbox, limits=self._limits)
    return RewardResult(float(verdict.success), verdict.success, verdict.reason != "no code", verdict.reason)

  def score_batch(self, texts: Sequence[str], examples: Sequence[Example]) -> list[RewardResult]:
    """The results of a batch, computed in parallel, in order."""
    with ThreadPoolExecutor(self._workers) as pool:
      return list(pool.map(self, texts, examples))


def _task(example: Example) -> CodeTask:
  if isinstance(example.gold, CodeTask):
    return example.gold
  try:
    return task_from_record(example.gold)
  except (ValueError, TypeError) as error:
    raise ValueError(f"The gold of the example with prompt {example.prompt[:80]!r} cannot be used: {error}") from error
