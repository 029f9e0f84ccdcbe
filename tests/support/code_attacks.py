"""Adversarial programs: they try to obtain an undeserved verdict or to harm the host.

They are bounded in case a sandbox fails: six forks create at most 64 processes, and signals are sent only inside a
process namespace. Tests replace SECRET with the path of a file that must not be readable, HARM with one that must not
be written, and PORT with a port that must not be reachable.
"""

SECRET = {
  "prompt": "",
  "entry_point": "secret",
  "test": """
def check(candidate):
  assert candidate(14) == "expected-4711"
  assert candidate(15) == "expected-4712"
""",
}
RED_TEAM = {
  "exits with 0": "import sys; sys.exit(0)",
  "exits with 0 when called": "import sys\ndef secret(x): sys.exit(0)",
  "exits without cleaning up": "import os; os._exit(0)",
  "exits without cleaning up when called": "import os\ndef secret(x): os._exit(0)",
  "exits at exit": "import atexit, os; atexit.register(os._exit, 0)\ndef secret(x): raise KeyboardInterrupt",
  "prints the verdict": """
    import os, sys
    for line in ('["right", ""]', "right", "passed", "1 passed", "OK"):
      print(line, flush=True)
      print(line, file=sys.stderr, flush=True)
    os._exit(0)
  """,
  "writes the verdict to every descriptor": """
    import os
    for number in range(64):
      try: os.write(number, b'["right", ""]\\n')
      except OSError: pass
    def secret(x): os._exit(0)
  """,
  "answers before it is asked": """
    import os
    for number in range(3, 64):
      try: os.write(number, b'["ready", null]\\n' + b'["value", true]\\n' * 99)
      except OSError: pass
  """,
  "answers with a malformed value": """
    import os
    for number in range(3, 64):
      try: os.write(number, b'["ready", null]\\n["value", ["dict", 1]]\\n')
      except OSError: pass
  """,
  "equals everything": """
    class Same(str):
      __eq__ = lambda *_: True
      __ne__ = lambda *_: False
      __hash__ = str.__hash__
    def secret(x): return Same("x")
  """,
  "is an object that equals everything": """
    class Same:
      def __eq__(self, other): return True
      def __bool__(self): return True
    def secret(x): return Same()
  """,
  "patches exceptions and hooks": """
    import builtins, sys
    builtins.AssertionError = type("Quiet", (BaseException,), {"__new__": lambda *_: None})
    sys.excepthook = lambda *_: None
    sys.settrace(lambda *_: None)
    def secret(x): return None
  """,
  "redefines the builtins": """
    import builtins
    for name in ("all", "any", "len", "isinstance", "getattr", "print", "compile", "__import__", "open"):
      setattr(builtins, name, lambda *_, **__: True)
    def secret(x): return True
  """,
  "defines its own check": "def check(candidate): return True\ndef secret(x): return check",
  "patches its harness": """
    import json, sys
    frame = sys._getframe()
    while frame:
      for name in ("encode", "decode", "check", "run_tests", "run_task"):
        if name in frame.f_globals: frame.f_globals[name] = lambda *_: True
      frame = frame.f_back
    json.dumps = lambda *_: '["right", ""]'
    def secret(x): return True
  """,
  "looks for the answer in its process": """
    import gc, os, sys
    def everything():
      yield from map(repr, gc.get_objects())
      frame = sys._getframe()
      while frame:
        yield repr(frame.f_locals)
        frame = frame.f_back
      yield repr(os.environ) + repr(sys.argv) + repr(sys.orig_argv)
    def secret(x):
      # Computed, so that the program's own text does not match.
      for text in everything():
        if "-" + str(4697 + 14) in text: return "found"
      return "expected"
  """,
  "looks for the answer in files and processes": """
    import glob, os
    def secret(x):
      for path in [*glob.glob("/proc/*/*"), *glob.glob("/tmp/*"), *glob.glob("/dev/fd/*"), "SECRET"]:
        try:
          if "expected-" in open(path, errors="replace").read(10**6): return "expected-%d" % (4697 + x + 10**6)
        except OSError: pass
  """,
  "reads the descriptors it was given": """
    import os, select
    def secret(x):
      for number in range(64):
        try:
          if select.select([number], [], [], 0)[0]: os.read(number, 10**6)
        except (OSError, ValueError): pass
  """,
  "raises StopIteration": "def secret(x): raise StopIteration",
  "raises AssertionError": "def secret(x): raise AssertionError",
  "fork bomb": "import os\nfor _ in range(6): os.fork()",
  "fork bomb when called": "import os\ndef secret(x):\n  for _ in range(6): os.fork()",
  "process bomb": "import subprocess, sys\nfor _ in range(9): subprocess.Popen([sys.executable, '-c', 'input()'])",
  "thread bomb": "import threading\nfor _ in range(5000): threading.Thread(target=threading.Event().wait).start()",
  "memory bomb": "x = [0]\nwhile len(x) < 2**30: x += x",
  "memory bomb for the checker": "def secret(x): return [range(10**12)] * 9",
  "endless output": "while True: print('spam' * 99)",
  "endless errors": "import sys\nwhile True: sys.stderr.write('spam' * 99)",
  "endless answer": "def secret(x): return 'x' * 10**7",
  "endless iterator": "import itertools\ndef secret(x): return itertools.count()",
  "endless loop": "while True: pass",
  "endless thread": """
    import itertools, threading
    threading.Thread(target=lambda: all(itertools.repeat(1))).start()
    def secret(x): return "harmless"
  """,
  "bottomless answer": "def secret(x):\n  y = []\n  for _ in range(10**5): y = [y]\n  return y",
  "bottomless recursion": "import sys; sys.setrecursionlimit(10**9)\ndef secret(x): return secret(x)",
  "bottomless source": "x = " + "(" * 5000 + ")" * 5000,
  "raises its limits": """
    import resource
    for name in ("CPU", "AS", "NPROC", "FSIZE", "NOFILE"):
      try: resource.setrlimit(getattr(resource, "RLIMIT_" + name), (resource.RLIM_INFINITY,) * 2)
      except (ValueError, OSError): pass
    while True: pass
  """,
  "disk bomb": """
    def secret(x):
      for number in range(10**4): open(str(number), "wb").write(bytes(10**6))
  """,
  "crash": "import ctypes; ctypes.string_at(0)",
  "closes all descriptors": "import os; os.closerange(0, 99)",
  "reads secrets": """
    import os
    def secret(x):
      found = []
      for path in ("/etc/shadow", "/etc/passwd", "/proc/self/environ", "/proc/1/environ", "SECRET"):
        try: found.append(open(path).read())
        except OSError: pass
      raise ValueError(repr(found) + repr(dict(os.environ)))
  """,
  "network": """
    import socket
    def secret(x):
      with socket.create_connection(("127.0.0.1", PORT), timeout=1) as server:
        server.sendall(b"hello")
        return server.recv(99)
  """,
  "kills its parents": """
    import os, signal
    if os.getpid() < 9:  # only in a process namespace
      for process in (os.getppid(), 1, -1):
        try: os.kill(process, signal.SIGKILL)
        except OSError: pass
    def secret(x): return "harmless"
  """,
  "leaves a daemon": """
    import os, time
    def daemon():
      if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
          time.sleep(1)
          open("HARM", "w").write("late")
        os._exit(0)
    try: daemon()
    except OSError: pass
    def secret(x): return "harmless"
  """,
  "leaves a thread": """
    import threading, time
    def late():
      time.sleep(1)
      open("HARM", "w").write("late")
    threading.Thread(target=late).start()
    def secret(x): return "harmless"
  """,
  "writes outside its folder": """
    import os, shutil
    for path in ("HARM", "/HARM", os.__file__, "/usr/lib/x.pth", "/dev/shm/x"):
      try: open(path, "a").write("x")
      except OSError: pass
    try: os.symlink("HARM", "link"); open("link", "w").write("x")
    except OSError: pass
    shutil.rmtree(os.path.dirname("SECRET"), ignore_errors=True)
    def secret(x): return "harmless"
  """,
  "imports the reward": """
    import rspo_jax.rewards.code.reward
    rspo_jax.rewards.code.reward.run_task = None
    def secret(x): return "harmless"
  """,
}
