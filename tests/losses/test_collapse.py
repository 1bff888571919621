"""NC3 and its published form: closed forms, gradients, and what thin statistics do. tests/losses/oracles/collapse.py
has the shipped code's numbers."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from jaxbias.losses.collapse import alignment, spread
from jaxbias.losses.registry import LOSSES
from jaxbias.models.transformer import Head
from tests.losses.collapsed import MLM, context, empty, found, random_case

# Closed forms


def test_no_spread_is_a_gradient_of_zero():
  loss, slope = jax.value_and_grad(spread)(jnp.full(2, 0.5), jnp.array([True, True]))
  assert loss == 0.0 and not slope.any()


def test_a_vector_added_to_all_weights_changes_the_spread():
  """It is their directions that count, unlike those of features, whose mean is taken off."""
  ctx, aux = random_case()
  of = lambda w: found(dataclasses.replace(ctx, head=Head(w)), aux, form="std").metric.value()
  assert abs(of(ctx.head.matrix + 1.0) - of(ctx.head.matrix)) > 0.01


def test_alignment_is_told_from_its_opposite_by_the_default():
  """Aligned, at right angles and opposite: all perfect for the published form."""
  x, y = np.array([[1.0, 0, 0], [-1, 0, 0]]), [0, 1]
  for weights, mse, similarity in ((x, 0.0, 1.0), (x[:, [1, 0, 2]], 1.0, 0.0), (-x, 4.0, -1.0)):
    of = lambda form, weights=weights: found(context(y, x, weights), empty([0, 1], 3), form=form, **MLM).metric.value()
    assert_allclose([of("std"), of("mse_to_one"), of("one_minus_mean")], [0.0, mse, 1 - similarity], atol=1e-5)


def test_the_spread_lies_between_nothing_and_its_bound():
  """0 <= L <= sqrt(n / (n - 1)), as s is in [-1, 1]; reached where half of the classes are at either end."""
  rng, classes = np.random.default_rng(0), jnp.ones(6, bool)
  values = jax.jit(jax.vmap(spread, (0, None)))(jnp.asarray(rng.uniform(-1, 1, (50, 6)), jnp.float32), classes)
  assert (values > 0).all() and (values <= np.sqrt(6 / 5)).all()
  assert_allclose(spread(jnp.array([1.0, -1.0] * 3), classes), np.sqrt(6 / 5), rtol=1e-6)


def test_centred_means_add_to_nothing_and_two_of_them_are_opposite():
  """sum_c m_c = 0: with rows of W that are all w, the cosines of two classes with it are opposite, and |m_c|-weighted
  ones of any number add to nothing."""
  rng = np.random.default_rng(1)
  sums, counts, w = rng.normal(size=(5, 4)), np.array([1, 3, 2, 1, 4]), rng.normal(size=4)
  of = lambda n: alignment(jnp.asarray(counts[:n]), jnp.asarray(sums[:n], jnp.float32),
                           jnp.tile(jnp.asarray(w, jnp.float32), (n, 1)), jnp.ones(n, bool))  # fmt: skip
  two = of(2)
  assert_allclose(two[0], -two[1], rtol=1e-5)
  means = sums / counts[:, None]
  assert_allclose((of(5) * np.linalg.norm(means - means.mean(0), axis=1)).sum(), 0.0, atol=1e-5)


def test_the_gap_is_of_one_groups_words_against_the_others():
  """Logged, not trained on: mean s of the list's first group less that of its second."""
  x = np.array([[1.0, 0, 0], [-1, 0, 0], [0, 2, 0], [0, -2, 0]])
  w = x * [[1], [1], [-1], [-1]]
  of = lambda group, tokens=(0, 1, 2, 3): found(context(tokens, x[list(tokens)], w), empty(range(4), 3, group), **MLM)
  assert_allclose(of([0, 0, 1, 1]).notes["gap"].value(), 2.0, atol=1e-5)
  assert_allclose(of([1, 1, 0, 0]).notes["gap"].value(), -2.0, atol=1e-5)
  assert_allclose(of([0, -1, 1, -1]).notes["gap"].value(), 2.0, atol=1e-5)  # a fragment of both counts in neither
  assert of([0, 0, 0, 0]).notes["gap"].weight == of([0, 0, 1, 1], (0, 1)).notes["gap"].weight == 0
  assert_array_equal(of([0, 0, 1, 1]).metric.value(), of([0, 0, 0, 0]).metric.value())


