"""The contrast of groups: its closed forms, its gradient, what may not change it, what thin groups do, its scales."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from jaxbias.data.rows import KINDS
from jaxbias.errors import UserError
from jaxbias.losses.context import LossContext
from jaxbias.losses.contrastive import (
  Members,
  compare,
  contrast,
  contrast_head,
  group_ce,
  init_contrast_head,
  log_share,
  mean_over,
  pool_entities,
  segment_masks,
)
from jaxbias.losses.logprobs import js_divergence
from jaxbias.losses.registry import LOSSES, evaluate, parse
from jaxbias.losses.sentence_pairs import clp, infonce, supcon, twin_positions
from jaxbias.models.transformer import Head
from jaxbias.types import ROLES, Batch, Metric
from tests.models import tiny_config

pytestmark = pytest.mark.usefixtures("quick_compilation")
ORACLE = json.loads((Path(__file__).parents[1] / "oracles" / "nc_oracle.json").read_text())
D, T = 6, 5  # width, tokens of a segment
OPTIONS = {"empty": "drop", "w_mode": "group_flag", "normalize_w": "no"}


# One group of given representations


def group_of(positives: int, negatives: int) -> Members:
  positive = np.arange(positives + negatives) < positives
  return Members(jnp.zeros(len(positive), jnp.int32), jnp.asarray(positive), jnp.asarray(~positive))


def loss_of(r_ND, members: Members, temperature: float = 1.0) -> jax.Array:
  found = compare(jnp.asarray(r_ND, jnp.float32), members, temperature)
  return found.over_pairs(-found.log_p).value()


def axes(*numbers: int) -> np.ndarray:
  """Unit vectors along axes; -n points the other way."""
  return np.array([np.sign(n) * np.eye(D)[abs(n) - 1] for n in numbers])


@pytest.mark.parametrize("tau", [0.07, 1.0])
@pytest.mark.parametrize("p,n,expected", [(2, 0, 0.0), (2, 3, 1.386294), (3, 5, 1.945910), (4, 7, 2.302585)])
def test_texts_that_are_all_alike_cost_log_of_the_others(p, n, expected, tau):
  assert_allclose(loss_of(axes(*[1] * (p + n)), group_of(p, n), tau), expected, atol=1e-5)


@pytest.mark.parametrize("p,n,tau,expected", [
  (2, 1, 1.0, 0.313262), (2, 7, 1.0, 1.274009), (4, 7, 1.0, 1.718320), (4, 7, 0.07, 1.098614),
])  # fmt: skip
def test_negatives_at_right_angles(p, n, tau, expected):
  assert_allclose(loss_of(axes(*[1] * p, *[2] * n), group_of(p, n), tau), expected, atol=1e-6)


@pytest.mark.parametrize("p,n,expected", [(2, 1, 0.126928), (2, 7, 0.666468), (4, 7, 1.373043)])
def test_opposite_negatives_are_the_floor(p, n, expected):
  assert_allclose(loss_of(axes(*[1] * p, *[-1] * n), group_of(p, n)), expected, atol=1e-6)
  rng = np.random.default_rng(p)
  assert all(loss_of(rng.normal(size=(p + n, D)), group_of(p, n)) >= expected - 1e-6 for _ in range(20))


def test_a_positive_opposite_to_all_others():
  """As an anchor it counts its partner among equals; as a partner it costs log(1 + N e^2), the most there is."""
  assert_allclose(loss_of(axes(-1, *[1] * 8), group_of(2, 7)), (np.log(8) + 3.965059) / 2, rtol=1e-6)


@pytest.mark.parametrize("p,n", [(2, 0), (1, 4), (0, 3)])
def test_a_group_without_two_positives_or_without_negatives_costs_nothing(p, n):
  r = np.random.default_rng(0).normal(size=(p + n, D)).astype(np.float32)
  value, slope = jax.value_and_grad(lambda r: loss_of(r, group_of(p, n), 0.07))(r)
  assert_allclose(value, 0.0, atol=1e-6)
  assert_allclose(slope, 0.0, atol=1e-6)


def test_the_derivative_by_similarity_is_the_softmax_minus_the_positives():
  """dL/ds_ij = (|Pi_i| p_ij - 1[Pi_ij]) / |Pi|: rows add to 0, rows of negatives are 0."""
  members, rng = group_of(3, 4), np.random.default_rng(0)
  found = compare(jnp.asarray(rng.normal(size=(7, D)), jnp.float32), members, 0.5)
  of = lambda s: Metric.over(-log_share(s, found.valid), found.pair).value()
  slope = jax.grad(of)(found.cos / 0.5)
  p = np.where(found.valid, np.exp(found.log_p), 0.0)
  pair = np.asarray(found.pair, np.float32)
  assert_allclose(slope, (pair.sum(1, keepdims=True) * p - pair) / pair.sum(), atol=1e-6)
  assert_allclose(slope.sum(1), 0.0, atol=1e-6)
  assert_array_equal(slope[3:], 0.0)


def test_two_groups_weigh_by_their_pairs_and_do_not_see_each_other():
  rng, sizes = np.random.default_rng(1), ((2, 3), (3, 2))
  r = rng.normal(size=(10, D)).astype(np.float32)
  parts = [group_of(*size) for size in sizes]
  both = Members(jnp.repeat(jnp.array([4, 9]), 5), *(jnp.concatenate([getattr(m, f) for m in parts])
                                                     for f in ("positive", "negative")))  # fmt: skip
  alone = [float(loss_of(half, m)) for half, m in zip((r[:5], r[5:]), parts, strict=True)]
  assert_allclose(loss_of(r, both), (2 * alone[0] + 6 * alone[1]) / 8, rtol=1e-6)
  slope = jax.grad(loss_of)(jnp.asarray(r), both)
  changed = jax.grad(loss_of)(jnp.asarray(np.r_[r[:5], rng.normal(size=(5, D))], jnp.float32), both)
  assert_allclose(slope[:5], changed[:5], atol=1e-7)
  order = rng.permutation(10)
  shuffled = jax.tree.map(lambda x: x[order], both)
  assert_allclose(loss_of(r[order], shuffled), loss_of(r, both), rtol=1e-6)


def test_only_directions_count():
  r, members = np.random.default_rng(2).normal(size=(6, D)), group_of(3, 3)
  assert_allclose(loss_of(r * [[3.0], [0.01], [1e3], [1.0], [7.0], [1e-4]], members), loss_of(r, members), rtol=1e-5)


@pytest.mark.parametrize("tau,tolerance", [(1.0, 1e-2), (0.07, 5e-2)])
def test_bfloat16_inputs_agree(tau, tolerance):
  r, members = np.random.default_rng(3).normal(size=(8, D)).astype(np.float32), group_of(4, 4)
  rounded = jnp.asarray(r, jnp.bfloat16).astype(jnp.float32)
  value, slope = jax.value_and_grad(loss_of)(rounded, members, tau)
  assert np.isfinite(slope).all()
  assert_allclose(value, loss_of(r, members, tau), atol=tolerance)


# Packed batches


@dataclasses.dataclass(frozen=True)
class Text:
  """A text of T tokens: its states, which of them name something, and where it stands."""

  hidden: np.ndarray
  group: int
  positive: bool
  kind: str = "original"
  entity: tuple[int, ...] = (1, 3)
  toxicity: float = 0.0
  logprob: tuple[float, ...] = (-1.0,)


def texts(*sizes: tuple[int, int], seed: int = 0, **how) -> list[Text]:
  """Groups of so many positives and negatives."""
  rng = np.random.default_rng(seed)
  make = lambda g, positive: Text(rng.normal(size=(T, D)), g, positive, "original" if positive else "swap_ent", **how)
  return [make(g, k < p) for g, (p, n) in enumerate(sizes) for k in range(p + n)]


def context(rows: list[list[Text]], spare: int = 0) -> LossContext:
  """Texts packed as given; `spare` unused slots a row and rows of padding, whose states are not numbers."""
  B, S = len(rows) + spare, max(map(len, rows)) + spare
  P = max(sum(len(t.logprob) for t in row) for row in rows)
  segment, entity, answer = np.zeros((B, S * T), int), np.zeros((B, S * T), bool), np.zeros((B, S * T), bool)
  hidden = np.zeros((B, S * T, D), np.float32)
  slots = {name: np.full((B, S), -1) for name in ("role", "group", "polarity", "kind", "row", "pair")}
  toxicity, logprob, score_segment = np.zeros((B, S)), np.zeros((B, P)), np.zeros((B, P), int)
  order = {id(t): n for n, t in enumerate(sorted((t for row in rows for t in row), key=lambda t: t.hidden[0, 0]))}
  for b, row in enumerate(rows):
    p = 0
    for s, t in enumerate(row):
      span = slice(s * T, (s + 1) * T)
      segment[b, span], hidden[b, span], answer[b, span] = s + 1, t.hidden, np.arange(T) > 0
      entity[b, s * T + np.array(t.entity, int)] = True
      slots["role"][b, s] = ROLES.index("retain" if t.positive else "forget")
      slots["group"][b, s], slots["polarity"][b, s], slots["kind"][b, s] = t.group, t.positive, KINDS.index(t.kind)
      slots["row"][b, s], toxicity[b, s] = order[id(t)], t.toxicity
      logprob[b, p : p + len(t.logprob)], score_segment[b, p : p + len(t.logprob)] = t.logprob, s + 1
      p += len(t.logprob)
  ints = jax.tree.map(lambda x: jnp.asarray(x, jnp.int32), slots)
  zeros = jnp.zeros((B, P), jnp.int32)
  batch = Batch(tokens=jnp.asarray(segment), segment=jnp.asarray(segment), position=jnp.asarray(segment),
                score_at=zeros, target=zeros, score_segment=jnp.asarray(score_segment), **ints,
                entity=jnp.asarray(entity), answer=jnp.asarray(answer), toxicity=jnp.asarray(toxicity))  # fmt: skip
  return LossContext(batch, jnp.asarray(logprob, jnp.float32), hidden_BTD=jnp.asarray(hidden))


PARAMS = jax.tree.map(lambda x: 30 * x, init_contrast_head(
  jax.random.key(0), tiny_config(hidden_size=D, mlp_size=8, num_layers=1, num_heads=2, num_kv_heads=1)))  # fmt: skip


def found(ctx: LossContext, temperature=0.5, toxic_weight=1.5, params=PARAMS, **options):
  return contrast(ctx, "retain", temperature, toxic_weight, **{**OPTIONS, **options}, params=params)


def value(ctx: LossContext, **how) -> float:
  return float(found(ctx, **how).metric.value())


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


def same_states(every: list[Text], **changes) -> list[Text]:
  """All alike but for what `changes` says about the text of an index."""
  alike = np.ones((T, D))
  return [dataclasses.replace(t, hidden=alike, **changes.get(str(i), {})) for i, t in enumerate(every)]


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


def test_cross_entropy_of_the_original_the_last_or_all_positives():
  """`row` numbers a group's texts in order; here that is the order of their first state."""
  every = texts((3, 2), (2, 0))
  every = [dataclasses.replace(t, logprob=(-1.0 * (i + 1),) * (i + 1)) for i, t in enumerate(every)]
  ctx = context([every[::2], every[1::2]])
  order = lambda group: sorted((t for t in every if t.group == group and t.positive), key=lambda t: t.hidden[0, 0])
  nll = lambda t: -np.mean(t.logprob)
  of = lambda **how: float(group_ce(ctx, "retain", **{"row": "original", "denominator": "row", **how}).value())
  assert_allclose(of(), np.mean([nll(order(g)[0]) for g in (0, 1)]))
  assert_allclose(of(row="last_positive"), np.mean([nll(order(g)[-1]) for g in (0, 1)]))
  assert_allclose(of(row="all_positives"), np.mean([nll(t) for t in every if t.positive]))


