"""Losses on how much more likely a text became than it was under the reference."""

from __future__ import annotations

import jax

from jaxbias.losses.registry import LossContext, register_loss
from jaxbias.types import Metric


@register_loss("npo", on="forget", needs=("ref_logprob",), coefficients={"beta": 0.1})
def npo(ctx: LossContext, on: str, beta: jax.Array) -> Metric:
  """Negative preference optimisation (Zhang et al. 2024, eq. 3; the forget term of Liu et al. 2025).

  L = -(2/beta) log sigmoid(-beta (log pi - log pi_ref)), log-probabilities summed over answer tokens, nats.
  At pi = pi_ref it is (2/beta) log 2 and its gradient is that of gradient ascent on the summed log-probability.
  """
  log_ratio_BS = ctx.logprob_BS - ctx.ref_logprob_BS
  return Metric.over(-2.0 / beta * jax.nn.log_sigmoid(-beta * log_ratio_BS), ctx.rows(on))


@register_loss("dpo", on="retain", needs=("ref_logprob", "pairs"), coefficients={"beta": 0.1})
def dpo(ctx: LossContext, on: str, beta: jax.Array) -> Metric:
  """Direct preference optimisation: each row of role `on` preferred to its twin (Rafailov et al. 2023, eq. 7).

  L = -log sigmoid(beta ((log pi - log pi_ref)(chosen) - (log pi - log pi_ref)(rejected))), summed log-probabilities.
  At pi = pi_ref it is log 2.
  """
  log_ratio_BS = ctx.logprob_BS - ctx.ref_logprob_BS
  margin_BS = log_ratio_BS - ctx.of_twin(log_ratio_BS)
  return Metric.over(-jax.nn.log_sigmoid(beta * margin_BS), ctx.rows(on) & (ctx.batch.pair >= 0))
