"""Objectives as a user writes them, named by their path."""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp

from rspo_jax.objectives.terms import Terms


def linear(
  log_ratio,
  advantage,
  mask,
  *,
  log_shift=None,
  placement="before_clip",
  slope: float,
  order: int | None = None,
  kind: Literal["a", "b"] | None = "a",
  plain=0.5,
):
  """slope * q * A."""
  del log_shift, placement, order, kind, plain
  return Terms(jnp.where(mask, slope * log_ratio * advantage[:, None], 0), *(mask & False,) * 3)


def without_shift(log_ratio, advantage, mask):
  return linear(log_ratio, advantage, mask, slope=1.0)


def with_a_table(log_ratio, advantage, mask, *, log_shift=None, placement="before_clip", table: dict | None = None):
  return linear(log_ratio, advantage, mask, slope=1.0)
