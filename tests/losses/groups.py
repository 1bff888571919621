"""Groups of positives and negatives, packed into the batches that contrasts read."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxbias.data.rows import KINDS
from jaxbias.losses.context import LossContext
from jaxbias.losses.contrastive import init_contrast_head
from jaxbias.losses.registry import Found
from jaxbias.types import ROLES, Batch
from tests.losses.calls import call
from tests.models import tiny_config

D, T = 6, 5  # width, tokens of a segment


@dataclasses.dataclass(frozen=True)
class Text:
  """A text of T tokens: its states, which of them name something, and where it stands."""

  hidden: np.ndarray
  group: int
  positive: bool
  kind: str = "original"
  entity: tuple[int, ...] = (1, 3)
  toxicity: float = 0.0
  logprob: tuple[float, ...] = (-1.0,)


def texts(*sizes: tuple[int, int], seed: int = 0, **how) -> list[Text]:
  """Groups of so many positives and negatives."""
  rng = np.random.default_rng(seed)
  make = lambda g, positive: Text(rng.normal(size=(T, D)), g, positive, "original" if positive else "swap_ent", **how)
  return [make(g, k < p) for g, (p, n) in enumerate(sizes) for k in range(p + n)]


def context(rows: list[list[Text]], spare: int = 0) -> LossContext:
  """Texts packed as given; `spare` unused slots a row and rows of padding, whose states are not numbers."""
  B, S = len(rows) + spare, max(map(len, rows)) + spare
  P = max(sum(len(t.logprob) for t in row) for row in rows)
  segment, entity, answer = np.zeros((B, S * T), int), np.zeros((B, S * T), bool), np.zeros((B, S * T), bool)
  hidden = np.zeros((B, S * T, D), np.float32)
  slots = {name: np.full((B, S), -1) for name in ("role", "group", "polarity", "kind", "row", "pair")}
  toxicity, logprob, score_segment = np.zeros((B, S)), np.zeros((B, P)), np.zeros((B, P), int)
  order = {id(t): n for n, t in enumerate(sorted((t for row in rows for t in row), key=lambda t: t.hidden[0, 0]))}
  for b, row in enumerate(rows):
    p = 0
    for s, t in enumerate(row):
      span = slice(s * T, (s + 1) * T)
      segment[b, span], hidden[b, span], answer[b, span] = s + 1, t.hidden, np.arange(T) > 0
      entity[b, s * T + np.array(t.entity, int)] = True
      slots["role"][b, s] = ROLES.index("retain" if t.positive else "forget")
      slots["group"][b, s], slots["polarity"][b, s], slots["kind"][b, s] = t.group, t.positive, KINDS.index(t.kind)
      slots["row"][b, s], toxicity[b, s] = order[id(t)], t.toxicity
      logprob[b, p : p + len(t.logprob)], score_segment[b, p : p + len(t.logprob)] = t.logprob, s + 1
      p += len(t.logprob)
  ints = jax.tree.map(lambda x: jnp.asarray(x, jnp.int32), slots)
  zeros = jnp.zeros((B, P), jnp.int32)
  batch = Batch(tokens=jnp.asarray(segment), segment=jnp.asarray(segment), position=jnp.asarray(segment),
                score_at=zeros, target=zeros, score_segment=jnp.asarray(score_segment), **ints,
                entity=jnp.asarray(entity), answer=jnp.asarray(answer), toxicity=jnp.asarray(toxicity))  # fmt: skip
  return LossContext(batch, jnp.asarray(logprob, jnp.float32), hidden_BTD=jnp.asarray(hidden))


PARAMS = jax.tree.map(lambda x: 30 * x, init_contrast_head(
  jax.random.key(0), tiny_config(hidden_size=D, mlp_size=8, num_layers=1, num_heads=2, num_kv_heads=1)))  # fmt: skip


def found(ctx: LossContext, temperature=0.5, params=PARAMS, **options) -> Found:
  return call("contrast", ctx, params=params, temperature=temperature, **options)


def value(ctx: LossContext, **how) -> float:
  return float(found(ctx, **how).metric.value())


def same_states(every: list[Text], **changes) -> list[Text]:
  """All alike but for what `changes` says about the text of an index."""
  alike = np.ones((T, D))
  return [dataclasses.replace(t, hidden=alike, **changes.get(str(i), {})) for i, t in enumerate(every)]
