"""Batches of made-up features for the collapse regulariser."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxbias.losses.collapse import no_sums
from jaxbias.losses.context import LossContext
from jaxbias.losses.registry import Found
from jaxbias.models.transformer import Head
from jaxbias.types import Batch
from tests.losses.calls import call

MLM = {"shift": "0"}  # the oracle's samples are pairs of a feature and its label


def context(tokens, x, w, segment=None, role=1) -> LossContext:
  """Rows of tokens with a feature each; all of one role."""
  tokens, x = np.atleast_2d(tokens), jnp.asarray(x, jnp.float32)
  x = x if x.ndim == 3 else x[None]
  segment = np.ones_like(tokens) if segment is None else np.atleast_2d(segment)
  ints = lambda a: jnp.asarray(a, jnp.int32)
  batch = Batch(tokens=ints(tokens), segment=ints(segment), position=None, score_at=None, target=None,
                score_segment=None, role=jnp.full((len(tokens), max(segment.max(), 1)), role))  # fmt: skip
  return LossContext(batch, None, hidden_BTD=x, captures={"stack_out": x}, head=Head(jnp.asarray(w, jnp.float32)))


def empty(ids, D: int, group=None) -> dict:
  ids = jnp.asarray(ids, jnp.int32).reshape(len(ids), -1)
  group = jnp.zeros(len(ids), jnp.int32) if group is None else jnp.asarray(group, jnp.int32)
  return {"ids": ids, "group": group, **no_sums(len(ids), D)}


def found(ctx: LossContext, aux: dict, **settings) -> Found:
  return call("nc3", ctx, aux=aux, **settings)


def of_weights(ctx: LossContext, aux: dict, **settings):
  """Loss and gradient by the head."""
  of = lambda w: found(dataclasses.replace(ctx, head=Head(w)), aux, **settings).metric.value()
  return jax.value_and_grad(of)(ctx.head.matrix)


def random_case(seed: int = 0, n: int = 24, C: int = 4, D: int = 6):
  rng = np.random.default_rng(seed)
  return context(rng.integers(0, C + 1, n), rng.normal(size=(n, D)), rng.normal(size=(C + 1, D))), empty(range(C), D)
