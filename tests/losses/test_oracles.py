"""The published codes' own numbers: every case of the two oracle files that concerns a loss, value and gradient.

  python -m pytest tests/losses/test_oracles.py -k table -s        # prints each case with its error

The files were made by running the reference implementations of BiasUnlearn and of the Residual Alignment Model. Their
float64 entries are met to 1e-9 (in float64), their float32 entries to 1e-5, gradients to 1e-6.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbias.losses  # noqa: F401, registers the losses
from jaxbias.losses.context import LossContext
from jaxbias.losses.logprobs import cross_entropy, forward_kl, gather_positions, token_logprobs
from jaxbias.losses.registry import LOSSES, evaluate, parse
from jaxbias.models.transformer import Head
from jaxbias.types import ROLES, Batch

pytestmark = pytest.mark.usefixtures("quick_compilation")

FOLDER = Path(__file__).parents[1] / "oracles"
BIASUNLEARN, RAM = (json.loads((FOLDER / f"{name}_oracle.json").read_text()) for name in ("biasunlearn", "ram"))
WIDTHS = {"float32": np.float32, "float64": np.float64}
VALUE = {"float32": 1e-5, "float64": 1e-9}  # relative
SLOPE = {"float32": 1e-6, "float64": 1e-9}  # absolute


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
    ref_logprob=token_logprobs(gather_positions(ref, jnp.asarray(at[:, :-1])), head, target),
  )  # fmt: skip
  return moved(LossContext(batch, None, head=head, ref_head=head), logits)


def moved(ctx: LossContext, logits: jax.Array) -> LossContext:
  """The same batch, and a policy with these logits."""
  scored = token_logprobs(gather_positions(logits, ctx.batch.score_at), ctx.head, ctx.batch.target)
  return dataclasses.replace(ctx, logprob_BP=scored, kl_hidden_BKD=logits)


def value(name: str, ctx: LossContext, on: str, **settings):
  loss = LOSSES[name]
  return loss.function(ctx, on, **{**loss.coefficients, **settings}).value()


def slope(name: str, ctx: LossContext, on: str, **settings) -> jax.Array:
  """The derivative with respect to all logits."""
  return jax.grad(lambda logits: value(name, moved(ctx, logits), on, **settings))(ctx.kl_hidden_BKD)


# BiasUnlearn


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


# Residual Alignment Model


@functools.cache
def ram_pairs(width: str = "float64", one: int | None = None) -> LossContext:
  """Rows 0-2 chosen (retain), 3-5 rejected (forget), as given: left padding and all; or the pair `one` alone."""
  given = RAM["losses"]["inputs"]
  def both(what, fill):
    sides = [np.array(given[what.format(side)]) for side in ("chosen", "rejected")]
    longest = max(x.shape[1] for x in sides)
    pad = lambda x: np.pad(x, [(0, 0), (0, longest - x.shape[1])] + [(0, 0)] * (x.ndim - 2), constant_values=fill)
    return np.concatenate([pad(x) for x in sides])

  policy, ref = (both(f"{which}_{{}}_logits", 0.0).astype(WIDTHS[width]) for which in ("policy", "ref"))
  labels, twins = both("{}_labels", -100), np.array([3, 4, 5, 0, 1, 2])
  chosen = list(range(6)) if one is None else [one, one + 3]
  twins = twins if one is None else [1, 0]
  return logits_context(policy[chosen], labels[chosen], ["retain" if i < 3 else "forget" for i in chosen],
                        ref=ref[chosen], pair=twins)  # fmt: skip


def ram() -> Iterator[Case]:
  expected, wide = RAM["losses"]["outputs"], dict(relative=VALUE["float64"], wide=True)
  narrow, steep = dict(relative=VALUE["float32"]), dict(absolute=SLOPE["float32"])
  sums, means = expected["seq_logps_sum"], expected["seq_logps_mean"]
  for which, of in (("policy", "logprob_BS"), ("ref", "ref_logprob_BS")):
    yield Case(f"ram float64: sums of log p, {which}", lambda of=of: getattr(ram_pairs(), of)[:, 0],
               sums[f"{which}_chosen"] + sums[f"{which}_rejected"], **wide)  # fmt: skip
  yield Case("ram float64: means of log p", lambda: (ram_pairs().logprob_BS / ram_pairs().tokens_BS)[:, 0],
             means["policy_chosen"] + means["policy_rejected"], **wide)  # fmt: skip
  each = lambda name, width="float64", **how: jnp.stack(
    [value(name, ram_pairs(width, one), "retain", **how) for one in range(3)]
  )
  losses = {"sft": ("sft", {"reduction": "seq_sum"})}
  losses |= {key: ("ram", {"alpha": float(key.split("=")[1])}) for key in expected if key.startswith("ours_sft")}
  for key, (name, how) in losses.items():
    found = expected[key]
    yield Case(f"ram float32: {key}", lambda n=name, how=how: value(n, ram_pairs("float32"), "retain", **how),
               found["loss_mean_fp32"], **narrow)  # fmt: skip
    yield Case(f"ram float32: {key}, each pair", lambda n=name, how=how: each(n, "float32", **how),
               found["per_example"], **narrow)  # fmt: skip
    if "loss_mean_f64" in found:
      yield Case(f"ram float64: {key}", lambda n=name, how=how: value(n, ram_pairs(), "retain", **how),
                 found["loss_mean_f64"], **wide)  # fmt: skip
    for side, rows, tokens in (("chosen", slice(0, 3), 6), ("rejected", slice(3, 6), 5)):
      if found[f"grad_{side}_logits"] is not None:
        find = lambda n=name, how=how, at=(rows, slice(tokens)): slope(n, ram_pairs("float32"), "retain", **how)[at]
        yield Case(f"ram float32: {key}, slope of {side}", find, found[f"grad_{side}_logits"], **steep)
  forms = {
    "dpo_beta0.5": {"beta": 0.5}, "dpo_beta0.1_ls0.1": {"beta": 0.1, "smoothing": 0.1},
    "ipo_beta0.5": {"beta": 0.5, "form": "ipo"},
    "ours_dpo_as_called(ref logps are python 0)": {"beta": 1.0, "reference": "none"},
    "ours_dpo_beta1.0(reference_free)": {"beta": 1.0, "reference": "none"},
  }  # fmt: skip
  assert forms.keys() == expected["preference_loss_f64"].keys()
  for key, how in forms.items():
    found = expected["preference_loss_f64"][key]
    yield Case(f"ram float64: {key}", lambda how=how: each("dpo", **how), found["losses"], **wide)
    free = "as_called" in key  # the reward of the published code is then log Q itself
    what = "logprob_BS" if free else "log_ratio_BS"
    reward = lambda how=how, what=what: how["beta"] * getattr(ram_pairs(), what)[:, 0]
    yield Case(f"ram float64: {key}, rewards", reward, found["chosen_rewards"] + found["rejected_rewards"], **wide)
  jensen = RAM["jensen_surrogate"]
  yield Case("ram float64: surrogate of the toy tree, alpha 1", surrogate, jensen["surrogate_alpha1(lower bound)"],
             relative=1e-6, wide=True)  # fmt: skip, the toy tree's probabilities were normalised in float32


def surrogate() -> jax.Array:
  """sum over y, y' of S(y) P(y') of RAM's loss of the pair: the objective in expectation, on texts of two tokens."""
  tree, toy = RAM["sequence_vs_token_normalisation"], RAM["jensen_surrogate"]
  log_q1, log_q2 = (jax.nn.log_softmax(jnp.asarray(toy[f"q{i}_logits"]), -1) for i in (1, 2))
  log_q = log_q1[:, None] + log_q2
  P = np.array(tree["P1"])[:, None] * np.array(tree["P2"])
  S, P, log_q = np.array(toy["S"]).ravel(), P.ravel(), log_q.ravel()
  n = len(S)
  first, second = np.repeat(np.arange(n), n), np.tile(np.arange(n), n)

  def of(weights):  # the mean over pairs is linear in the weights of what it averages
    ones = jnp.ones((n * n, 2), jnp.int32)
    batch = Batch(
      tokens=None, segment=None, position=None, score_at=None, target=None, ref_logprob=None,
      score_segment=jnp.asarray([[1, 2]] * (n * n)), role=ones.at[:, 1].set(0),
      pair=jnp.arange(2 * n * n).reshape(-1, 2) + jnp.array([1, -1]),
    )  # fmt: skip
    scaled = jnp.stack([log_q[first] * weights, log_q[second] * weights], 1)
    return value("ram", LossContext(batch, scaled), "retain", alpha=1.0)

  return n * n * of(jnp.asarray(S[first] * P[second])) - (S * np.log(P)).sum()  # and the proposal's part of log P_theta


