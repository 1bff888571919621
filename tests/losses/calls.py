"""Losses called as programs: compiled once for each set of options and shapes, which is what takes a test's time."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax

from jaxbias.losses.context import LossContext
from jaxbias.losses.registry import LOSSES, Found
from jaxbias.types import Metric

ARRAYS = tuple(field.name for field in dataclasses.fields(LossContext) if field.name != "causal")


def call(name: str, ctx: LossContext, on: str | None = None, aux: Any = None, params: Any = None, **settings) -> Found:
  """A loss with its defaults, but for `settings`."""
  loss = LOSSES[name]
  assert settings.keys() <= loss.coefficients.keys() | loss.options.keys(), f"{name} has not all of {list(settings)}"
  numbers = {key: settings.get(key, default) for key, default in loss.coefficients.items()}
  options = tuple((key, settings.get(key, choices[0])) for key, choices in loss.options.items())
  own = {key: value for key, value in (("aux", aux), ("params", params)) if value is not None}
  arrays = {field: getattr(ctx, field) for field in ARRAYS}
  return _call(name, on or loss.on, options, ctx.causal, arrays, numbers, own)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _call(name, on, options, causal, arrays, numbers, own) -> Found:
  out = LOSSES[name].function(LossContext(**arrays, causal=causal), on, **numbers, **dict(options), **own)
  return Found(out) if isinstance(out, Metric) else Found(*out)
