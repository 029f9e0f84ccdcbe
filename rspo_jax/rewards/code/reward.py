"""Rewards for programs: a completion is run against tests in a sandbox.

What a verdict rests on. A function is judged by two processes, each in a sandbox of its own. One runs the candidate
and only ever sees the arguments of the calls that the tests make. The other runs the tests: it has the expected values,
and gets from the candidate plain data (`harness.encode`) or the name of an exception. 'right' is what the tests'
process says after they have run to their end and the candidate has answered at least one call. No exit status, no
printed word and nothing that a candidate does to its own interpreter (frames, builtins, asserts, modules, objects that
equal everything) gets from one to the other. A program is judged by what it wrote, compared here with what it should
have written.

Limits of that:
- A candidate that returns what the tests expect passes, however it came by it. Tests that hardly test are not improved.
- Arguments are copies: a change made in place is not seen by the tests. Nor is whether two results are one object.
- Functions and objects of the tests' own classes cannot be arguments. Objects of the candidate's classes can only be
  handed back to it. Fraction, Decimal and the like are such objects.
- Helpers that a HumanEval test calls are those of its prompt, not those of the candidate.
- Custom exceptions arrive as their nearest builtin base.
- Under 'rlimits' (`sandbox.find_sandbox(allow_weak=True)`) a candidate can read the checker's memory.
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
  """What a program is judged by; one of test, asserts and cases.

  Attributes:
    prompt: Python that stands before the completion, as HumanEval has it; '' if the completion stands alone.
    setup: Python that the tests need; the prompt runs before it.
    test: Python that binds `check(candidate)`.
    entry_point: the function under test, by name or as an expression such as `Solution().solve`. Asserts may leave it
      out: then it is the name that nothing else binds.
    asserts: statements, as MBPP has them.
    cases: (stdin, expected stdout) each.
  """

  prompt: str = ""
  setup: str = ""
  test: str = ""
  entry_point: str = ""
  asserts: tuple[str, ...] = ()
  cases: tuple[tuple[str, str], ...] = ()


class Verdict(NamedTuple):
  """What was found.

  Attributes:
    success: it is right.
    why: 'right', 'wrong answer', 'error', 'timeout', 'memory', 'output' (too much of it) or 'no code'.
    detail: the exception or the first case that failed; shortened. May quote the candidate.
  """

  success: bool
  reason: str
  detail: str = ""


def task_of(record: Mapping[str, Any]) -> CodeTask:
  """Reads a record of a data set by its field names.

  HumanEval: prompt, test, entry_point. MBPP: test_list, and test_setup_code or test_imports; a prompt there is a
  question and not read. Stdin and stdout: cases, or inputs and outputs, which may lie in input_output, as JSON or not.
  Raises:
    ValueError: none of these, or fields that do not fit; says which.
  """
  found = sorted(set(record) & {"test", "test_list", "cases", "inputs", "input_output"})
  if len(found) != 1:
    raise ValueError(
      f"A code record has {', '.join(found) or 'no tests'} among {', '.join(sorted(record))}; want exactly one of test "
      "(with prompt and entry_point), test_list, cases, inputs (with outputs) and input_output."
    )
  if found == ["test"]:
    if missing := [name for name in ("prompt", "entry_point") if not isinstance(record.get(name), str)]:
      raise ValueError(f"A code record with test lacks {' and '.join(missing)}.")
    return CodeTask(record["prompt"], record.get("setup", ""), record["test"], record["entry_point"])
  if found == ["test_list"]:
    setup = "\n".join([*(record.get("test_imports") or ()), record.get("test_setup_code") or ""])
    asserts = tuple(record["test_list"])
    if not asserts or not all(isinstance(text, str) for text in asserts):
      raise ValueError(f"test_list is {record['test_list']!r}; want a list of assert statements.")
    return CodeTask(setup=setup, asserts=asserts, entry_point=record.get("entry_point", ""))
  if found == ["input_output"]:
    pairs = record["input_output"]
    return task_of(json.loads(pairs) if isinstance(pairs, str) else pairs)
  if found == ["inputs"]:
    inputs, outputs = record["inputs"], record.get("outputs", ())
    if len(inputs) != len(outputs):
      raise ValueError(f"{len(inputs)} inputs for {len(outputs)} outputs; want as many.")
    cases = tuple(zip(inputs, outputs, strict=True))
  else:
    cases = tuple(tuple(case) for case in record["cases"])
  if not cases or not all(len(case) == 2 and all(isinstance(text, str) for text in case) for case in cases):
    raise ValueError(f"The cases are {str(cases)[:200]}; want pairs of text: what goes in and what should come out.")
  return CodeTask(cases=cases)


def extract_code(completion: str) -> str:
  """The program in a completion: its last block fenced as Python, else its last fenced block, else all of it.

  A block that is not closed goes to the end.
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
  """Runs a completion's program against a task's tests. Threads may do so side by side.

  Args:
    completion: text; see `extract_code` and, for what becomes of it after a prompt, `harness.assemble`.
    task: as from `task_of`.
    sandbox: `find_sandbox()` if None.
    limits: of every process: of each case, and of candidate and tests; `Limits()` if None.
  Raises:
    RuntimeError: there is no sandbox, or one could not be set up.
  """
  sandbox, limits, code = sandbox or find_sandbox(), limits or Limits(), extract_code(completion)
  if not code.strip():
    return Verdict(False, "no code")
  return _run_cases(code, task, sandbox, limits) if task.cases else _run_calls(code, task, sandbox, limits)


