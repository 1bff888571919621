"""Losses on pairs of sentences: InfoNCE, SupCon, counterfactual logit pairing. N = B * S, the segments of a batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxbias.losses.context import LossContext
from jaxbias.losses.contrastive import Members, cosines, log_share, mean_over, pair_masks, segment_masks
from jaxbias.losses.logprobs import gather_positions, js_divergence
from jaxbias.losses.registry import register_loss
from jaxbias.types import Batch, Metric

POOLS = ("mean", "last", "first")


def sentences(ctx: LossContext, pool: str) -> jax.Array:
  """A vector of each segment, float32 [N, D]: its mean, its last or its first ([CLS]) state."""
  in_BST = segment_masks(ctx.batch)
  if pool != "mean":
    after = jnp.cumsum(in_BST[..., ::-1], -1)[..., ::-1] if pool == "last" else jnp.cumsum(in_BST, -1)
    in_BST &= after == 1
  r_BSD = mean_over(ctx.hidden_BTD.astype(jnp.float32), in_BST)
  return r_BSD.reshape(-1, r_BSD.shape[-1])


@register_loss("infonce", on="retain", needs=("hidden", "pairs", "no_targets"), coefficients={"temperature": 0.05},
               options={"pool": POOLS}, couples=True)  # fmt: skip
def infonce(ctx: LossContext, on: str, temperature: jax.Array, pool: str) -> Metric:
  """Each sentence of role `on` finds its twin among all twins of the batch (van den Oord et al. 2018; MABEL, He et al.
  2022): L = -log softmax_j(cos(r_i, twin_j) / temperature) at the twin of i."""
  anchor_N = (ctx.rows(on) & (ctx.batch.pair >= 0)).reshape(-1)
  twin_N = jnp.maximum(ctx.batch.pair.reshape(-1), 0)
  candidate_N = jnp.zeros_like(anchor_N).at[twin_N].max(anchor_N)
  log_p_NN = log_share(cosines(sentences(ctx, pool)) / temperature, anchor_N[:, None] & candidate_N)
  return Metric.over(-jnp.take_along_axis(log_p_NN, twin_N[:, None], axis=1)[:, 0], anchor_N)


@register_loss("supcon", on="retain", needs=("hidden", "groups", "no_targets"), coefficients={"temperature": 0.1},
               options={"pool": POOLS}, couples=True)  # fmt: skip
def supcon(ctx: LossContext, on: str, temperature: jax.Array, pool: str) -> Metric:
  """Supervised contrast, a group's positives being one class (Khosla et al. 2020, eq. 2).

  L_i = -1/|P(i)| sum over p in P(i) of log(exp(s_ip) / sum over a != i of exp(s_ia)), mean over anchors i that have a
  partner; a runs over all groups of the batch, their negatives included.
  """
  members = Members.of(ctx.batch, ctx.rows(on))
  _, pair_NN = pair_masks(members)
  anyone_N = members.positive | members.negative
  other_NN = members.positive[:, None] & anyone_N & ~jnp.eye(len(anyone_N), dtype=bool)
  log_p_NN = log_share(cosines(sentences(ctx, pool)) / temperature, other_NN)
  partners_N = pair_NN.sum(-1)
  return Metric.over(-jnp.where(pair_NN, log_p_NN, 0.0).sum(-1) / jnp.maximum(partners_N, 1), partners_N > 0)


@register_loss("clp", on="retain", needs=("hidden", "pairs"), options={"form": ("js", "log_odds")})
def clp(ctx: LossContext, on: str, form: str) -> Metric:
  """Counterfactual logit pairing: what is predicted should not depend on which twin is read (Garg et al. 2019).

  js: the Jensen-Shannon divergence, in nats, of the twins' distributions at their scored positions, counted from the
  end of the answer and compared where both predict the same token; mean over positions.
  log_odds: (log pi(a) - log pi(a'))^2 for the answers a and a' of two twins, summed log-probabilities; mean over pairs.
  """
  if form == "log_odds":
    log_odds_BS = ctx.logprob_BS - ctx.of_twin(ctx.logprob_BS)
    return Metric.over(log_odds_BS**2, ctx.pairs(on))
  b, (B, P) = ctx.batch, ctx.batch.target.shape
  twin_BP, there_BP = twin_positions(b, ctx.rows(on))
  hidden_BPD = gather_positions(ctx.hidden_BTD, b.score_at)
  of_twin = lambda x_BP: x_BP.reshape(B * P, *x_BP.shape[2:])[twin_BP]
  same_BP = there_BP & (of_twin(b.target) == b.target)
  return Metric.over(js_divergence(hidden_BPD, of_twin(hidden_BPD), ctx.head), same_BP)


def twin_positions(batch: Batch, anchor_BS: jax.Array) -> tuple[jax.Array, jax.Array]:
  """For each scored position of an anchor, the flat index b * P + p of its twin's that is as far from the answer's end,
  and whether there is one. Both [B, P]. A segment's scored positions stand side by side."""
  (B, P), S = batch.target.shape, batch.role.shape[1]
  in_BSP = batch.score_segment[:, None] == jnp.arange(1, S + 1)[:, None]
  count_N = in_BSP.sum(-1).reshape(-1)
  end_N = (jnp.arange(B)[:, None] * P + in_BSP.argmax(-1)).reshape(-1) + count_N  # flat, one behind the last
  mine_BP = jnp.arange(B)[:, None] * S + jnp.maximum(batch.score_segment - 1, 0)
  twin_BP = batch.pair.reshape(-1)[mine_BP]
  from_end_BP = end_N[mine_BP] - jnp.arange(B * P).reshape(B, P)
  twin = jnp.maximum(twin_BP, 0)
  there_BP = (batch.score_segment > 0) & anchor_BS.reshape(-1)[mine_BP] & (twin_BP >= 0)
  there_BP &= from_end_BP <= count_N[twin]
  return jnp.where(there_BP, end_N[twin] - from_end_BP, 0), there_BP
