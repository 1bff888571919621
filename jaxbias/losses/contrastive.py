"""The contrast of a group's positives with its negatives: entity-pooled head, loss scaling, cross-entropy beside it.

N = B * S, the segments of a batch: a contrast reads every two of them, whichever packed row or device they lie in.
Group: the texts made from one source. Positives keep its meaning, negatives were made toxic, unsure or untrue.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxbias.data.rows import KINDS
from jaxbias.losses.context import LossContext
from jaxbias.losses.registry import Found, register_loss
from jaxbias.models.config import ModelConfig
from jaxbias.types import Batch, Metric

EPS = 1e-12
ENTITY_RATE = 50 * 0.9  # of the published code's own weight by the share of entity tokens, which it comments out


# Representations


def unit(x: jax.Array) -> jax.Array:
  """x / |x| along the last axis; 0, with a gradient of 0, where x is 0."""
  return x * jax.lax.rsqrt(jnp.maximum((x * x).sum(-1, keepdims=True), EPS**2))


def init_contrast_head(key: jax.Array, config: ModelConfig) -> dict:
  """Two layers as wide as what the head of the language model reads, initialised as published; float32."""
  D, (first, second) = config.table_size, jax.random.split(key)
  normal = lambda key, deviation: deviation * jax.random.normal(key, (D, D))
  return {"w1": normal(first, 0.01), "b1": jnp.zeros(D), "w2": normal(second, 1 / D), "b2": jnp.zeros(D)}


def contrast_head(params: Mapping[str, jax.Array], hidden_BTD: jax.Array) -> jax.Array:
  """z = unit(W2 gelu(W1 h + b1) + b2) at every position, float32 (Korkmaz et al. 2025; CLIFF, Cao & Wang 2021)."""
  with jax.default_matmul_precision("highest"):
    h = jax.nn.gelu(hidden_BTD.astype(jnp.float32) @ params["w1"] + params["b1"], approximate=False)
    return unit(h @ params["w2"] + params["b2"])


def segment_masks(batch: Batch) -> jax.Array:
  """bool [B, S, T]: which positions belong to which segment."""
  return batch.segment[:, None, :] == jnp.arange(1, batch.role.shape[1] + 1)[:, None]


def mean_over(z_BTD: jax.Array, keep_BST: jax.Array) -> jax.Array:
  """The mean of each segment's kept positions, [B, S, D]; 0 where none is kept."""
  total = jnp.einsum("bst,btd->bsd", keep_BST.astype(z_BTD.dtype), z_BTD, precision=jax.lax.Precision.HIGHEST)
  return total / jnp.maximum(keep_BST.sum(-1, keepdims=True), 1)


class Members(NamedTuple):
  """The segments of a batch as a contrast sees them, all [N]."""

  group: jax.Array
  positive: jax.Array
  negative: jax.Array

  @classmethod
  def of(cls, batch: Batch, anchor_BS: jax.Array) -> Members:
    """Positives play the role that the loss reads; twins of a pair, which have no polarity, are positives of either."""
    member = batch.group >= 0
    positive = (batch.polarity == 1) & anchor_BS | (batch.polarity < 0)
    flat = (batch.group, member & positive, member & (batch.polarity == 0))
    return cls(*(x.reshape(-1) for x in flat))

  @property
  def same(self) -> jax.Array:
    """bool [N, N]: both in one group, a segment with itself included."""
    member = self.positive | self.negative
    return (self.group[:, None] == self.group) & member[:, None] & member

  def only(self, keep: jax.Array) -> Members:
    return Members(self.group, self.positive & keep, self.negative & keep)