def _run_cases(code: str, task: CodeTask, sandbox: Sandbox, limits: Limits) -> Verdict:
  for number, (given, wanted) in enumerate(task.cases):
    run = sandbox.run(code, stdin=given.encode(), limits=limits)
    if run.status != "ok":
      return _ended(run)
    got = run.stdout.decode(errors="replace")
    if _lines(got) != _lines(wanted):
      return Verdict(False, "wrong answer", f"case {number}: {got[:200]!r}, not {wanted[:200]!r}")
  return Verdict(True, "right")


def _lines(text: str) -> list[str]:
  return [line.rstrip() for line in text.rstrip().split("\n")]


def _ended(run: Run) -> Verdict:
  """The verdict on a program that ended otherwise than it should."""
  reason = run.status if run.status in ("timeout", "memory", "output", "no code") else "error"
  last = run.stderr.decode(errors="replace").strip().rpartition("\n")[2]
  return Verdict(False, reason, f"{run.status}: {last[:1000]}" if last else run.status)


@functools.cache
def _guest(function: str) -> CodeType:
  return compile(f"{inspect.getsource(harness)}\n{function}(**JOB)\n", "<harness>", "exec")


def _run_calls(code: str, task: CodeTask, sandbox: Sandbox, limits: Limits) -> Verdict:
  calls, answers = os.pipe(), os.pipe()

  def start(function, calls_end, answers_end, **arguments):
    job = {**arguments, "entry_point": task.entry_point, "calls": calls_end, "answers": answers_end}
    return sandbox.start(_guest(function), names={"JOB": job}, limits=limits, fds=(calls_end, answers_end))

  try:
    with contextlib.ExitStack() as undo:
      candidate = start("serve", calls[0], answers[1], prompt=task.prompt, text=code)
      undo.callback(candidate.close)
      tests = {"setup": f"{task.prompt}\n{task.setup}", "test": task.test, "asserts": task.asserts}
      checker = start("check", calls[1], answers[0], **tests, longest=limits.output_bytes)
      undo.pop_all()
  finally:  # so that each of the two sees when the other has gone
    for end in (*calls, *answers):
      os.close(end)
  ran, checked = collect([candidate, checker], until=checker)
  try:
    reason, detail = json.loads(checked.stdout)
  except ValueError:  # it was stopped
    return _ended(checked if ran.status in ("ok", "killed") else ran)
  return _ended(ran) if reason == "gone" else Verdict(reason == "right", reason, detail)


class CodeReward:
  """1 for a program that passes its tests, else 0; success is the same, format says whether there was a program.

  An example's gold is a `CodeTask`, or a record that `task_of` reads.
  """

  def __init__(self, *, workers: int | None = None, allow_weak: bool = False, **limits: Any):
    """Looks for a sandbox, so that one that is missing shows before training starts.

    Args:
      workers: programs that a batch runs side by side; a function's program and its tests are one. All cores if None.
      allow_weak: see `sandbox.find_sandbox`.
      **limits: fields of `Limits`.
    Raises:
      RuntimeError: there is no sandbox that may be used.
      ValueError: an impossible setting.
    """
    self._workers = os.cpu_count() or 1 if workers is None else workers
    if self._workers < 1:
      raise ValueError(f"workers is {workers}; want 1 or more.")
    if unknown := sorted(set(limits) - set(Limits.__dataclass_fields__)):
      raise ValueError(f"There is no limit {', '.join(unknown)}; there are {', '.join(Limits.__dataclass_fields__)}.")
    self._limits = Limits(**limits)
    self._sandbox = find_sandbox(allow_weak=allow_weak)

  def __call__(self, text: str, example: Example) -> RewardResult:
    """The result of one completion; errors as for `run_task`, ValueError for another gold."""
    verdict = run_task(text, _task(example), sandbox=self._sandbox, limits=self._limits)
    return RewardResult(float(verdict.success), verdict.success, verdict.reason != "no code", verdict.reason)

  def score_batch(self, texts: Sequence[str], examples: Sequence[Example]) -> list[RewardResult]:
    """The results of a batch, several at a time."""
    with ThreadPoolExecutor(self._workers) as pool:
      return list(pool.map(self, texts, examples))


def _task(example: Example) -> CodeTask:
  if isinstance(example.gold, CodeTask):
    return example.gold
  try:
    return task_of(example.gold)
  except (ValueError, TypeError) as error:
    raise ValueError(f"The gold of the example with prompt {example.prompt[:80]!r} cannot be used: {error}") from error
