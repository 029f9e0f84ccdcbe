"""Selection of the isolation: which one is used, which ones are refused, and what is logged."""

import logging
import os
import sys

import pytest

from rspo_jax.rewards.code import sandbox
from rspo_jax.rewards.code.sandbox import Sandbox, find_sandbox, make_sandbox


@pytest.fixture
def chosen(monkeypatch):
  """A function that sets the strongest sandbox of this machine and the user id."""

  def choose(isolation, filter_program=b"filter", user=1):
    monkeypatch.setattr(sandbox, "_strongest", lambda: Sandbox(isolation, filter_program))
    monkeypatch.setattr(os, "geteuid", lambda: user)

  return choose


def test_rlimits_are_refused_without_allow_weak(chosen):
  chosen("rlimits")
  with pytest.raises(RuntimeError, match=r"best sandbox here is rlimits.*Install bubblewrap.*allow_weak=True"):
    find_sandbox()
  assert find_sandbox(allow_weak=True).isolation == "rlimits"


def test_root_without_a_filter_is_refused(chosen):
  chosen("bubblewrap", b"", user=0)
  with pytest.raises(RuntimeError, match="bubblewrap without a seccomp filter"):
    find_sandbox()
  chosen("bubblewrap", b"", user=1)
  assert not find_sandbox().weak


def test_the_strongest_working_isolation_is_selected_once_and_logged(caplog, monkeypatch):
  tried = []

  def trial(isolation):
    tried.append(isolation)
    if isolation == "bubblewrap":
      raise RuntimeError("bubblewrap does not work here: no bwrap.")
    return Sandbox(isolation, b"filter")

  monkeypatch.setattr(sandbox, "make_sandbox", trial)
  sandbox._strongest.cache_clear()
  try:
    with caplog.at_level(logging.INFO):
      assert find_sandbox().isolation == find_sandbox().isolation == "namespaces"
  finally:
    sandbox._strongest.cache_clear()
  assert tried == ["bubblewrap", "namespaces"]
  (message,) = [record.getMessage() for record in caplog.records if "sandbox" in record.getMessage()]
  assert "namespaces with a seccomp filter" in message and "no bwrap" in message


def test_an_isolation_that_does_not_work_gives_its_reason(monkeypatch):
  monkeypatch.setenv("PATH", "/nowhere")
  with pytest.raises(RuntimeError, match="bubblewrap does not work here: .*bwrap"):
    make_sandbox("bubblewrap")
  with pytest.raises(ValueError, match="want one of bubblewrap, namespaces, rlimits"):
    make_sandbox("docker")


def test_a_missing_pyseccomp_is_logged_as_a_warning(caplog, monkeypatch):
  monkeypatch.setitem(sys.modules, "pyseccomp", None)
  assert sandbox._filter_program.__wrapped__("fork") == b""
  assert "pip install pyseccomp" in caplog.text