def pool_entities(z_BTD: jax.Array, batch: Batch, members: Members, policy: str) -> tuple[jax.Array, jax.Array]:
  """r [N, D], the mean of z over a segment's entity tokens, and which segments take part.

  A segment without such tokens is left out (drop); or, where that would leave its group fewer than two positives, is
  pooled over all of its answer (meanpool); or is kept as r = 0, as in the published code (zero).
  """
  in_BST = segment_masks(batch)
  entity_BST = in_BST & batch.entity[:, None]
  some_N = entity_BST.any(-1).reshape(-1)
  if policy == "zero":
    keep_N = jnp.ones_like(some_N)
  else:
    keep_N = some_N
  if policy == "meanpool":
    left_N = (members.same & (members.positive & some_N)).sum(-1)
    rescued_N = ~some_N & (left_N < 2)
    rescued_BS = rescued_N.reshape(batch.role.shape)
    entity_BST |= in_BST & batch.answer[:, None] & rescued_BS[..., None]
    keep_N |= rescued_N & entity_BST.any(-1).reshape(-1)
  r_BSD = mean_over(z_BTD, entity_BST)
  return r_BSD.reshape(-1, r_BSD.shape[-1]), keep_N


def has_entity(batch: Batch) -> jax.Array:
  """bool [N]: the segment holds an entity token."""
  return (segment_masks(batch) & batch.entity[:, None]).any(-1).reshape(-1)


# Who is compared with whom


def cosines(r_ND: jax.Array) -> jax.Array:
  r_ND = unit(r_ND)
  return jnp.einsum("id,jd->ij", r_ND, r_ND, precision=jax.lax.Precision.HIGHEST)


def pair_masks(members: Members) -> tuple[jax.Array, jax.Array]:
  """Both bool [N, N]: V, two of one group; Pi, two positives of one group."""
  valid = members.same & ~jnp.eye(len(members.group), dtype=bool)
  return valid, valid & members.positive[:, None] & members.positive


def log_share(s_NN: jax.Array, valid_NN: jax.Array) -> jax.Array:
  """log(exp(s_ij) / sum_k V_ik exp(s_ik)); in a row without a partner finite, and to be masked by the caller."""
  some_N1 = valid_NN.any(-1, keepdims=True)
  return s_NN - jax.nn.logsumexp(jnp.where(valid_NN | ~some_N1, s_NN, -jnp.inf), axis=-1, keepdims=True)


def compare(r_ND: jax.Array, members: Members, temperature: jax.Array) -> Comparison:
  """Each segment's partners in its group, weighed by s_ij = cos(r_i, r_j) / temperature."""
  valid_NN, pair_NN = pair_masks(members)
  cos_NN = cosines(r_ND)
  return Comparison(cos_NN, log_share(cos_NN / temperature, valid_NN), valid_NN, pair_NN)


class Comparison(NamedTuple):
  """All [N, N]; `valid` and `pair` are the masks V and Pi."""

  cos: jax.Array
  log_p: jax.Array
  valid: jax.Array
  pair: jax.Array

  def over_pairs(self, x_NN: jax.Array) -> Metric:
    return Metric.over(jnp.broadcast_to(x_NN, self.pair.shape), self.pair)


def toxic_weights(batch: Batch, members: Members, mode: str, weight: jax.Array) -> jax.Array:
  """w [N], how much a group's contrast counts. No gradient flows.

  group_flag: `weight` for groups with a toxic negative; batch_flag: for all groups when there is one in the batch, as
  published; graded: 1 + (weight - 1) max p_toxic over the group's negatives; entity_rate: min(0.9, 45 rho), rho the
  share of tokens that are entities.
  """
  ones = jnp.ones(members.group.shape)
  toxic = members.negative & (batch.kind.reshape(-1) == KINDS.index("toxic"))
  if mode == "group_flag":
    return jnp.where((members.same & toxic).any(-1), weight, ones)
  if mode == "batch_flag":
    return jnp.where(toxic.any(), weight, ones)
  if mode == "graded":
    grade = jnp.where(members.same & members.negative, batch.toxicity.reshape(-1), 0.0).max(-1)
    return 1 + (weight - 1) * grade
  if mode == "entity_rate":
    return jnp.minimum(0.9, ENTITY_RATE * batch.entity.sum() / jnp.maximum((batch.segment > 0).sum(), 1)) * ones
  return ones


# Losses