def test_the_published_denominator_counts_every_text_of_the_group():
  every = [dataclasses.replace(t, logprob=(-2.0,) * (i + 1)) for i, t in enumerate(texts((2, 3)))]
  ctx, labels = context([every]), sum(range(1, 6))
  row = group_ce(ctx, "retain", "last_positive", "row").value()
  taught = len(max((t for t in every if t.positive), key=lambda t: t.hidden[0, 0]).logprob)
  assert_allclose(group_ce(ctx, "retain", "last_positive", "batch_all").value(), row * taught / labels, rtol=1e-6)
  objective, _ = parse({"group_ce": {"denominator": "batch_all"}, "contrast": {}})
  assert objective.scored_roles == {"retain", "forget"}
  assert parse({"group_ce": {}, "contrast": {}})[0].scored_roles == {"retain"}


def test_options_are_checked():
  with pytest.raises(UserError, match=r"losses.contrast.empty = `dropp` is not known; did you mean `drop`?"):
    parse({"contrast": {"empty": "dropp"}})
  with pytest.raises(UserError, match=r"losses.contrast.scale = `emma` is not known; did you mean `ema`?"):
    parse({"contrast": {"scale": "emma"}})


# Sentence pairs


def paired(chosen: np.ndarray, others: np.ndarray, logprobs=None, shuffle: bool = False) -> LossContext:
  """Texts of one state each; row i of `chosen` has row i of `others` for its twin."""
  n = len(chosen)
  states, roles = np.concatenate([chosen, others]), np.repeat([1, 0], n)
  pair, group = np.r_[n : 2 * n, 0:n], np.tile(np.arange(n), 2)
  if shuffle:
    order = np.random.default_rng(0).permutation(2 * n)
    states, roles, group, pair = states[order], roles[order], group[order], np.argsort(order)[pair[order]]
  S = 2 * n
  row = lambda x: jnp.asarray(x, jnp.int32).reshape(2, n)
  zeros = jnp.zeros((2, n), jnp.int32)
  segment = row(np.tile(np.arange(1, n + 1), 2))
  batch = Batch(tokens=zeros, segment=segment, position=zeros, score_at=row(np.tile(np.arange(n), 2)), target=zeros,
                score_segment=segment, role=row(roles), pair=row(pair), group=row(group),
                polarity=jnp.full((2, n), -1), row=row(np.arange(S)))  # fmt: skip
  logprob = jnp.zeros((2, n)) if logprobs is None else jnp.asarray(logprobs, jnp.float32).reshape(2, n)
  hidden = jnp.asarray(states, jnp.float32).reshape(2, n, -1)
  return LossContext(batch, logprob, hidden_BTD=hidden, head=Head(jnp.eye(hidden.shape[-1])))


