"""Batches of made-up states for the losses of MABEL, ADEPT and ASE."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxbias.losses.collapse import no_sums
from jaxbias.losses.context import LossContext
from jaxbias.losses.registry import LOSSES, Found
from jaxbias.types import Batch
from tests.losses.calls import call

SENTENCES = ("mabel_contrast", "mabel_alignment")
WORDS = ("adept", "adept_anchor", "ase_orthogonal")
MALE, FEMALE, NEUTRAL, OTHER = 1, 2, 3, 4  # tokens


def entailments(states, order=None, rows: int = 1) -> LossContext:
  """One state a text: states [4, n, D] of premises, hypotheses, and their counterfactuals in the same order; laid out
  in `order`, in so many packed rows."""
  n, D = states.shape[1:]
  order = np.arange(4 * n) if order is None else order
  number = np.arange(4 * n).reshape(4, n)
  pair, group, role, row = (np.zeros(4 * n, int) for _ in range(4))
  for side in range(4):
    pair[number[side]], group[number[side]], role[number[side]] = number[(side + 2) % 4], np.arange(n), side < 2
    row[number[side]] = 10 * np.arange(n) + side
  place = np.argsort(order)
  ints = lambda x: jnp.asarray(np.asarray(x)[order].reshape(rows, -1), jnp.int32)
  segment = jnp.broadcast_to(jnp.arange(1, 4 * n // rows + 1), (rows, 4 * n // rows))
  batch = Batch(tokens=segment, segment=segment, position=jnp.zeros_like(segment), score_at=None, target=None,
                score_segment=None, role=ints(role), row=ints(row), pair=ints(place[pair]),
                group=ints(group))  # fmt: skip
  hidden = jnp.asarray(np.asarray(states, np.float32).reshape(4 * n, D)[order].reshape(rows, -1, D))
  return LossContext(batch, None, hidden_BTD=hidden)


def worded(tokens, states, ref=None, segment=None, role: int = 1) -> LossContext:
  """Rows of tokens with states [L, B, T, D] behind every block; all texts of one role."""
  tokens = jnp.asarray(np.atleast_2d(tokens), jnp.int32)
  segment = jnp.ones_like(tokens) if segment is None else jnp.asarray(np.atleast_2d(segment), jnp.int32)
  batch = Batch(tokens=tokens, segment=segment, position=tokens, score_at=None, target=None, score_segment=None,
                role=jnp.full((len(tokens), max(int(segment.max()), 1)), role))  # fmt: skip
  ctx = LossContext(batch, None, base_captures={} if ref is None else {"residual_out": jnp.asarray(ref, jnp.float32)})
  return with_states(ctx, jnp.asarray(states, jnp.float32))


def with_states(ctx: LossContext, states: jax.Array) -> LossContext:
  """The same texts with other states: [B, T, D] of sentences, [L, B, T, D] of words."""
  if states.ndim == 3:
    return dataclasses.replace(ctx, hidden_BTD=states)
  captures = {"residual_out": states, "stack_out": states[-1]}
  return dataclasses.replace(ctx, hidden_BTD=2 * states[-1], captures=captures)


def statistics(sums, counts=None) -> dict:
  """Running statistics of one word an attribute; `sums` [A, X] of so many occurrences."""
  sums = jnp.asarray(sums, jnp.float32)
  counts = jnp.ones(len(sums), jnp.int32) if counts is None else jnp.asarray(counts, jnp.int32)
  return {**no_sums(*sums.shape), "attribute": jnp.asarray([[MALE], [FEMALE]]), "neutral": jnp.asarray([NEUTRAL]),
          "sums": sums, "counts": counts}  # fmt: skip


def found(name: str, ctx: LossContext, aux: dict | None = None, **settings) -> Found:
  """A loss with its defaults, but for `settings`; `aux` of nothing yet unless it is given."""
  if LOSSES[name].init_aux and aux is None:
    width = np.prod(ctx.captures["residual_out"].shape[::3]) if name == "adept" else ctx.hidden_BTD.shape[-1]
    aux = statistics(np.zeros((2, width)), [0, 0])
  return call(name, ctx, aux=aux, **settings)


def value(name: str, ctx: LossContext, aux: dict | None = None, **settings) -> jax.Array:
  return found(name, ctx, aux, **settings).metric.value()


def entailed(states) -> LossContext:
  """The same texts for `infonce`: a premise's twin is its hypothesis, whether original or counterfactual."""
  ctx = entailments(states)
  n = states.shape[1]
  twin = np.arange(4 * n).reshape(4, n)[[1, 0, 3, 2]].reshape(1, -1)
  role = np.repeat([1, 0, 1, 0], n)[None]
  return dataclasses.replace(ctx, batch=ctx.batch.replace(pair=jnp.asarray(twin), role=jnp.asarray(role)))
