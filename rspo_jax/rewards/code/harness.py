"""The two programs that judge a completion together, each in a sandbox of its own.

`serve` runs the candidate and answers calls; `check` runs the tests and calls. All that travels between them is lines
of JSON: whatever the candidate does to its own process, the tests see plain values of builtin types and compare these
with what only they know. `code_rewards` ships this module as a code object, so it imports the standard library only.
"""

import builtins
import json
import os
import sys

_EXACT = 2**63  # integers beyond travel as hexadecimal digits: reading decimal ones takes quadratic time


class Handle:
  """Something of the candidate's that is no data: it can be handed back to the candidate, and nothing else."""

  def __init__(self, index):
    self.index = index

  def _refuse(self, *_):
    raise TypeError("A result of the candidate's own class can only be handed back to it.")

  __eq__ = __ne__ = __hash__ = __bool__ = _refuse


def encode(value, keep=None):
  """Turns a value into JSON's terms.

  Args:
    value: None, bool, int, float, complex, str, bytes, list, tuple, set, frozenset, dict, range or an instance of a
      subclass, which travels as the base class; any other iterable, which is read to its end and travels as an
      iterator; a `Handle`.
    keep: called with anything else; returns the index for its `Handle`.
  Raises:
    TypeError: anything else, without keep.
  """
  if value is None or value is True or value is False:
    return value
  if isinstance(value, str):
    return str(value)
  if isinstance(value, int):
    return int(value) if -_EXACT <= value < _EXACT else ["int", hex(value)]
  if isinstance(value, float):
    return float(value)
  if isinstance(value, complex):
    return ["complex", value.real, value.imag]
  if isinstance(value, (bytes, bytearray)):
    return ["bytes", value.hex()]
  if isinstance(value, range):
    return ["range", *(encode(part) for part in (value.start, value.stop, value.step))]
  if isinstance(value, dict):
    return ["dict", *([encode(key, keep), encode(item, keep)] for key, item in value.items())]
  for kind in (list, tuple, set, frozenset):
    if isinstance(value, kind):
      return [kind.__name__, *(encode(item, keep) for item in value)]
  if isinstance(value, Handle):
    return ["handle", value.index]
  if hasattr(type(value), "__iter__"):
    return ["iterator", *(encode(item, keep) for item in value)]
  if keep is None:
    raise TypeError(f"A {type(value).__name__} cannot be handed to the candidate.")
  return ["handle", keep(value)]


def decode(data, handle=Handle):
  """The inverse of `encode`: builtin types only. handle: index -> what stands for it here."""
  if not isinstance(data, list):
    return data
  tag, *items = data
  if tag == "handle":
    return handle(*items)
  if tag == "int":
    return int(items[0], 16)
  if tag == "bytes":
    return bytes.fromhex(items[0])
  if tag == "dict":
    return {decode(key, handle): decode(item, handle) for key, item in items}
  whole = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset, "iterator": iter}
  if tag in whole:
    return whole[tag]([decode(item, handle) for item in items])
  return {"complex": complex, "range": range}[tag](*(decode(item, handle) for item in items))