def test_infonce_is_mabels_contrastive_loss():
  case = ORACLE["F_mabel_losses"]
  premises, hypotheses = (
    np.concatenate([case["inputs"][f"{which}_{what}"] for which in ("orig", "aug")]) for what in ("premise", "hyp")
  )
  for shuffle in (False, True):
    loss = infonce(paired(premises, hypotheses, shuffle=shuffle), "retain", case["inputs"]["softmax_temp"], "mean")
    assert_allclose(loss.value(), case["repo"]["cl_loss"], rtol=1e-5)


def test_infonce_and_supcon_of_sentences_that_are_all_alike():
  alike = paired(np.ones((4, D)), np.ones((4, D)))
  assert_allclose(infonce(alike, "retain", 0.05, "mean").value(), np.log(4), rtol=1e-5)
  assert_allclose(supcon(alike, "retain", 0.1, "mean").value(), np.log(2 * 4 - 1), rtol=1e-5)
  ctx = context([same_states(texts((3, 2), (2, 1)))])
  assert_allclose(supcon(ctx, "retain", 0.1, "mean").value(), np.log(8 - 1), rtol=1e-5)


def test_supcon_is_a_loop_over_anchors():
  every = texts((3, 2), (2, 1), (1, 1))
  ctx = context([every[:4], every[4:]])
  for pool, of in (("mean", lambda h: h.mean(0)), ("last", lambda h: h[-1]), ("first", lambda h: h[0])):
    r = np.array([of(t.hidden) for t in every])
    r /= np.linalg.norm(r, axis=1, keepdims=True)
    s, losses = np.exp(r @ r.T / 0.3), []
    for i, anchor in enumerate(every):
      partners = [j for j, t in enumerate(every) if j != i and t.positive and t.group == anchor.group]
      if anchor.positive and partners:
        losses.append(-np.mean([np.log(s[i, j] / (s[i].sum() - s[i, i])) for j in partners]))
    assert_allclose(supcon(ctx, "retain", 0.3, pool).value(), np.mean(losses), rtol=1e-4)


