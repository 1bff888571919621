"""What may not change a mean, and what is missing: padding, order, packing, roles, empty answers, certain tokens."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from jaxbias.losses.registry import LOSSES
from jaxbias.types import ROLES, Metric
from tests.losses.texts import EVERY_LOSS, NAMES, context, text, texts, value, with_hidden

BATCH_LEVEL = {"kto"}  # whose mean depends on what shares a batch: the reference point


# What may not change a mean


def test_metric_never_reads_what_is_masked():
  def mean(x):
    return Metric.over(x, jnp.array([True, False, True])).value()

  found, slope = jax.value_and_grad(mean)(jnp.array([1.0, np.nan, 4.0]))
  assert_allclose(found, 2.5)
  assert_array_equal(slope, [0.5, 0.0, 0.5])
  assert Metric.over(jnp.array([np.nan]), jnp.array([False])).value() == 0.0


@EVERY_LOSS
def test_padding_order_and_packing_change_nothing(name):
  all_texts = texts()
  plain = value(name, context([all_texts]))
  assert plain.weight > 0
  layouts = {
    "one text a row": context([[t] for t in all_texts]),
    "backwards": context([all_texts[::-1]]),
    "mixed rows": context([all_texts[5:], all_texts[2:5], all_texts[:2]]),
    "padding": context([all_texts[:3], all_texts[3:]], spare=3, filler=np.nan),
  }
  for what, ctx in layouts.items():
    found = value(name, ctx)
    assert_allclose(found.value(), plain.value(), rtol=1e-6, err_msg=what)
    assert_array_equal(found.weight, plain.weight, err_msg=what)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in BATCH_LEVEL])
def test_metrics_of_a_split_batch_add_up(name):
  all_texts = texts()
  parts, whole_context = [context([part]) for part in (all_texts[:2], all_texts[2:])], context([all_texts])
  first, second, whole = (value(name, ctx) for ctx in (*parts, whole_context))
  assert_allclose((first + second).value(), whole.value(), rtol=1e-6)
  assert abs((first.value() + second.value()) / 2 - whole.value()) > 1e-4, "a mean of means would differ"

  def slopes(ctx):  # of the sums, which is what accumulation adds
    of = lambda x: value(name, dataclasses.replace(with_hidden(ctx, x[1]), logprob_BP=x[0])).sum
    return jax.grad(of)((ctx.logprob_BP, ctx.hidden_BTD))

  for *pieces, together in zip(*map(slopes, (*parts, whole_context)), strict=True):
    assert_allclose(np.concatenate(pieces, axis=1), together, rtol=1e-5, atol=1e-7)


@EVERY_LOSS
def test_a_loss_reads_its_role_alone(name):
  """Texts of other roles (twins apart) may be anything."""
  loss, all_texts = LOSSES[name], texts()
  reads = {loss.on, *loss.reads} | (set(ROLES[:2]) if "pairs" in loss.needs else set())
  other_text = lambda t: dataclasses.replace(t, logprob=t.logprob * 9, ref=t.ref - 5, hidden=-t.hidden)
  changed = [t if t.role in reads else other_text(t) for t in all_texts]
  assert_array_equal(value(name, context([changed])).value(), value(name, context([all_texts])).value())
  other = next(role for role in ROLES if role != loss.on)
  assert value(name, context([all_texts]), other).value() != value(name, context([all_texts])).value()


# What is missing


@EVERY_LOSS
def test_a_role_that_is_not_there_counts_nothing_and_costs_nothing(name):
  loss = LOSSES[name]
  ctx = context([[text("general" if loss.on != "general" else "forget", [-1.0, -2.0])]])
  of = lambda x: value(name, dataclasses.replace(with_hidden(ctx, x[1]), logprob_BP=x[0])).value()
  found, slope = jax.value_and_grad(of)((ctx.logprob_BP, ctx.hidden_BTD))
  assert found == 0 and not any(leaf.any() for leaf in slope)


@EVERY_LOSS
def test_an_empty_answer_and_a_missing_twin_are_left_out(name):
  """They neither count nor poison what is there, in value and gradient."""
  empty = lambda role, pair=-1: text(role, np.zeros(0), pair=pair)
  all_texts, odd = texts(), [*map(empty, ROLES), empty("forget", 7), empty("retain", 7)]
  if "pairs" in LOSSES[name].needs:
    odd += [text("retain", -1.0, pair=8), empty("forget", 8)]
  plain, found = (value(name, context([rows])) for rows in (all_texts, all_texts + odd))
  assert_allclose(found.value(), plain.value(), rtol=1e-6)
  assert found.weight == plain.weight
  ctx = context([all_texts + odd])
  of = lambda x: value(name, dataclasses.replace(with_hidden(ctx, x[1]), logprob_BP=x[0])).value()
  assert all(np.isfinite(leaf).all() for leaf in jax.grad(of)((ctx.logprob_BP, ctx.hidden_BTD)))


@EVERY_LOSS
def test_a_certain_and_an_impossible_token_give_finite_slopes(name):
  rows = [text(t.role, np.where(np.arange(len(t.logprob)) % 2, -200.0, 0.0), t.ref, t.pair, 100 * t.hidden,
               t.ref_hidden, t.target) for t in texts()]  # fmt: skip
  ctx = context([rows])
  of = lambda x: value(name, dataclasses.replace(with_hidden(ctx, x[1]), logprob_BP=x[0])).value()
  found, slope = jax.value_and_grad(of)((ctx.logprob_BP, ctx.hidden_BTD))
  assert np.isfinite(found) and all(np.isfinite(leaf).all() for leaf in slope)


def test_two_divergences_of_one_batch_read_their_own_roles():
  ctx = context([texts()])
  both = [value("kl", ctx, on).value() for on in ("general", "retain")]
  alone = [value("kl", context([[t for t in texts() if t.role == on]]), on).value() for on in ("general", "retain")]
  assert_allclose(both, alone, rtol=1e-5)
