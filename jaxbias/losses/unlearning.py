"""Losses that take something out of a model without running away as gradient ascent does."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxbias.losses.context import REDUCTIONS, LossContext
from jaxbias.losses.logprobs import adjusted_kl, gather_positions
from jaxbias.losses.registry import register_loss
from jaxbias.types import Metric

SMALLEST = 1e-6  # keeps log(1 - p) and its slope finite where p rounds to 1


def log_one_minus_exp(logp: jax.Array) -> jax.Array:
  """log(1 - p + 1e-6) from log p; the slope is finite everywhere and never zero."""
  return jnp.log(SMALLEST - jnp.expm1(logp))


@register_loss("npo", on="forget", needs=("ref_logprob",), coefficients={"beta": 0.1},
               options={"reduction": ("seq_sum", "seq_mean", "batch_token_mean")},
               couples=(("reduction", "batch_token_mean"),))  # fmt: skip
def npo(ctx: LossContext, on: str, beta: jax.Array, reduction: str = "seq_sum") -> Metric:
  """Negative preference optimisation (Zhang et al. 2024, eq. 3; the forget term of Liu et al. 2025).

  L = -(2/beta) log sigmoid(-beta (log pi - log pi_ref)), log-probabilities summed over answer tokens, nats.
  At pi = pi_ref it is (2/beta) log 2 and its gradient is that of gradient ascent on the summed log-probability.
  `seq_mean` averages over the answer's tokens; `batch_token_mean` (BiasUnlearn's code) averages that over the batch's
  texts, too, before its one sigmoid, so that it depends on what shares a batch.
  """
  log_ratio = ctx.log_ratio_BS if reduction == "seq_sum" else ctx.log_ratio_BS / ctx.tokens_BS
  counted = ctx.scored(on)
  if reduction == "batch_token_mean":
    mean = Metric.over(log_ratio, counted)
    log_ratio, counted = mean.value(), mean.weight > 0
  return Metric.over(-2.0 / beta * jax.nn.log_sigmoid(-beta * log_ratio), counted)


@register_loss("simnpo", on="forget", coefficients={"beta": 2.5, "gamma": 0.0})
def simnpo(ctx: LossContext, on: str, beta: jax.Array, gamma: jax.Array) -> Metric:
  """NPO without a reference, by length (Fan et al. 2024, SimNPO).

  L = -(2/beta) log sigmoid(-(beta/|a|) log pi(a) - gamma).
  """
  margin_BS = -beta * ctx.logprob_BS / ctx.tokens_BS - gamma
  return Metric.over(-2.0 / beta * jax.nn.log_sigmoid(margin_BS), ctx.scored(on))


@register_loss("unlikelihood", on="forget", options={"reduction": REDUCTIONS})
def unlikelihood(ctx: LossContext, on: str, reduction: str = "seq_mean") -> Metric:
  """-log(1 - pi(a_t)) of each answer token (Welleck et al. 2020, token level): 0 once a token is impossible."""
  return ctx.over_tokens(-log_one_minus_exp(ctx.logprob_BP), on, reduction)


@register_loss("wga", on="forget", coefficients={"alpha": 1.0}, options={"reduction": REDUCTIONS})
def wga(ctx: LossContext, on: str, alpha: jax.Array, reduction: str = "seq_mean") -> Metric:
  """Weighted gradient ascent, w_t log pi(a_t) with w_t = pi(a_t)^alpha held constant (Wang et al. 2025, WGA).

  Ascent that lets go of a token as it becomes improbable.
  """
  weight_BP = jax.lax.stop_gradient(jnp.exp(alpha * ctx.logprob_BP))
  return ctx.over_tokens(weight_BP * ctx.logprob_BP, on, reduction)


@register_loss("satimp", on="forget", coefficients={"beta1": 5.0, "beta2": 1.0}, options={"reduction": REDUCTIONS})
def satimp(ctx: LossContext, on: str, beta1: jax.Array, beta2: jax.Array, reduction: str = "seq_mean") -> Metric:
  """w_t log pi(a_t) with w_t = pi^beta1 (1 - pi)^beta2 held constant (Yang et al. 2025, SatImp).

  Saturation: tokens not yet forgotten; importance: tokens that were not certain anyway. beta2 = 0 is `wga`.
  """
  logp_BP = jax.lax.stop_gradient(ctx.logprob_BP)
  weight_BP = jnp.exp(beta1 * logp_BP + beta2 * log_one_minus_exp(logp_BP))
  return ctx.over_tokens(weight_BP * ctx.logprob_BP, on, reduction)


@register_loss("undial", on="forget", needs=("ref_hidden",), coefficients={"strength": 10.0})
def undial(ctx: LossContext, on: str, strength: jax.Array) -> Metric:
  """Distil the start model with each answer token's logit lowered by `strength` (Dong et al. 2025, UNDIAL).

  L = KL(softmax(z_ref - strength 1[a_t]) || pi), mean over answer tokens, nats. With p = pi_ref(a_t) it is
  -strength p' - log(1 - p + p e^-strength) at the start, where p' = p e^-strength / (1 - p + p e^-strength).
  """
  batch = ctx.batch
  each_BK = adjusted_kl(ctx.kl_hidden_BKD, ctx.head, batch.ref_hidden, ctx.ref_head, batch.kl_target, strength)
  return Metric.over(each_BK, ctx.within(on, batch.kl_segment))


def _block(captures: jax.Array, depth: jax.Array, ctx: LossContext) -> jax.Array:
  """Activations behind the block at `depth` of the stack (1 = the last), where answer tokens are predicted."""
  layers = captures.shape[0]
  block = jnp.clip(jnp.ceil(depth * layers).astype(jnp.int32) - 1, 0, layers - 1)
  return gather_positions(captures[block], ctx.batch.score_at).astype(jnp.float32)


@register_loss("rmu", on="forget", needs=("residual_out",), coefficients={"steer": 20.0, "depth": 0.25, "seed": 0.0})
def rmu(ctx: LossContext, on: str, steer: jax.Array, depth: jax.Array, seed: jax.Array) -> Metric:
  """Representation misdirection (Li et al. 2024, WMDP, forget term): mean_d (h_d - steer u_d)^2.

  h: what leaves the block at `depth` of the stack, where answer tokens are predicted. u: one direction for the run,
  uniform in [0, 1)^D and scaled to length 1, drawn from `seed`.
  """
  h_BPD = _block(ctx.captures["residual_out"], depth, ctx)
  u_D = jax.random.uniform(jax.random.key(jnp.int32(seed)), h_BPD.shape[-1:])
  u_D /= jnp.linalg.norm(u_D)
  return ctx.over_tokens(jnp.square(h_BPD - steer * u_D).mean(-1), on, "seq_mean")


@register_loss("rmu_retain", on="general", needs=("residual_out", "base_residual_out"), coefficients={"depth": 0.25})
def rmu_retain(ctx: LossContext, on: str, depth: jax.Array) -> Metric:
  """Representation misdirection (Li et al. 2024, WMDP, retain term): mean_d (h_d - h_ref,d)^2 at the same place."""
  h_BPD, ref_BPD = (_block(c["residual_out"], depth, ctx) for c in (ctx.captures, ctx.base_captures))
  return ctx.over_tokens(jnp.square(h_BPD - ref_BPD).mean(-1), on, "seq_mean")