CASES = [*biasunlearn(), *ram()]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_published_number(case):
  assert case.error() <= case.tolerance


def test_an_answer_of_no_tokens_is_nan_there_and_left_out_here():
  given, missing = BIASUNLEARN["lm_and_npo"]["inputs"], BIASUNLEARN["lm_loss_all_masked_row"]
  assert missing["result"] == "nan"
  theta = np.array(given["logits_theta"], np.float32)
  ctx = logits_context(theta, given["labels"], ["forget"] * 3, missing["start_locs"])
  found = LOSSES["sft"].function(ctx, "forget")
  assert found.weight == 2 and np.isfinite(found.value()) and np.isfinite(slope("sft", ctx, "forget")).all()


def test_the_published_anchor_differs_from_the_divergence_by_a_constant():
  given = BIASUNLEARN["kl"]["inputs"]
  theta, ref = (jnp.asarray(given[f"logits_{which}"]) for which in ("theta", "ref"))
  head = Head(jnp.eye(theta.shape[-1]))
  gap = [cross_entropy(x, head, ref, head) - forward_kl(x, head, ref, head) for x in (theta, 2 * theta)]
  np.testing.assert_allclose(*gap, rtol=1e-5)


def test_table():
  """The oracle table: what was compared, its largest error, what it may be."""
  rows = [(case.name, case.error(), case.tolerance, "relative" if case.relative else "absolute") for case in CASES]
  width = max(len(name) for name, *_ in rows)
  print(f"\n{'case':<{width}}  {'largest error':>13}  {'tolerance':>9}")
  for name, error, tolerance, kind in rows:
    print(f"{name:<{width}}  {error:13.1e}  {tolerance:9.0e}  {kind}{'' if error <= tolerance else '   TOO LARGE'}")
  assert all(error <= tolerance for _, error, tolerance, _ in rows)