# Gradients


@pytest.mark.parametrize("form", LOSSES["nc3"].options["form"])
@pytest.mark.parametrize("totals", LOSSES["nc3"].options["totals"])
def test_the_gradient_is_the_finite_difference(form, totals):
  ctx, aux = random_case()
  aux = found(random_case(seed=9)[0], aux).aux  # statistics of an earlier step
  rng = np.random.default_rng(1)

  def of(at):
    moved = dataclasses.replace(ctx, hidden_BTD=at[0], head=Head(at[1]))
    return found(moved, aux, form=form, totals=totals).metric.value()

  point = (ctx.hidden_BTD, ctx.head.matrix)
  slope = jax.grad(of)(point)
  direction = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), point)
  step = lambda h: of(jax.tree.map(lambda x, d: x + h * d, point, direction))
  along = sum(jax.tree.leaves(jax.tree.map(jnp.vdot, slope, direction)))
  assert abs(along) > 1e-2
  assert_allclose((step(2e-3) - step(-2e-3)) / 4e-3, along, rtol=2e-2)
  assert not slope[1][-1].any(), "the row of a word that is not on the list"


def test_gradients_go_where_they_are_asked_to():
  ctx, aux = random_case()
  slopes = {}
  for choice in LOSSES["nc3"].options["gradient"]:
    of = lambda at, choice=choice: found(dataclasses.replace(ctx, hidden_BTD=at[0], head=Head(at[1])), aux,
                                         gradient=choice).metric.value()  # fmt: skip
    slopes[choice] = jax.grad(of)((ctx.hidden_BTD, ctx.head.matrix))
  assert not slopes["weights"][0].any() and not slopes["features"][1].any()
  assert_array_equal(slopes["both"][0], slopes["features"][0])
  assert_array_equal(slopes["both"][1], slopes["weights"][1])
  assert slopes["both"][0].any() and slopes["both"][1].any()


def test_gradient_steps_on_the_features_raise_the_alignment():
  ctx, aux = random_case()
  of = lambda x: found(dataclasses.replace(ctx, hidden_BTD=x), aux, gradient="features")
  x = ctx.hidden_BTD
  before = of(x).notes["similarity"].value()
  for _ in range(20):
    x = x - 2.0 * jax.grad(lambda x: of(x).metric.value())(x)
  assert of(x).notes["similarity"].value() > before + 0.2


# Statistics over steps, packing, roles


def test_totals_of_the_run_an_epoch_a_batch_or_a_running_mean():
  x = np.random.default_rng(0).normal(size=(3, 2, 4))
  steps = [context([0, 1], part, np.eye(2, 4)) for part in x]

  def means(totals, **numbers):
    aux = empty([0, 1], 4)
    for ctx in steps:
      aux = found(ctx, aux, totals=totals, **MLM, **numbers).aux
    return aux["sums"] / aux["counts"][:, None], aux["counts"]

  assert_allclose(means("cumulative")[0], x.mean(0), rtol=1e-5)
  assert_allclose(means("batch")[0], x[2], rtol=1e-5)
  assert_allclose(means("epoch", reset_every=2.0)[0], x[2], rtol=1e-5)
  assert_allclose(means("epoch", reset_every=3.0)[0], x.mean(0), rtol=1e-5)
  assert_allclose(means("ema", decay=0.5)[0], 0.25 * x[0] + 0.25 * x[1] + 0.5 * x[2], rtol=1e-5)
  assert [int(means(t)[1][0]) for t in ("cumulative", "ema", "batch")] == [3, 3, 1]


