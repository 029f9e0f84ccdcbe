"""The candidate process and the checker process, which run in separate sandboxes and exchange lines of JSON.

`serve` runs the candidate and answers calls; `check` runs the tests and makes the calls. The tests receive values of
builtin types only, even if the candidate has modified its own interpreter, and the expected values never leave the
checker. `rspo_jax.rewards.code.reward` sends this module into both sandboxes as a code object compiled from its source
text, so it may import the standard library only.
"""

import builtins
import json
import os
import sys

_DECIMAL_LIMIT = 2**63  # larger integers are sent in hexadecimal: parsing decimal digits takes quadratic time


class Handle:
  """An opaque reference to an object of the candidate; its only use is as an argument of a later call."""

  def __init__(self, index):
    self.index = index

  def _refuse(self, *_):
    raise TypeError("An object of the candidate's own class can only be passed back to the candidate.")

  __eq__ = __ne__ = __hash__ = __bool__ = _refuse


def encode(value, keep=None):
  """Encodes a value as JSON data: a scalar, or a list [tag, *items].

  Args:
    value: None, bool, int, float, complex, str, bytes, list, tuple, set, frozenset, dict, range or an instance of a
      subclass, which is encoded as the base class; any other iterable, which is exhausted and encoded as an iterator;
      a `Handle`.
    keep: called with any other value; stores it and returns the index for its `Handle`.
  Raises:
    TypeError: any other value, if keep is None.
  """
  if value is None or value is True or value is False:
    return value
  if isinstance(value, str):
    return str(value)
  if isinstance(value, int):
    return int(value) if -_DECIMAL_LIMIT <= value < _DECIMAL_LIMIT else ["int", hex(value)]
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
    raise TypeError(f"A {type(value).__name__} cannot be passed to the candidate.")
  return ["handle", keep(value)]


def decode(data, handle=Handle):
  """The inverse of `encode`; returns builtin types only, and handle(index) for a `Handle`."""
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
  containers = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset, "iterator": iter}
  if tag in containers:
    return containers[tag]([decode(item, handle) for item in items])
  return {"complex": complex, "range": range}[tag](*(decode(item, handle) for item in items))


def assemble(prompt, text, entry_point):
  """Compiles a prompt and its completion into one program; None if no combination compiles.

  A complete program (it compiles and binds the entry point) is placed after the prompt, whose imports and helpers it
  may use, or runs without the prompt if the two do not compile together. Any other text is appended to the prompt
  directly; if that does not compile, only its lines up to the first unindented one are.
  """

  def compiled(source):
    try:
      return compile(source, "<program>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError):
      return None

  if not text.strip():
    return None
  program = compiled(text)
  if not prompt:
    return program
  if program and entry_point.split("(")[0].split(".")[0] in program.co_names:
    return compiled(f"{prompt}\n\n{text}") or program
  lines = text.splitlines(keepends=True)
  end = next((index for index, line in enumerate(lines) if line.strip() and not line[0].isspace()), len(lines))
  body = "".join(lines[:end])
  return compiled(prompt + text) or (compiled(prompt + body) if body.strip() else None)


def serve(prompt, text, entry_point, calls, answers):
  """Runs the candidate, then answers calls until the checker closes the pipe.

  Answers are [kind, value]: 'ready' once, or 'no code'; then per call 'value' or 'raised', whose value is the name of
  the nearest builtin exception class and the message. SystemExit ends the process, which the checker sees as the end
  of the pipe.

  Args:
    prompt, text, entry_point: as for `assemble`.
    calls, answers: file descriptors to read from and to write to.
  """
  requests, replies = os.fdopen(calls, "rb"), os.fdopen(answers, "wb")
  objects = []  # those that the checker holds a `Handle` to

  def keep(value):
    objects.append(value)
    return len(objects) - 1

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
    name, arguments, named = decode(json.loads(line), objects.__getitem__)
    return "value", encode(eval(name, module.__dict__)(*arguments, **named), keep)

  reply(*attempt(run))
  for line in requests:
    reply(*attempt(lambda line=line: call(line)))
  os._exit(0)  # without joining threads that the candidate has started


class CandidateLost(BaseException):
  """The candidate no longer answers. Not an Exception, so that `except Exception` in a test does not catch it."""


class Candidate:
  """The checker's connection to the candidate process.

  Attributes:
    lost: '' while the candidate answers; then 'gone' (its process has ended), 'output' (an answer was too long) or
      'error' (an answer was malformed). Remains set even if a test catches `CandidateLost`.
    answered: number of calls answered.
    raised: the last exception that a call raised, or None.
  """

  def __init__(self, calls, answers, longest):
    self._requests, self._replies = os.fdopen(calls, "wb", buffering=0), os.fdopen(answers, "rb")
    self._longest = longest
    self.lost, self.answered, self.raised = "", 0, None

  def _lose(self, reason):
    self.lost = self.lost or reason
    raise CandidateLost

  def receive(self):
    """Reads the next answer; returns its kind and its value, which is an exception for the kind 'raised'."""
    if self.lost:
      raise CandidateLost
    line = self._replies.readline(self._longest)
    if not line.endswith(b"\n"):
      self._lose("output" if len(line) >= self._longest else "gone")
    try:
      kind, value = json.loads(line)
      return kind, self._exception(*value) if kind == "raised" else decode(value)
    except MemoryError:
      raise
    except Exception:
      self._lose("error")

  def _exception(self, name, message):
    kind = getattr(builtins, name, None)
    # Inside `map` these two would end the loop of a test early instead of failing the test.
    silent = (StopIteration, StopAsyncIteration)
    if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, silent):
      try:
        return kind(message)
      except TypeError:  # its constructor takes other arguments
        pass
    return RuntimeError(f"{name}: {message}")

  def function(self, name):
    """Returns a function that makes the candidate evaluate a name, or another expression, and call the result."""

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
  """The global names that a code object and the code objects nested in it use, in order."""
  names = list(code.co_names)
  for inner in code.co_consts:
    if isinstance(inner, type(code)):
      names += names_in(inner)
  return names


