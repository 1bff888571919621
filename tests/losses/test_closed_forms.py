"""What the papers' formulas say about these losses: bounds, symmetries, limits, and one loss in terms of another."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from jaxbias.losses.likelihood import ga, sft
from jaxbias.losses.unlearning import npo
from jaxbias.types import Metric
from tests.losses.texts import V, context, text, texts, value, with_hidden

BETAS = pytest.mark.parametrize("beta", [0.01, 0.1, 0.5, 1.0])


@jax.jit
@jax.value_and_grad
def npo_of_one(log_ratio: jax.Array, beta: float) -> jax.Array:
  """NPO of one text whose log-ratio is given, and its derivative."""
  ctx = context([[text("forget", 0.0)]])
  return value("npo", dataclasses.replace(ctx, logprob_BP=jnp.full((1, 1), log_ratio)), beta=beta).value()


@BETAS
def test_npo_at_the_reference_is_two_over_beta_log_two_and_ascends(beta):
  """Its gradient there is that of gradient ascent on the summed log-probability, whatever beta."""
  ctx = context([texts(at_reference=True)])

  def npo_of(logprob):
    return npo(dataclasses.replace(ctx, logprob_BP=logprob), "forget", beta).value()

  def ascent(logprob):
    ctx_BS = dataclasses.replace(ctx, logprob_BP=logprob)
    return Metric.over(ctx_BS.logprob_BS, ctx_BS.rows("forget")).value()

  assert_allclose(npo_of(ctx.logprob_BP), 2 / beta * np.log(2), rtol=1e-6)
  slope = jax.grad(npo_of)(ctx.logprob_BP)
  assert_allclose(slope, jax.grad(ascent)(ctx.logprob_BP), rtol=1e-6)
  assert_allclose(slope.sum(), np.mean([len(t.logprob) for t in texts() if t.role == "forget"]), rtol=1e-5)


def test_npo_becomes_gradient_ascent_as_beta_vanishes():
  for log_ratio in (-5.0, 0.0, 3.0):
    assert_allclose(npo_of_one(log_ratio, 1e-6)[1], 1.0, atol=1e-5)
    assert_allclose(npo_of_one(log_ratio, 1e-3)[0] - 2e3 * np.log(2), log_ratio, atol=1e-2)


@BETAS
def test_npos_slope_is_bounded_where_ascents_is_not(beta):
  """dL / d log pi = 2 sigmoid(beta r): 0 once the text is forgotten, at most 2, finite however far the policy is."""
  ratios = np.array([-1e4, -50.0, -1.0, 0.0, 1.0, 50.0, 1e4])
  values, slopes = np.transpose([npo_of_one(r, beta) for r in ratios])
  assert_allclose(slopes, 2 * np.exp(-np.logaddexp(0, -beta * ratios)), atol=1e-6)
  assert np.isfinite(values).all() and (np.diff(slopes) >= 0).all()


@BETAS
def test_dpo_and_its_mirror_image(beta):
  """Chosen and rejected exchanged: L(-m) - L(m) = beta m (Rafailov et al. 2023, eq. 7), and both are log 2 at m = 0."""

  def of(ratio_chosen, ratio_rejected):
    pair = [text("retain", ratio_chosen, 0.0, pair=0), text("forget", ratio_rejected, 0.0, pair=0)]
    return tuple(float(value("dpo", context([pair]), on, beta=beta).value()) for on in ("retain", "forget"))

  assert_allclose(of(-3.0, -3.0), np.log(2), rtol=1e-6)
  (forward, mirrored), (swapped, _) = of(1.5, -0.7), of(-0.7, 1.5)
  assert_allclose(mirrored, swapped, rtol=1e-6)
  assert_allclose(mirrored - forward, beta * 2.2, rtol=1e-4)
  assert_allclose(of(1.5 + 4, -0.7 + 4), of(1.5, -0.7), rtol=1e-5)  # only the difference counts


def test_sft_and_gradient_ascent_are_opposite():
  ctx = context([texts()])
  of = lambda loss: lambda logprob: loss(dataclasses.replace(ctx, logprob_BP=logprob), "retain").value()
  both = [jax.value_and_grad(of(loss))(ctx.logprob_BP) for loss in (sft, ga)]
  jax.tree.map(lambda x, y: assert_array_equal(x, -y), *both)
  assert both[0][0] > 0


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
def test_kl_is_zero_and_flat_at_the_reference_and_positive_elsewhere(divergence):
  rng = np.random.default_rng(0)
  ref, other = (jnp.asarray(rng.standard_normal((2, 3, V)), jnp.float32) for _ in range(2))
  start = context([[text("general", np.zeros(3), hidden=row)] for row in ref])
  of = lambda logits: value("kl", with_hidden(start, logits), divergence=divergence).value()
  there, slope = jax.value_and_grad(of)(ref)
  assert_allclose(there, 0.0, atol=1e-6)
  assert_allclose(slope, 0.0, atol=1e-6)
  for step in (0.01, 0.1, 1.0):
    assert of(ref + step * other) > there
  assert_allclose(of(ref + 3.0), 0.0, atol=1e-5)  # a constant added to all logits is no change


def test_the_published_anchor_divides_by_padded_texts():
  ctx = context([texts()])
  plain, padded = (value("kl", ctx, divergence="cross_entropy", over=over) for over in ("tokens", "padded"))
  assert_allclose(padded.value(), plain.sum / 200, rtol=1e-6)  # two texts of 100


@pytest.mark.parametrize("form", ["sigmoid", "ipo", "hinge"])
def test_smoothing_by_a_half_makes_a_pair_symmetric(form):
  pair = [text("retain", -1.0, 0.3, pair=0), text("forget", -4.0, 0.1, pair=0)]
  of = lambda on, **how: float(value("dpo", context([pair]), on, form=form, **how).value())
  assert_allclose(of("retain", smoothing=0.5), of("forget", smoothing=0.5), rtol=1e-6)
  assert_allclose(of("retain", smoothing=0.2), 0.8 * of("retain") + 0.2 * of("forget"), rtol=1e-6)


def test_ipo_is_zero_where_the_margin_is_one_over_two_beta():
  pair = [text("retain", -1.0, -1.0, pair=0), text("forget", -7.0, -2.0, pair=0)]
  assert_allclose(value("dpo", context([pair]), form="ipo", beta=0.1).value(), 0.0, atol=1e-9)


def test_dpo_of_the_composed_model_against_its_proposal_is_reference_free_dpo():
  """log(P Q / Z) - log P = log Q - log Z, and Z is the same for both answers (RAM, section 2.2)."""
  rng = np.random.default_rng(0)
  q, p, z = rng.normal(-3, 1, 2), rng.normal(-9, 2, 2), -1.3
  composed, proposal = q + p - z, p
  sides = ("retain", "forget")
  whole = context([[text(role, composed[i], proposal[i], pair=0) for i, role in enumerate(sides)]])
  aligner = context([[text(role, q[i], 0.0, pair=0) for i, role in enumerate(sides)]])
  for beta in (0.1, 0.5, 1.0):
    free = value("dpo", aligner, reference="none", beta=beta).value()
    assert_allclose(value("dpo", whole, beta=beta).value(), free, rtol=1e-5)


def test_rams_alpha_is_the_weight_of_the_rejected_and_zero_is_likelihood():
  ctx = context([[t for t in texts() if t.pair >= 0]])
  assert_array_equal(value("ram", ctx, alpha=0.0).value(), value("sft", ctx, reduction="seq_sum").value())
  slope = jax.grad(lambda alpha: value("ram", ctx, alpha=alpha).value())(0.3)
  assert_allclose(slope, np.mean([t.logprob.sum() for t in texts() if t.role == "forget" and t.pair >= 0]), rtol=1e-5)


def test_ktos_reference_point_shifts_both_sides_and_is_never_negative():
  def of(z, r_wanted, r_unwanted):
    rows = [text("retain", r_wanted, 0.0), text("forget", r_unwanted, 0.0), text("mismatched", z, 0.0)]
    return float(value("kto", context([rows]), beta=0.5, desirable=1.0, undesirable=2.0).value())

  sigmoid = lambda x: 1 / (1 + np.exp(-x))
  for z in (0.0, 1.5):
    expected = (1 - sigmoid(0.5 * (2.0 - z)) + 2 * (1 - sigmoid(0.5 * (z + 1.0)))) / 2
    assert_allclose(of(z, 2.0, -1.0), expected, rtol=1e-5)
  assert of(-4.0, 2.0, -1.0) == of(0.0, 2.0, -1.0)


def test_satimp_without_importance_is_wga():
  ctx = context([texts()])
  assert_allclose(value("satimp", ctx, beta1=1.0, beta2=0.0).value(), value("wga", ctx, alpha=1.0).value(), rtol=1e-6)
  assert_allclose(value("wga", ctx, alpha=0.0).value(), value("ga", ctx).value(), rtol=1e-6)


def test_undial_without_strength_is_the_divergence():
  ctx = context([texts()])
  assert_allclose(value("undial", ctx, strength=0.0).value(), value("kl", ctx, "forget").value(), rtol=1e-6)


def test_npos_one_sigmoid_a_batch_depends_on_what_shares_it():
  halves = [context([part]) for part in (texts()[:4], texts()[4:])]
  how = {"reduction": "batch_token_mean"}
  apart = np.mean([value("npo", ctx, **how).value() for ctx in halves])
  assert abs(value("npo", context([texts()]), **how).value() - apart) > 1e-4
