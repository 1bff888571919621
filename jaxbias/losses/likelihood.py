"""Losses made of one model's likelihoods: learn a text, unlearn it, stay near the start model."""

from __future__ import annotations

from jaxbias.losses.registry import LossContext, register_loss
from jaxbias.types import Metric


@register_loss("sft", on="retain")
def sft(ctx: LossContext, on: str) -> Metric:
  """Cross-entropy of the answer tokens, nats a token: mean over a text's tokens first, then over texts.

  Every text has the same say whatever its length (Liu et al. 2025, retention term; their code does the same).
  """
  return Metric.over(-ctx.logprob_BS / ctx.tokens_BS, ctx.rows(on))


@register_loss("ga", on="forget")
def ga(ctx: LossContext, on: str) -> Metric:
  """Gradient ascent: minus the cross-entropy of the answer tokens. Unbounded below, hence the forgetting."""
  return Metric.over(ctx.logprob_BS / ctx.tokens_BS, ctx.rows(on))


@register_loss("kl", on="general", needs=("ref_distribution",))
def kl(ctx: LossContext, on: str) -> Metric:
  """KL(reference || policy) over the whole vocabulary, mean over real tokens, nats.

  Zero at the start model. The published anchor term is the cross-entropy instead (this plus a constant) averaged
  over padding too (Liu et al. 2025, discrepancy 2 of the notes in docs/losses.md).
  """
  del on  # the batch holds distributions at this role's positions only
  return Metric.over(ctx.kl_BK, ctx.batch.kl_segment > 0)