@register_loss(
  "contrast",
  on="retain",
  needs=("hidden", "groups", "no_targets"),
  coefficients={"temperature": 0.1, "toxic_weight": 1.5},
  options={
    "empty": ("drop", "meanpool", "zero"),
    "w_mode": ("group_flag", "batch_flag", "graded", "entity_rate", "none"),
    "normalize_w": ("no", "yes"),
  },
  couples=(("w_mode", "batch_flag"), ("w_mode", "entity_rate"), ("normalize_w", "yes")),
  init_params=init_contrast_head,
)
def contrast(
  ctx: LossContext, on: str, temperature: jax.Array, toxic_weight: jax.Array, empty: str, w_mode: str, normalize_w: str,
  params: Mapping[str, jax.Array],
) -> Found:  # fmt: skip
  """Positives of a group drawn together, away from its negatives (Korkmaz et al. 2025, from CLIFF, Cao & Wang 2021).

  L = 1/|Pi| sum over (i, j) in Pi of -w_i log p_ij,  p_ij = V_ij exp(s_ij) / sum_k V_ik exp(s_ik),
  s_ij = cos(r_i, r_j) / temperature, r the mean of the contrast head's z over entity tokens. Negatives stand in
  denominators only. Never below log(P - 1) with P positives; log(P + N - 1) where all r are equal.
  """
  members = Members.of(ctx.batch, ctx.rows(on))
  r_ND, keep_N = pool_entities(contrast_head(params, ctx.hidden_BTD), ctx.batch, members, empty)
  kept = members.only(keep_N)
  found = compare(r_ND, kept, temperature)
  w_N1 = toxic_weights(ctx.batch, members, w_mode, toxic_weight)[:, None]
  if normalize_w == "yes":
    w_N1 /= jnp.maximum(found.over_pairs(w_N1).value(), EPS)
  floor_N1 = jnp.log(jnp.maximum(found.pair.sum(-1, keepdims=True), 1))
  notes = {
    "floor": found.over_pairs(floor_N1),
    "excess": found.over_pairs(-found.log_p - floor_N1),
    "w": found.over_pairs(w_N1),
    "positive_cosine": found.over_pairs(found.cos),
    "negative_cosine": Metric.over(found.cos, found.valid & kept.positive[:, None] & kept.negative),
    "without_entity": Metric.over(1.0 - has_entity(ctx.batch), members.positive | members.negative),
    "without_partner": Metric.over(1.0 - found.pair.any(-1), members.positive),
  }
  return Found(found.over_pairs(-w_N1 * found.log_p), notes=jax.lax.stop_gradient(notes))


@register_loss(
  "group_ce",
  on="retain",
  needs=("groups",),
  options={"row": ("original", "last_positive", "all_positives"), "denominator": ("row", "batch_all")},
)
def group_ce(ctx: LossContext, on: str, row: str, denominator: str) -> Metric:
  """Cross-entropy of the answers that a group teaches, nats a token: mean over an answer first, then over answers.

  The answer is the group's first positive (the text that it was made from), its last one or each. Published: the last
  one, which is a back-translation, over the number of targets of *all* the group's texts (`batch_all`); with K texts
  of one length that divides the term by K.
  """
  members = Members.of(ctx.batch, ctx.rows(on))
  order_N, same = ctx.batch.row.reshape(-1), members.same & members.positive
  first_N = jnp.where(same, order_N, jnp.iinfo(jnp.int32).max).min(-1)
  last_N = jnp.where(same, order_N, -1).max(-1)
  chosen = {"original": order_N == first_N, "last_positive": order_N == last_N, "all_positives": True}[row]
  taught_BS = (members.positive & chosen).reshape(ctx.batch.role.shape)
  if denominator == "batch_all":
    everyone_BS = (members.positive | members.negative).reshape(taught_BS.shape)
    return Metric(Metric.over(-ctx.logprob_BS, taught_BS).sum, Metric.over(ctx.count_BS, everyone_BS).sum)
  return Metric.over(-ctx.logprob_BS / ctx.tokens_BS, taught_BS)