def test_a_pair_alone_or_none_costs_nothing():
  one = paired(np.ones((1, D)), -np.ones((1, D)))
  assert_allclose(infonce(one, "retain", 0.05, "mean").value(), 0.0, atol=1e-6)
  none = dataclasses.replace(one, batch=one.batch.replace(pair=-jnp.ones_like(one.batch.pair)))
  for loss in (lambda c: infonce(c, "retain", 0.05, "mean"), lambda c: clp(c, "retain", "js")):
    of = lambda h, loss=loss: loss(dataclasses.replace(none, hidden_BTD=h)).value()
    found, slope = jax.value_and_grad(of)(none.hidden_BTD)
    assert found == 0.0 and not slope.any()


# Counterfactual logit pairing


def test_jensen_shannon_is_zero_at_equality_symmetric_and_at_most_log_two():
  rng = np.random.default_rng(0)
  a, b = (jnp.asarray(3 * rng.normal(size=(2, 3, D)), jnp.float32) for _ in range(2))
  head = Head(jnp.asarray(rng.normal(size=(7, D)), jnp.float32))
  log = lambda x: jax.nn.log_softmax(x @ head.matrix.T)
  p, q = np.exp(log(a), dtype=np.float64), np.exp(log(b), dtype=np.float64)
  m = (p + q) / 2
  expected = 0.5 * ((p * np.log(p / m)).sum(-1) + (q * np.log(q / m)).sum(-1))
  assert_allclose(js_divergence(a, b, head), expected, rtol=1e-4, atol=1e-6)
  assert_allclose(js_divergence(b, a, head), expected, rtol=1e-4, atol=1e-6)
  assert_allclose(js_divergence(a, a, head), 0.0, atol=1e-6)
  far = 1e3 * jnp.eye(D)[None, :2]
  assert_allclose(js_divergence(far[:, :1], far[:, 1:], Head(jnp.eye(D))), np.log(2), rtol=1e-6)


