"""What an oracle case is, and batches made of given logits."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jaxbias.losses  # noqa: F401, registers the losses
from jaxbias.losses.context import LossContext
from jaxbias.losses.logprobs import gather_positions, token_logprobs
from jaxbias.models.transformer import Head
from jaxbias.types import ROLES, Batch
from tests.losses.calls import call

FOLDER = Path(__file__).parents[2] / "oracles"
WIDTHS = {"float32": np.float32, "float64": np.float64}
VALUE = {"float32": 1e-5, "float64": 1e-9}  # relative
SLOPE = {"float32": 1e-6, "float64": 1e-9}  # absolute


def oracle(name: str) -> dict:
  return json.loads((FOLDER / f"{name}_oracle.json").read_text())


ERRORS: dict[str, float] = {}  # of the cases that were computed already


@dataclasses.dataclass(frozen=True)
class Case:
  """`find()` is compared with `expected`. A relative tolerance is one of values, an absolute one of gradients."""

  name: str
  find: Callable[[], object]
  expected: object
  relative: float = 0.0
  absolute: float = 0.0
  wide: bool = False  # computed in float64

  def error(self) -> float:
    """The largest error, relative or absolute as the tolerance is; infinite where something is not finite."""
    if self.name not in ERRORS:
      ERRORS[self.name] = self._error()
    return ERRORS[self.name]

  def _error(self) -> float:
    with jax.enable_x64(True) if self.wide else contextlib.nullcontext():
      found = np.asarray(self.find(), np.float64)
    expected = np.asarray(self.expected, np.float64)
    assert found.shape == expected.shape, f"{found.shape} is not {expected.shape}"
    off = np.abs(found - expected)
    if self.relative:
      off = off / np.maximum(np.abs(expected), 1e-30)
    return float(np.max(np.where(np.isfinite(found), off, np.inf), initial=0.0))

  @property
  def tolerance(self) -> float:
    return self.relative or self.absolute


def logits_context(logits, labels, role: list[str], starts=None, ref=None, pair=None, real=None) -> LossContext:
  """A batch of one text a row whose states are its logits. Answer tokens: labels that are not -100, from `starts` on.

  `real` [B, T] marks the positions at which distributions are compared; without it there are none.
  """
  logits, labels = jnp.asarray(logits), np.asarray(labels)
  B, T, V = logits.shape
  answer = (labels[:, 1:] != -100) & (np.arange(1, T) >= np.asarray([1] * B if starts is None else starts)[:, None])
  at = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
  column = lambda x: jnp.asarray(x, jnp.int32)[:, None]
  target = jnp.asarray(np.maximum(np.where(answer, labels[:, 1:], 0), 0))
  ref = logits if ref is None else jnp.asarray(ref)
  head = Head(jnp.eye(V, dtype=logits.dtype))
  batch = Batch(
    tokens=at, segment=at, position=at, score_at=jnp.asarray(at[:, :-1]), target=target,
    score_segment=jnp.asarray(answer, jnp.int32), role=column([ROLES.index(r) for r in role]),
    pair=column([-1] * B if pair is None else pair), kl_at=jnp.asarray(at), ref_hidden=ref,
    kl_segment=jnp.asarray(np.zeros((B, T)) if real is None else real, jnp.int32),
    ref_logprob=scored(ref, jnp.asarray(at[:, :-1]), head, target),
  )  # fmt: skip
  return moved(LossContext(batch, None, head=head, ref_head=head), logits)


def moved(ctx: LossContext, logits: jax.Array) -> LossContext:
  """The same batch, and a policy with these logits."""
  return dataclasses.replace(ctx, logprob_BP=scored(logits, ctx.batch.score_at, ctx.head, ctx.batch.target),
                             kl_hidden_BKD=logits)  # fmt: skip


@jax.jit
def scored(logits: jax.Array, at: jax.Array, head: Head, target: jax.Array) -> jax.Array:
  return token_logprobs(gather_positions(logits, at), head, target)


def value(name: str, ctx: LossContext, on: str, **settings) -> jax.Array:
  return call(name, ctx, on, **settings).metric.value()


def slope(name: str, ctx: LossContext, on: str, **settings) -> jax.Array:
  """The derivative with respect to all logits."""
  return jax.grad(lambda logits: value(name, moved(ctx, logits), on, **settings))(ctx.kl_hidden_BKD)
