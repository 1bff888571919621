"""Losses made of one model's likelihoods: learn a text, unlearn it, stay near the start model."""

from __future__ import annotations

import jax

from jaxbias.losses.context import REDUCTIONS, LossContext
from jaxbias.losses.logprobs import cross_entropy, forward_kl, reverse_kl
from jaxbias.losses.registry import register_loss
from jaxbias.types import Metric


@register_loss("sft", on="retain", options={"reduction": REDUCTIONS})
def sft(ctx: LossContext, on: str, reduction: str = "seq_mean") -> Metric:
  """Cross-entropy of the answer, -log pi(a_t), nats.

  By default a mean over a text's tokens first, then over texts, so that every text has the same say whatever its
  length (Liu et al. 2025, retention term; their code does the same). `seq_sum` is the negative log-likelihood.
  """
  return ctx.over_tokens(-ctx.logprob_BP, on, reduction)


@register_loss("ga", on="forget", options={"reduction": REDUCTIONS})
def ga(ctx: LossContext, on: str, reduction: str = "seq_mean") -> Metric:
  """Gradient ascent: minus the cross-entropy of the answer. Unbounded below, hence the forgetting."""
  return ctx.over_tokens(ctx.logprob_BP, on, reduction)


DIVERGENCES = {"forward": forward_kl, "reverse": reverse_kl, "cross_entropy": cross_entropy}


@register_loss("kl", on="general", needs=("ref_hidden",), coefficients={"padded_length": 100.0},
               options={"divergence": tuple(DIVERGENCES), "over": ("tokens", "padded")})  # fmt: skip
def kl(
  ctx: LossContext, on: str, padded_length: jax.Array | float, divergence: str = "forward", over: str = "tokens"
) -> Metric:
  """KL(reference || policy) over the whole vocabulary, mean over real tokens, nats; `reverse`: KL(policy || reference).

  Zero at the start model. The published anchor (Liu et al. 2025) is `cross_entropy` (the forward divergence plus a
  constant), divided by `padded` texts of `padded_length` tokens; what it also sums over the padding itself is not here.
  """
  each_BK = DIVERGENCES[divergence](ctx.kl_hidden_BKD, ctx.head, ctx.batch.ref_hidden, ctx.ref_head)
  mean = Metric.over(each_BK, ctx.within(on, ctx.batch.kl_segment))
  return mean if over == "tokens" else Metric(mean.sum, padded_length * ctx.rows(on).sum())