def test_the_gradient_of_jensen_shannon_reaches_both_twins_and_the_head():
  rng = np.random.default_rng(1)
  point = tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, 3, D), (2, 3, D), (7, D)))
  of = lambda at: (js_divergence(at[0], at[1], Head(at[2])) * jnp.arange(6.0).reshape(2, 3)).sum()

  def dense(at):
    log_p, log_q = (jax.nn.log_softmax(at[i] @ at[2].T) for i in (0, 1))
    log_m = jnp.logaddexp(log_p, log_q) - jnp.log(2.0)
    js = 0.5 * (jnp.exp(log_p) * (log_p - log_m) + jnp.exp(log_q) * (log_q - log_m)).sum(-1)
    return (js * jnp.arange(6.0).reshape(2, 3)).sum()

  for ours, plain in zip(jax.grad(of)(point), jax.grad(dense)(point), strict=True):
    assert_allclose(ours, plain, rtol=1e-4, atol=1e-5)


def test_log_odds_of_twins():
  ctx = paired(np.ones((3, D)), np.ones((3, D)), logprobs=[-1.0, -2.0, -3.0, -2.0, -2.0, -7.0])
  assert_allclose(clp(ctx, "retain", "log_odds").value(), (1 + 0 + 16) / 3, rtol=1e-6)