@pytest.mark.parametrize("shift", ["0", "1", "auto"])
def test_packing_and_order_change_nothing(shift):
  rng = np.random.default_rng(0)
  texts = [(rng.integers(0, 5, n), rng.normal(size=(n, 6))) for n in (4, 7, 5, 3)]
  w = rng.normal(size=(5, 6))

  def packed(rows):
    width = max(sum(len(texts[i][0]) for i in row) for row in rows) + 2
    tokens, segment, x = np.zeros((len(rows) + 1, width)), np.zeros((len(rows) + 1, width)), np.zeros(
      (len(rows) + 1, width, 6))  # fmt: skip
    for b, row in enumerate(rows):
      at = 0
      for s, i in enumerate(row):
        span = slice(at, at := at + len(texts[i][0]))
        tokens[b, span], x[b, span], segment[b, span] = *texts[i], s + 1
    return found(context(tokens, x, w, segment.astype(int)), empty(range(4), 6), shift=shift)

  plain = packed([[0], [1], [2], [3]])
  assert plain.metric.weight == 1 and int(plain.notes["classes"].value()) == 4
  for rows in ([[0, 1, 2, 3]], [[3, 1], [2, 0]]):
    other = packed(rows)
    assert_allclose(other.metric.value(), plain.metric.value(), rtol=1e-4)
    assert_array_equal(other.aux["counts"], plain.aux["counts"])
    assert_allclose(other.aux["sums"], plain.aux["sums"], atol=1e-5)


def test_auto_reads_one_before_in_a_causal_model_and_at_the_word_in_a_masked_one():
  ctx, aux = random_case()
  masked = dataclasses.replace(ctx, causal=False)
  value = lambda ctx, shift: found(ctx, aux, shift=shift).metric.value()
  assert value(ctx, "auto") == value(ctx, "1") != value(ctx, "0") == value(masked, "auto")


def test_other_roles_are_not_counted():
  ctx, aux = random_case()
  other = dataclasses.replace(ctx, batch=ctx.batch.replace(role=jnp.zeros_like(ctx.batch.role)))
  assert found(other, aux).aux["counts"].sum() == 0 < found(ctx, aux).aux["counts"].sum()


@pytest.mark.parametrize("form", LOSSES["nc3"].options["form"])
@pytest.mark.parametrize("tokens,classes_seen", [([4, 4, 4], 0), ([4, 0, 0], 1), ([1, 0, 0], 2)])
def test_classes_that_are_never_seen_have_no_part(tokens, classes_seen, form):
  rng = np.random.default_rng(0)
  ctx = context(tokens, rng.normal(size=(3, 6)), rng.normal(size=(5, 6)))

  def of(at):
    moved = dataclasses.replace(ctx, hidden_BTD=at[0], head=Head(at[1]))
    out = found(moved, empty(range(4), 6), form=form, **MLM)
    return out.metric.value(), out

  (loss, out), slope = jax.value_and_grad(of, has_aux=True)((ctx.hidden_BTD, ctx.head.matrix))
  assert np.isfinite(loss) and all(np.isfinite(leaf).all() for leaf in slope)
  assert int(out.notes["classes"].value()) == classes_seen
  if classes_seen < 2:
    assert loss == 0.0 and out.metric.weight == 0 and not any(leaf.any() for leaf in slope)
  assert not slope[1][2:].any()


def test_rare_classes_may_be_left_out():
  ctx, aux = context([0, 0, 1, 1, 2], np.eye(5), np.eye(5)), empty(range(3), 5)
  seen = lambda n: int(found(ctx, aux, min_count=n, **MLM).notes["classes"].value())
  assert [seen(n) for n in (0.0, 1.0, 2.0, 3.0)] == [3, 3, 2, 0]
