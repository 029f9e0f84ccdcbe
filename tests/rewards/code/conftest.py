"""Sandboxes for the tests of code rewards; each fixture skips where its sandbox does not work."""

import pytest

from rspo_jax.rewards.code.sandbox import Sandbox
from tests.support.code_cases import STRONG, sandbox_or_skip


@pytest.fixture(scope="package")
def box():
  """The strongest sandbox, one that contains programs."""
  return sandbox_or_skip()


@pytest.fixture(scope="package")
def strongest():
  """The strongest sandbox, even if it is a weak one."""
  return sandbox_or_skip(allow_weak=True)


@pytest.fixture(scope="package", params=STRONG)
def strong(request):
  """Each isolation that contains programs."""
  sandbox = sandbox_or_skip(request.param)
  if sandbox.weak:
    pytest.skip(f"{sandbox} does not bound the processes of root; install pyseccomp and libseccomp2")
  return sandbox


@pytest.fixture(scope="package", params=(*STRONG, "rlimits"))
def any_sandbox(request):
  """Each isolation."""
  return sandbox_or_skip(request.param)


@pytest.fixture(params=["filter", "no filter"])
def filtered_or_not(strong, request):
  """Each isolation that contains programs, with and without the seccomp filter: namespaces must suffice."""
  return strong if request.param == "filter" else Sandbox(strong.isolation, b"")
