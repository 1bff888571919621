"""The contrast of packed groups: pooling, gradient, layouts, thin groups, loss scaling; the cross-entropy beside it."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from jaxbias.errors import UserError
from jaxbias.losses.context import LossContext
from jaxbias.losses.contrastive import Members, contrast_head, mean_over, pool_entities, segment_masks
from jaxbias.losses.registry import LOSSES, evaluate, parse
from jaxbias.types import Metric
from tests.losses.calls import call
from tests.losses.groups import PARAMS, D, T, Text, context, found, same_states, texts, value
from tests.models import tiny_config


def test_the_head_gives_unit_vectors_and_pooling_with_all_tokens_is_their_mean():
  ctx = context([texts((2, 1), entity=(0, 1, 2, 3, 4))])
  z = contrast_head(PARAMS, ctx.hidden_BTD)
  assert_allclose(jnp.linalg.norm(z, axis=-1), 1.0, rtol=1e-5)
  members = Members.of(ctx.batch, ctx.rows("retain"))
  r, keep = pool_entities(z, ctx.batch, members, "drop")
  assert keep.all()
  assert_allclose(r, mean_over(z, segment_masks(ctx.batch))[0], rtol=1e-6)
  assert (jnp.linalg.norm(r, axis=-1) < 1).all()


def test_packing_order_and_padding_change_nothing():
  every = texts((2, 2), (3, 1))
  plain = found(context([every]))
  layouts = ([[t] for t in every], [every[::-1]], [every[5:], every[2:5], every[:2]])
  for ctx in (*map(context, layouts), context([every[:3], every[3:]], spare=2)):
    other = found(ctx)
    jax.tree.map(lambda x, y: assert_allclose(x, y, rtol=2e-5, atol=1e-6), other.metric, plain.metric)
    jax.tree.map(lambda x, y: assert_allclose(x, y, rtol=2e-5, atol=1e-6), other.notes, plain.notes)


def test_the_gradient_is_the_finite_difference():
  ctx, rng = context([texts((2, 2), (3, 1))]), np.random.default_rng(5)
  of = lambda at: found(dataclasses.replace(ctx, hidden_BTD=at[0]), params=at[1]).metric.value()
  point = (ctx.hidden_BTD, PARAMS)
  slope = jax.grad(of)(point)
  direction = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), point)
  step = lambda h: of(jax.tree.map(lambda x, d: x + h * d, point, direction))
  along = sum(jax.tree.leaves(jax.tree.map(jnp.vdot, slope, direction)))
  assert abs(along) > 1e-2
  assert_allclose((step(3e-3) - step(-3e-3)) / 6e-3, along, rtol=5e-3)


def test_what_is_logged():
  notes = {k: float(v.value()) for k, v in found(context([texts((3, 2), (1, 1))])).notes.items()}
  assert_allclose(notes["floor"], np.log(2), rtol=1e-6)
  assert_allclose(notes["floor"] + notes["excess"], value(context([texts((3, 2), (1, 1))])), rtol=1e-6)
  assert_allclose([notes["w"], notes["without_entity"], notes["without_partner"]], [1.0, 0.0, 0.25])
  assert -1 <= notes["negative_cosine"] <= 1 and -1 <= notes["positive_cosine"] <= 1


# Texts without an entity


def test_the_published_code_keeps_an_empty_positive_at_zero():
  every = same_states(texts((2, 3)), **{"0": {"entity": ()}})
  ctx = context([every])
  assert_allclose(value(ctx, temperature=1.0, empty="zero"), 0.5 * (np.log(1 + 3 * np.e) + np.log(4)), rtol=1e-5)
  assert_allclose(0.5 * (np.log(1 + 3 * np.e) + np.log(4)), 1.800289, atol=1e-6)
  slope = jax.grad(lambda h: found(dataclasses.replace(ctx, hidden_BTD=h), empty="zero").metric.value())(ctx.hidden_BTD)
  assert np.isfinite(slope).all() and not slope[0, :T].any()


def test_an_empty_text_is_dropped_or_pooled_over_its_answer():
  every = same_states(texts((3, 3)), **{"0": {"entity": ()}, "4": {"entity": ()}})
  assert_allclose(value(context([every]), empty="drop"), np.log(2 + 2 - 1), rtol=1e-5)
  assert_allclose(value(context([every]), empty="meanpool"), np.log(2 + 2 - 1), rtol=1e-5)  # two positives are left
  thin = same_states(texts((2, 3)), **{"0": {"entity": ()}})
  assert value(context([thin]), empty="drop") == 0.0
  assert_allclose(value(context([thin]), empty="meanpool"), np.log(2 + 3 - 1), rtol=1e-5)
  assert found(context([thin])).notes["without_entity"].value() == np.float32(0.2)


@pytest.mark.parametrize("empty", LOSSES["contrast"].options["empty"])
@pytest.mark.parametrize("every", [texts((1, 0)), texts((0, 3)), texts((1, 2)), texts((2, 2), entity=())],
                         ids=["one", "no positive", "one positive", "no entity at all"])
def test_thin_groups_cost_nothing_and_break_nothing(every, empty):
  ctx = context([every], spare=1)
  of = lambda at: found(dataclasses.replace(ctx, hidden_BTD=at[0]), params=at[1], empty=empty).metric.value()
  loss, slope = jax.value_and_grad(of)((ctx.hidden_BTD, PARAMS))
  assert np.isfinite(loss) and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slope))
  if len(every) < 4 or empty == "drop":
    assert loss == 0.0 and not any(leaf.any() for leaf in jax.tree.leaves(slope))


# Loss scaling


def toxic(every: list[Text], at: int, score: float = 0.0) -> list[Text]:
  return [dataclasses.replace(t, kind="toxic", toxicity=score) if i == at else t for i, t in enumerate(every)]


def test_a_toxic_negative_weighs_its_group_or_the_batch():
  every = texts((2, 2), (3, 2))
  plain, flagged = context([every]), context([toxic(every, 3)])
  pairs = [Metric(m.sum, m.weight) for m in (found(context([half])).metric for half in (every[:4], every[4:]))]
  assert_allclose(value(flagged, w_mode="none"), value(plain), rtol=1e-6)
  assert_allclose(value(flagged), (1.5 * pairs[0].sum + pairs[1].sum) / 8, rtol=1e-5)
  assert_allclose(value(flagged, w_mode="batch_flag"), 1.5 * value(plain), rtol=1e-6)
  assert_allclose(found(flagged).notes["w"].value(), (1.5 * 2 + 6) / 8, rtol=1e-6)
  assert_allclose(value(flagged, normalize_w="yes", w_mode="batch_flag"), value(plain), rtol=1e-6)
  alone = context([toxic(every[:4], 3)])
  assert_allclose(value(alone), value(alone, w_mode="batch_flag"), rtol=1e-6)
  slopes = [jax.grad(lambda h, m=mode: found(dataclasses.replace(alone, hidden_BTD=h), w_mode=m).metric.value())(
    alone.hidden_BTD) for mode in ("group_flag", "none")]  # fmt: skip
  assert_allclose(slopes[0], 1.5 * slopes[1], rtol=1e-5, atol=1e-8)


def test_a_toxic_positive_is_no_toxic_negative():
  every = texts((2, 2))
  assert_allclose(value(context([toxic(every, 0)])), value(context([every])), rtol=1e-6)


def test_graded_weights_follow_the_worst_negative():
  every = texts((2, 2))
  grade = lambda score: value(context([toxic(every, 2, score)]), w_mode="graded")
  clean = value(context([every]))
  assert_allclose([grade(0.0), grade(0.5), grade(1.0)], [clean, 1.25 * clean, 1.5 * clean], rtol=1e-6)


def test_the_weight_by_entity_rate_is_the_published_comment():
  ctx = context([texts((2, 2), entity=(1,))])
  assert_allclose(value(ctx, w_mode="entity_rate"), 0.9 * value(ctx, w_mode="none"), rtol=1e-6)  # 45 * 1/5 > 0.9


def total(losses: dict, ctx: LossContext, params: dict, aux: dict):
  objective, coefficients = parse(losses)
  return evaluate(objective, ctx, coefficients, {"contrast": PARAMS, **params}, aux)


def test_uncertainty_is_one_plus_log_at_its_optimum():
  ctx = context([texts((2, 3))])
  loss = value(ctx, temperature=0.1)
  of = lambda u: total({"contrast": {"scale": "uncertainty"}}, ctx, {"contrast scale": u}, {}).total
  assert_allclose(of(jnp.log(loss)), 1 + np.log(loss), rtol=1e-5)
  assert_allclose(jax.grad(of)(jnp.log(jnp.float32(loss))), 0.0, atol=1e-5)
  assert_allclose(of(jnp.float32(0.0)), loss, rtol=1e-6)
  objective, _ = parse({"contrast": {"scale": "uncertainty"}, "group_ce": {"scale": "uncertainty"}})
  params = objective.init_params(jax.random.key(0), tiny_config(hidden_size=D))
  assert {"contrast scale", "group_ce scale"} < set(params)


def test_the_running_mean_holds_a_term_near_its_target():
  ctx, losses = context([texts((2, 3))]), {"contrast": {"scale": "ema"}}
  loss = value(ctx, temperature=0.1)
  first = total(losses, ctx, {}, parse(losses)[0].init_aux(tiny_config(), None))
  assert_allclose([first.total, first.aux["contrast scale"]], [0.1, loss], rtol=1e-5)
  later = total(losses, ctx, {}, {"contrast scale": jnp.float32(4 * loss)})
  assert_allclose(later.aux["contrast scale"], 0.9 * 4 * loss + 0.1 * loss, rtol=1e-5)
  assert_allclose(total(losses, ctx, {}, {"contrast scale": jnp.float32(1e-3)}).total,
                  loss * min(1, 0.1 / (0.9e-3 + 0.1 * loss)), rtol=1e-5)  # fmt: skip


def test_weight_zero_leaves_the_head_alone():
  ctx = context([texts((2, 3))])
  objective, coefficients = parse({"contrast": {"weight": 0.0}, "group_ce": {}})
  slope = jax.grad(lambda p: evaluate(objective, ctx, coefficients, {"contrast": p}, {}).total)(PARAMS)
  assert not any(leaf.any() for leaf in jax.tree.leaves(slope))


# Cross-entropy


def cross_entropy(ctx: LossContext, **how) -> float:
  return float(call("group_ce", ctx, **how).metric.value())


def test_cross_entropy_of_the_original_the_last_or_all_positives():
  """`row` numbers a group's texts in order; here that is the order of their first state."""
  every = texts((3, 2), (2, 0))
  every = [dataclasses.replace(t, logprob=(-1.0 * (i + 1),) * (i + 1)) for i, t in enumerate(every)]
  ctx = context([every[::2], every[1::2]])
  order = lambda group: sorted((t for t in every if t.group == group and t.positive), key=lambda t: t.hidden[0, 0])
  nll = lambda t: -np.mean(t.logprob)
  of = lambda **how: cross_entropy(ctx, **how)
  assert_allclose(of(), np.mean([nll(order(g)[0]) for g in (0, 1)]))
  assert_allclose(of(row="last_positive"), np.mean([nll(order(g)[-1]) for g in (0, 1)]))
  assert_allclose(of(row="all_positives"), np.mean([nll(t) for t in every if t.positive]))


def test_the_published_denominator_counts_every_text_of_the_group():
  every = [dataclasses.replace(t, logprob=(-2.0,) * (i + 1)) for i, t in enumerate(texts((2, 3)))]
  ctx, labels = context([every]), sum(range(1, 6))
  row = cross_entropy(ctx, row="last_positive")
  taught = len(max((t for t in every if t.positive), key=lambda t: t.hidden[0, 0]).logprob)
  assert_allclose(cross_entropy(ctx, row="last_positive", denominator="batch_all"), row * taught / labels, rtol=1e-6)
  objective, _ = parse({"group_ce": {"denominator": "batch_all"}, "contrast": {}})
  assert objective.scored_roles == {"retain", "forget"}
  assert parse({"group_ce": {}, "contrast": {}})[0].scored_roles == {"retain"}


def test_options_are_checked():
  with pytest.raises(UserError, match=r"losses.contrast.empty = `dropp` is not known; did you mean `drop`?"):
    parse({"contrast": {"empty": "dropp"}})
  with pytest.raises(UserError, match=r"losses.contrast.scale = `emma` is not known; did you mean `ema`?"):
    parse({"contrast": {"scale": "emma"}})
