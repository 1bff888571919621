"""Losses on which of two texts is preferred, or on whether one text is wanted at all."""

from __future__ import annotations

import jax

from jaxbias.losses.context import LossContext
from jaxbias.losses.registry import register_loss
from jaxbias.losses.unlearning import log_one_minus_exp
from jaxbias.types import Metric

FORMS = {
  "sigmoid": lambda margin, beta: -jax.nn.log_sigmoid(beta * margin),
  "ipo": lambda margin, beta: (margin - 1 / (2 * beta)) ** 2,
  "hinge": lambda margin, beta: jax.nn.relu(1 - beta * margin),
}


@register_loss("dpo", on="retain", needs=("ref_logprob", "pairs"), coefficients={"beta": 0.1, "smoothing": 0.0},
               options={"form": tuple(FORMS), "reference": ("start", "none")})  # fmt: skip
def dpo(
  ctx: LossContext, on: str, beta: jax.Array, smoothing: jax.Array, form: str = "sigmoid", reference: str = "start"
) -> Metric:
  """Direct preference optimisation: each row of role `on` preferred to its twin (Rafailov et al. 2023, eq. 7).

  L = (1 - smoothing) f(m) + smoothing f(-m), m = log_ratio(chosen) - log_ratio(rejected), summed log-probabilities.
  f(m) is -log sigmoid(beta m), (m - 1/(2 beta))^2 (`ipo`, Azar et al. 2023, eq. 17) or max(0, 1 - beta m) (`hinge`,
  Zhao et al. 2023); smoothing > 0 is conservative DPO (Mitchell 2023). With `reference` = none, log_ratio is log pi:
  the DPO of P_M pi / Z against P_M, whose Z cancels (RAM, 2025). At pi = pi_ref the sigmoid form is log 2.
  """
  score_BS = ctx.logprob_BS if reference == "none" else ctx.log_ratio_BS
  margin_BS, loss = score_BS - ctx.of_twin(score_BS), FORMS[form]
  return Metric.over((1 - smoothing) * loss(margin_BS, beta) + smoothing * loss(-margin_BS, beta), ctx.pairs(on))


@register_loss("simpo", on="retain", needs=("pairs",), coefficients={"beta": 2.0, "gamma": 1.0})
def simpo(ctx: LossContext, on: str, beta: jax.Array, gamma: jax.Array) -> Metric:
  """L = -log sigmoid(beta (l(chosen) - l(rejected)) - gamma), l = log pi(a) / |a| (Meng et al. 2024, eq. 6)."""
  mean_BS = ctx.logprob_BS / ctx.tokens_BS
  return Metric.over(-jax.nn.log_sigmoid(beta * (mean_BS - ctx.of_twin(mean_BS)) - gamma), ctx.pairs(on))


@register_loss("orpo", on="retain", needs=("pairs",))
def orpo(ctx: LossContext, on: str) -> Metric:
  """Odds-ratio preference, to be added to `sft` (Hong et al. 2024, eq. 7).

  L = -log sigmoid(log odds(chosen) - log odds(rejected)), odds = p / (1 - p), log p = log pi(a) / |a|.
  """
  mean_BS = ctx.logprob_BS / ctx.tokens_BS
  log_odds_BS = mean_BS - log_one_minus_exp(mean_BS)
  return Metric.over(-jax.nn.log_sigmoid(log_odds_BS - ctx.of_twin(log_odds_BS)), ctx.pairs(on))


@register_loss("ram", on="retain", needs=("pairs",), coefficients={"alpha": 1e-4})
def ram(ctx: LossContext, on: str, alpha: jax.Array) -> Metric:
  """The residual aligner's objective (Residual Alignment Model 2025), summed log-probabilities.

  L = -log Q(chosen) + alpha log Q(rejected); alpha = 0 is `sft` with reduction seq_sum. Unbounded below for alpha > 0.
  """
  return Metric.over(-ctx.logprob_BS + alpha * ctx.of_twin(ctx.logprob_BS), ctx.pairs(on))


@register_loss("kto", on="retain", needs=("ref_logprob",), reads=("forget", "retain", "mismatched"),
               coefficients={"beta": 0.1, "desirable": 1.0, "undesirable": 1.0}, couples=True)  # fmt: skip
def kto(ctx: LossContext, on: str, beta: jax.Array, desirable: jax.Array, undesirable: jax.Array) -> Metric:
  """Kahneman-Tversky optimisation: texts of role `on` are wanted, those of the other are not (Ethayarajh et al. 2024).

  L = lambda (1 - sigmoid(+-beta (r - z))), r = log pi - log pi_ref, + for wanted texts; z = max(0, mean r over the
  batch's mismatched texts, held constant), an estimate of KL(pi || pi_ref). At pi = pi_ref it is lambda / 2.
  """
  wanted, unwanted = ctx.scored(on), ctx.scored("retain" if on == "forget" else "forget")
  z = jax.lax.stop_gradient(jax.nn.relu(Metric.over(ctx.log_ratio_BS, ctx.scored("mismatched")).value()))
  gain_BS = beta * (ctx.log_ratio_BS - z)
  return Metric.over(desirable * jax.nn.sigmoid(-gain_BS), wanted) + Metric.over(
    undesirable * jax.nn.sigmoid(gain_BS), unwanted
  )