def assemble(prompt, text, entry_point):
  """The program that a completion makes of its prompt, as a code object; None if there is none.

  A whole program (it compiles, and binds the entry point) stands behind the prompt, whose imports and helpers it may
  need, or alone. Any other text goes on where the prompt ends, if need be only up to the line that leaves its function.
  """

  def compiled(source):
    try:
      return compile(source, "<program>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError):
      return None

  if not text.strip():
    return None
  whole = compiled(text)
  if not prompt:
    return whole
  if whole and entry_point.split("(")[0].split(".")[0] in whole.co_names:
    return compiled(f"{prompt}\n\n{text}") or whole
  lines = text.splitlines(keepends=True)
  leaves = next((at for at, line in enumerate(lines) if line.strip() and not line[0].isspace()), len(lines))
  body = "".join(lines[:leaves])
  return compiled(prompt + text) or (compiled(prompt + body) if body.strip() else None)


def serve(prompt, text, entry_point, calls, answers):
  """Runs the candidate, then answers calls until none comes any more.

  Answers are [kind, value]: 'ready' once, or 'no code'; then per call 'value' or 'raised', whose value is the name of
  the nearest builtin exception and the message. SystemExit ends the process, so the checker finds nobody there.
  """
  requests, replies = os.fdopen(calls, "rb"), os.fdopen(answers, "wb")
  kept = []

  def keep(value):
    kept.append(value)
    return len(kept) - 1

  def reply(kind, value=None):
    replies.write(json.dumps([kind, value]).encode() + b"\n")
    replies.flush()

  def attempt(function):
    try:
      return function()
    except Exception as error:
      name = next(base.__name__ for base in type(error).__mro__ if base.__module__ == "builtins")
      return "raised", [name, str(error)[:1000]]

  code = assemble(prompt, text, entry_point)
  if code is None:
    return reply("no code")
  module = type(sys)("candidate")
  sys.modules["candidate"] = module

  def run():
    exec(code, module.__dict__)
    return ("ready",)

  def call(line):
    name, arguments, named = decode(json.loads(line), kept.__getitem__)
    return "value", encode(eval(name, module.__dict__)(*arguments, **named), keep)

  reply(*attempt(run))
  for line in requests:
    reply(*attempt(lambda line=line: call(line)))
  os._exit(0)  # nobody waits for its threads


class Gone(BaseException):
  """The candidate does not answer. No Exception, so that no test takes it for an error of the function it tests."""


class Candidate:
  """The checker's end of the candidate.

  Attributes:
    gone: the verdict if it no longer answers, 'gone' if its process has ended, '' while it does answer. Stays, though a
      test swallows `Gone`.
    answered: calls.
    raised: what it last raised.
  """

  def __init__(self, calls, answers, longest):
    self._requests, self._replies = os.fdopen(calls, "wb", buffering=0), os.fdopen(answers, "rb")
    self._longest = longest
    self.gone, self.answered, self.raised = "", 0, None

  def _lose(self, reason):
    self.gone = self.gone or reason
    raise Gone

  def receive(self):
    """The next answer: its kind and its value, an exception where it raised one."""
    if self.gone:
      raise Gone
    line = self._replies.readline(self._longest)
    if not line.endswith(b"\n"):
      self._lose("output" if len(line) >= self._longest else "gone")
    try:
      kind, value = json.loads(line)
      return kind, self._rebuilt(*value) if kind == "raised" else decode(value)
    except MemoryError:
      raise
    except Exception:
      self._lose("error")

  def _rebuilt(self, name, message):
    kind = getattr(builtins, name, None)
    # Inside `map` these two would end a test's loop and not the test.
    silent = (StopIteration, StopAsyncIteration)
    if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, silent):
      try:
        return kind(message)
      except TypeError:  # it wants other arguments
        pass
    return RuntimeError(f"{name}: {message}")

  def function(self, name):
    """A function that has the candidate evaluate a name, or another expression, and call it."""

    def call(*arguments, **named):
      request = json.dumps(encode([name, arguments, named])).encode() + b"\n"
      try:
        while request:
          request = request[self._requests.write(request) :]
      except OSError:
        self._lose("gone")
      kind, value = self.receive()
      self.answered += 1
      if kind == "raised":
        self.raised = value
        raise value
      return value

    return call


def names_in(code):
  """The global names that a code object and those within it use, in their order."""
  names = list(code.co_names)
  for inner in code.co_consts:
    if isinstance(inner, type(code)):
      names += names_in(inner)
  return names


def run_tests(candidate, setup, test, entry_point, asserts):
  """Returns if the tests hold; else raises. Arguments as for `check`."""
  names = {"__name__": "tests"}
  exec(compile(setup, "<setup>", "exec", dont_inherit=True), names)
  if "random" in test:
    import random

    random.seed(0)  # the same verdict every time
  if test:
    exec(compile(test, "<test>", "exec", dont_inherit=True), names)
    names[entry_point] = candidate.function(entry_point)  # after what the prompt binds it to
    names["check"](names[entry_point])
  tested = {entry_point} - {""}
  names |= {name: candidate.function(name) for name in tested}
  for statement in asserts:
    code = compile(statement, "<assert>", "exec", dont_inherit=True)
    used = names_in(code)
    free = [name for name in used if name not in names and not hasattr(builtins, name)]
    for name in free:
      if name in sys.stdlib_module_names and f"{name}." in statement:
        names[name] = __import__(name)
      else:
        tested.add(name)
    if not tested.intersection(used):
      tested.update(used[:1])  # called like a builtin function: MBPP's `assert sum(10, 15) == 6`
    names |= {name: candidate.function(name) for name in tested.intersection(used).difference(names)}
    exec(code, names)


def check(setup, test, entry_point, asserts, calls, answers, longest):
  """Runs tests against the candidate and writes [why, detail] as JSON to stdout: a verdict's, or 'gone'.

  Args:
    setup: Python that the tests need; the prompt's helpers, say.
    test: Python that binds `check`, a function of the candidate; '' if there are only asserts.
    entry_point: the expression whose value is the function to test; '' to find it in the asserts.
    asserts: statements. A name that nothing binds here is the candidate's.
    calls, answers: file descriptors.
    longest: bytes that an answer may have.
  """
  verdict = os.dup(1)
  os.dup2(2, 1)  # what tests print must not pass for a verdict
  candidate = Candidate(calls, answers, longest)
  reason = "error"
  try:
    kind, detail = candidate.receive()
    if kind == "ready":
      run_tests(candidate, setup, test, entry_point, asserts)
      reason, detail = ("right", "") if candidate.answered else ("error", "The tests never called the candidate.")
    elif kind == "no code":
      reason, detail = kind, "There is none, or it does not compile."
  except AssertionError as error:
    reason, detail = ("error" if error is candidate.raised else "wrong answer"), error
  except BaseException as error:
    detail = error
  if candidate.gone:
    reason, detail = candidate.gone, "The candidate did not answer as it should."
  elif isinstance(detail, MemoryError):
    reason = "memory"
  text = detail if isinstance(detail, str) else f"{type(detail).__name__}: {detail}"
  os.write(verdict, json.dumps([reason, text[:1000]]).encode())
  os._exit(0)
