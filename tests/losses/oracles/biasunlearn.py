"""BiasUnlearn: cross-entropy, ascent, NPO and the anchor as its code computes them, and what they should be."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from jaxbias.losses.context import LossContext
from jaxbias.losses.registry import LOSSES, evaluate, parse
from jaxbias.types import ROLES
from tests.losses.oracles.case import SLOPE, VALUE, WIDTHS, Case, logits_context, oracle, slope, value

BIASUNLEARN = oracle("biasunlearn")


@functools.cache
def sequences(part: str, which: str, width: str, role: str, ref: str | None = None) -> LossContext:
  given = BIASUNLEARN[part]["inputs"]
  of = lambda name: np.array(given[f"logits_{name}"], WIDTHS[width])
  return logits_context(of(which), given["labels"], [role] * 3, given["start_locs"], of(ref) if ref else None)


def biasunlearn() -> Iterator[Case]:
  part = BIASUNLEARN["lm_and_npo"]
  for width in WIDTHS:
    expected = part[width]
    about = dict(relative=VALUE[width], wide=width == "float64")
    steep = dict(absolute=SLOPE[width], wide=width == "float64")
    theta = lambda width=width: sequences("lm_and_npo", "theta", width, "forget", "ref")
    start = lambda width=width: sequences("lm_and_npo", "ref", width, "forget")
    name = f"biasunlearn {width}"
    for what, of, loss, key in (("cross-entropy", theta, "sft", "gd_theta"), ("ascent", theta, "ga", "ga_theta"),
                                ("cross-entropy of the reference", start, "sft", "gd_ref")):  # fmt: skip
      yield Case(f"{name}: {what}", lambda of=of, loss=loss: value(loss, of(), "forget"), expected[f"lm_loss_{key}"],
                 **about)  # fmt: skip
    yield Case(f"{name}: cross-entropy, slope", lambda f=theta: slope("sft", f(), "forget"),
               expected["grad_lm_loss_gd_theta"], **steep)  # fmt: skip
    yield Case(f"{name}: answer tokens", lambda f=theta: f().count_BS[:, 0], expected["n_answer_tokens"], **about)
    for which, of in (("theta", "logprob_BS"), ("ref", "ref_logprob_BS")):
      for how, divide in (("sum", False), ("mean", True)):
        find = lambda f=theta, of=of, divide=divide: (getattr(f(), of) / (f().tokens_BS if divide else 1))[:, 0]
        yield Case(f"{name}: {how} of log p, {which}", find, expected[f"seq_{how}_logp_{which}"], **about)
    for beta, found in expected["npo_repo_batch_level"].items():
      how = dict(beta=float(beta), reduction="batch_token_mean")
      yield Case(f"{name}: NPO as published, beta {beta}", lambda f=theta, how=how: value("npo", f(), "forget", **how),
                 found["loss"], **about)  # fmt: skip
      yield Case(f"{name}: NPO as published, beta {beta}, slope",
                 lambda f=theta, how=how: slope("npo", f(), "forget", **how), found["grad_logits"],
                 **steep)  # fmt: skip
      yield Case(f"{name}: NPO as published, beta {beta}, slope of CE",
                 lambda f=theta, how=how: by_cross_entropy(f(), how), found["dloss_dCE"], **about)  # fmt: skip
    for beta, found in expected["npo_alternatives"].items():
      for key, loss in found.items():
        how = dict(beta=float(beta), reduction="seq_sum" if "seq_sum" in key else "seq_mean")
        yield Case(f"{name}: NPO {how['reduction']}, beta {beta}",
                   lambda f=theta, how=how: value("npo", f(), "forget", **how), loss, **about)  # fmt: skip
    yield from anchor(width, name, about, steep)
  wide = dict(relative=VALUE["float64"], wide=True)
  for beta, expected in BIASUNLEARN["npo_at_ref"].items():
    for how in LOSSES["npo"].options["reduction"]:
      find = lambda beta=beta, how=how: value(
        "npo", sequences("lm_and_npo", "ref", "float64", "forget"), "forget", beta=float(beta), reduction=how
      )
      yield Case(f"biasunlearn float64: NPO {how} at the reference, beta {beta}", find, expected, **wide)
  for beta, expected in BIASUNLEARN["npo_at_ref_check"].items():
    off = expected["max_abs(grad_npo-grad_ga)"]
    yield Case(f"biasunlearn float64: NPO is ascent at the reference, beta {beta}",
               lambda beta=beta: npo_less_ascent(float(beta)), off, absolute=1e-15, wide=True)  # fmt: skip
  retained = lambda: value("sft", sequences("retention", "theta", "float64", "retain"), "retain")
  yield Case("biasunlearn float64: retention", retained, BIASUNLEARN["retention"]["lm_loss_gd_float64"], **wide)
  total = BIASUNLEARN["total_loss_float64"]
  for key, weights in (("w=0.5,0.3,0.2 (README/run.sh)", (0.5, 0.3, 0.2)),
                       ("w=0.4,0.4,0.2 (paper appendix, second-hand)", (0.4, 0.4, 0.2))):  # fmt: skip
    find = lambda weights=weights: published_total(weights)
    yield Case(f"biasunlearn float64: total, {key}", find, total[key], **wide)


def anchor(width: str, name: str, about: dict, steep: dict) -> Iterator[Case]:
  """The published anchor counts every position, padding too; ours the real ones. Both are asked for here."""
  given, expected = BIASUNLEARN["kl"]["inputs"], BIASUNLEARN["kl"][width]
  mask = np.array(given["attention_mask"])

  def ctx(real):
    theta, ref = (np.array(given[f"logits_{which}"], WIDTHS[width]) for which in ("theta", "ref"))
    return logits_context(theta, given["labels"], ["general"] * 3, ref=ref, real=real)

  everywhere = np.ones_like(mask)
  of = lambda real, divergence: value("kl", ctx(real), "general", divergence=divergence)
  entropy = lambda: of(everywhere, "cross_entropy") - of(everywhere, "forward")
  published = "compute_kl_repo(cross_entropy, all positions incl pad)"
  for what, find, key in (
    ("anchor as published", lambda: of(everywhere, "cross_entropy"), published),
    ("KL, all positions", lambda: of(everywhere, "forward"), "true_forward_KL_mean_all_positions"),
    ("entropy of the reference", entropy, "entropy_ref_mean_all_positions"),
    ("KL", lambda: of(mask, "forward"), "true_forward_KL_mean_nonpad"),
    ("cross-entropy from the reference", lambda: of(mask, "cross_entropy"), "cross_entropy_mean_nonpad"),
  ):
    yield Case(f"{name}: {what}", find, expected[key], **about)
  for divergence in ("cross_entropy", "forward"):
    yield Case(f"{name}: anchor as published, slope by {divergence}",
               lambda divergence=divergence: slope("kl", ctx(everywhere), "general", divergence=divergence),
               expected["grad_logits_theta"], **steep)  # fmt: skip


def by_cross_entropy(ctx: LossContext, how: dict) -> jax.Array:
  """d NPO / d CE, where CE is minus the mean over texts of each text's mean log-probability."""
  def shifted(x):  # x more nats of cross-entropy on every token
    return value("npo", dataclasses.replace(ctx, logprob_BP=ctx.logprob_BP - x), "forget", **how)

  return jax.grad(shifted)(jnp.zeros((), ctx.logprob_BP.dtype))