def run_tests(candidate, setup, test, entry_point, asserts):
  """Returns if the tests pass and raises otherwise. Arguments as for `check`."""
  names = {"__name__": "tests"}
  exec(compile(setup, "<setup>", "exec", dont_inherit=True), names)
  if "random" in test:
    import random

    random.seed(0)  # so that a verdict is reproducible
  if test:
    exec(compile(test, "<test>", "exec", dont_inherit=True), names)
    names[entry_point] = candidate.function(entry_point)  # after exec, which binds it to the prompt's stub
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
      tested.update(used[:1])  # it has the name of a builtin: MBPP's `assert sum(10, 15) == 6`
    names |= {name: candidate.function(name) for name in tested.intersection(used).difference(names)}
    exec(code, names)


def check(setup, test, entry_point, asserts, calls, answers, longest):
  """Runs tests against the candidate and writes [reason, detail] as JSON to stdout.

  The reason is that of a `reward.Verdict`, or 'gone' if the candidate's process has ended.

  Args:
    setup: Python code that the tests need, such as the prompt's helpers.
    test: Python code that binds `check(candidate)`; '' if there are only asserts.
    entry_point: the expression whose value is the function under test; '' to infer it from the asserts.
    asserts: statements. A name that is not bound here is looked up in the candidate.
    calls, answers: file descriptors to write to and to read from.
    longest: limit on the length of an answer, bytes.
  """
  verdict = os.dup(1)
  os.dup2(2, 1)  # so that output of the tests cannot be mistaken for a verdict
  candidate = Candidate(calls, answers, longest)
  reason = "error"
  try:
    kind, detail = candidate.receive()
    if kind == "ready":
      run_tests(candidate, setup, test, entry_point, asserts)
      reason, detail = ("right", "") if candidate.answered else ("error", "The tests never called the candidate.")
    elif kind == "no code":
      reason, detail = kind, "The program is empty or does not compile."
  except AssertionError as error:
    reason, detail = ("error" if error is candidate.raised else "wrong answer"), error
  except BaseException as error:
    detail = error
  if candidate.lost:
    reason, detail = candidate.lost, "The candidate did not answer a call as expected."
  elif isinstance(detail, MemoryError):
    reason = "memory"
  text = detail if isinstance(detail, str) else f"{type(detail).__name__}: {detail}"
  os.write(verdict, json.dumps([reason, text[:1000]]).encode())
  os._exit(0)
