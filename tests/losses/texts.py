"""Texts in roles, packed into the batches that losses of likelihoods and preferences read."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxbias.losses import likelihood, preference, unlearning
from jaxbias.losses.context import LossContext
from jaxbias.losses.registry import LOSSES
from jaxbias.models.transformer import Head
from jaxbias.types import ROLES, Batch, Metric
from tests.losses.calls import call

MODULES = (likelihood, preference, unlearning)  # losses of groups, words and weights have files of their own
NAMES = sorted(name for name, loss in LOSSES.items() if loss.function.__module__ in [m.__name__ for m in MODULES])
EVERY_LOSS = pytest.mark.parametrize("name", NAMES)
V, L = 7, 2  # words and blocks of the models that are made up here


@dataclasses.dataclass(frozen=True)
class Text:
  """A segment: of each answer token the log-probability, the state before it (logits, here) and the token, under policy
  and reference."""

  role: str
  logprob: np.ndarray
  ref: np.ndarray
  hidden: np.ndarray
  ref_hidden: np.ndarray
  target: np.ndarray
  pair: int  # texts with the same number are twins


def text(role: str, logprob, ref=None, pair: int = -1, hidden=None, ref_hidden=None, target=None) -> Text:
  logprob = np.atleast_1d(logprob)
  hidden = np.zeros((len(logprob), V)) if hidden is None else hidden
  return Text(role, logprob, logprob if ref is None else np.atleast_1d(ref), hidden,
              hidden if ref_hidden is None else ref_hidden,
              np.zeros(len(logprob), int) if target is None else target, pair)  # fmt: skip


def context(rows: list[list[Text]], spare: int = 0, filler: float = 0.0) -> LossContext:
  """Texts packed as given, with `spare` unused segments and positions in every row, which hold `filler`."""
  B, S = len(rows), max(map(len, rows)) + spare
  P = max(sum(len(t.logprob) for t in row) for row in rows) + spare
  width = rows[0][0].hidden.shape[-1]
  full = lambda shape, value, dtype=np.int32: np.full((B, *shape), value, dtype)
  role, pair, segment, target = full((S,), -1), full((S,), -1), full((P,), 0), full((P,), 0)
  logprob, ref = (full((P,), filler, np.float32) for _ in range(2))
  hidden, ref_hidden = (full((P, width), filler, np.float32) for _ in range(2))
  for b, row in enumerate(rows):
    p = 0
    for s, t in enumerate(row):
      role[b, s] = ROLES.index(t.role)
      twins = [i * S + j for i, r in enumerate(rows) for j, u in enumerate(r) if u.pair == t.pair >= 0 and u is not t]
      pair[b, s] = twins[0] if twins else -1
      span = np.s_[b, p : p + len(t.logprob)]
      logprob[span], ref[span], target[span], segment[span] = t.logprob, t.ref, t.target, s + 1
      hidden[span], ref_hidden[span] = t.hidden, t.ref_hidden
      p += len(t.logprob)
  at = np.broadcast_to(np.arange(P, dtype=np.int32), (B, P))
  role, pair, segment, target, ref, at = map(jnp.asarray, (role, pair, segment, target, ref, at))
  batch = Batch(
    tokens=target, segment=segment, position=at, score_at=at, target=target, score_segment=segment, role=role,
    pair=pair, ref_logprob=ref, kl_at=at, kl_segment=segment, kl_target=target, ref_hidden=jnp.asarray(ref_hidden),
  )  # fmt: skip
  return with_hidden(LossContext(batch, jnp.asarray(logprob), head=Head(jnp.eye(width)), ref_head=Head(jnp.eye(width))),
                     jnp.asarray(hidden))  # fmt: skip


def with_hidden(ctx: LossContext, hidden: jax.Array) -> LossContext:
  """The context of a model whose last states are `hidden`, and whose first block gives twice that."""
  blocks = lambda x: {"residual_out": jnp.stack([2 * x, x])}
  return dataclasses.replace(ctx, kl_hidden_BKD=hidden, hidden_BTD=hidden, captures=blocks(hidden),
                             base_captures=blocks(ctx.batch.ref_hidden))  # fmt: skip


def texts(at_reference: bool = False) -> list[Text]:
  """Three pairs, a forget text and a retain text without twin, two general texts, two mismatched, of many lengths."""
  rng = np.random.default_rng(0)

  def make(role, n, pair=-1):
    logprob, ref = -rng.exponential(2.0, (2, n))
    hidden, ref_hidden = rng.standard_normal((2, n, V))
    if role == "mismatched":
      ref = ref - 3.0  # so that the model has moved, by KTO's estimate
    ref, ref_hidden = (logprob, hidden) if at_reference else (ref, ref_hidden)
    return text(role, logprob, ref, pair, hidden, ref_hidden, rng.integers(0, V, n))

  return [
    make("forget", 1, 0), make("retain", 4, 0), make("general", 3), make("forget", 2, 1), make("retain", 3, 1),
    make("general", 5), make("forget", 6, 2), make("retain", 2, 2), make("retain", 1), make("forget", 4),
    make("mismatched", 3), make("mismatched", 2),
  ]  # fmt: skip


def value(name: str, ctx: LossContext, on: str | None = None, **settings) -> Metric:
  return call(name, ctx, on, **settings).metric