def npo_less_ascent(beta: float) -> jax.Array:
  ctx = sequences("lm_and_npo", "ref", "float64", "forget")
  npo = slope("npo", ctx, "forget", beta=beta, reduction="batch_token_mean")
  return jnp.abs(npo - slope("ga", ctx, "forget")).max()


def published_total(weights: tuple[float, float, float]) -> jax.Array:
  """Their weighted sum, by `parse` and `evaluate`: the three texts of each role as they are in the oracle's parts."""
  losses = {"npo": {"reduction": "batch_token_mean"}, "sft": {}, "kl": {"divergence": "cross_entropy"}}
  weighted = {n: {**how, "weight": w} for (n, how), w in zip(losses.items(), weights, strict=True)}
  objective, coefficients = parse(weighted)
  stacked = [BIASUNLEARN[part]["inputs"] for part in ("lm_and_npo", "retention", "kl")]
  join = lambda key, otherwise=None: np.concatenate([given.get(key, given.get(otherwise)) for given in stacked])
  starts = [*stacked[0]["start_locs"], *stacked[1]["start_locs"], 1, 1, 1]
  real = np.repeat([0, 0, 1], 3)[:, None] * np.ones((1, 6), int)
  ctx = logits_context(join("logits_theta"), join("labels"), list(np.repeat(ROLES[:3], 3)), starts,
                       join("logits_ref", "logits_theta"), real=real)  # fmt: skip
  return evaluate(objective, ctx, coefficients).total