def test_positions_are_paired_from_the_end_of_the_answer():
  """Twins whose answers are one token apart in length: what follows the exchanged word is compared, word by word."""
  score_segment = jnp.array([[1, 1, 1, 2, 2, 2, 2, 0]])
  batch = Batch(tokens=None, segment=None, position=None, score_at=None, target=jnp.zeros((1, 8), jnp.int32),
                score_segment=score_segment, role=jnp.array([[1, 0]]), pair=jnp.array([[1, 0]]))  # fmt: skip
  both = jnp.ones((1, 2), bool)
  at, there = twin_positions(batch, both)
  assert_array_equal(there, [[1, 1, 1, 0, 1, 1, 1, 0]])
  assert_array_equal(at[0][np.asarray(there[0])], [4, 5, 6, 0, 1, 2])
  assert_array_equal(twin_positions(batch, batch.role == 1)[1], [[1, 1, 1, 0, 0, 0, 0, 0]])


def test_logit_pairing_reads_twins_across_packed_rows():
  rng = np.random.default_rng(2)
  a, b = rng.normal(size=(2, 3, D))
  plain = np.mean(js_divergence(jnp.asarray(a[None], jnp.float32), jnp.asarray(b[None], jnp.float32), Head(jnp.eye(D))))
  for shuffle in (False, True):
    assert_allclose(clp(paired(a, b, shuffle=shuffle), "retain", "js").value(), plain, rtol=1e-5)
  same = paired(a, a)
  value, slope = jax.value_and_grad(lambda h: clp(dataclasses.replace(same, hidden_BTD=h), "retain", "js").value())(
    same.hidden_BTD)  # fmt: skip
  assert_allclose(value, 0.0, atol=1e-6)
  assert_allclose(slope, 0.0, atol=1e-6)


# Gradients of the losses on pairs


@pytest.mark.parametrize("name,settings", [
  ("infonce", {}), ("infonce", {"pool": "last"}), ("supcon", {}), ("clp", {"form": "js"}),
  ("clp", {"form": "log_odds"}), ("group_ce", {}), ("group_ce", {"denominator": "batch_all"}),
])  # fmt: skip
def test_gradients_on_pairs_are_the_finite_differences(name, settings):
  rng = np.random.default_rng(7)
  ctx = paired(*rng.normal(size=(2, 4, D)), logprobs=-rng.exponential(size=8))
  loss = LOSSES[name]
  options = {option: choices[0] for option, choices in loss.options.items()} | settings

  def of(at):
    moved = dataclasses.replace(ctx, hidden_BTD=at[0], logprob_BP=at[1], head=Head(at[2]))
    return loss.function(moved, "retain", **loss.coefficients | ({"temperature": 0.5} if loss.coefficients else {}),
                         **options).value()  # fmt: skip

  point = (ctx.hidden_BTD, ctx.logprob_BP, ctx.head.matrix)
  slope = jax.grad(of)(point)
  direction = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), point)
  step = jax.jit(lambda h: of(jax.tree.map(lambda x, d: x + h * d, point, direction)))
  along = sum(jax.tree.leaves(jax.tree.map(jnp.vdot, slope, direction)))
  assert abs(along) > 1e-3
  assert_allclose((step(5e-3) - step(-5e-3)) / 1e-2, along, rtol=5e-3, atol=1e-4)
