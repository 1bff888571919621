"""What MABEL, ADEPT and ASE train: gradients, closed forms, layouts, thin batches. tests/losses/oracles/collapse.py has
the published codes' numbers."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from jaxbias import methods
from jaxbias.data.pipeline import Shape
from jaxbias.data.rows import Group, Member, Split
from jaxbias.data.tokens import Tokenizer, tokenizer_of_metadata
from jaxbias.errors import UserError
from jaxbias.losses.context import LossContext
from jaxbias.losses.registry import LOSSES, evaluate, parse
from jaxbias.methods.recipes import Recipe, Row
from jaxbias.train.batches import Sampler, tokenise
from jaxbias.types import ROLES
from tests.conftest import BYTE_LEVEL
from tests.losses import debiased
from tests.losses.debiased import FEMALE, MALE, NEUTRAL, OTHER, entailments, found, statistics, value, worded
from tests.models import tiny_config

FORMS = [(name, {}) for name in (*debiased.SENTENCES, *debiased.WORDS)] + [
  ("mabel_alignment", {"over": "rows"}), ("adept", {"unit": "bits"}), ("ase_orthogonal", {"form": "square"}),
  ("ase_orthogonal", {"over": "sum"}), ("ase_orthogonal", {"site": "stack_out"}),
]  # fmt: skip
EVERY = pytest.mark.parametrize("name,settings", FORMS, ids=lambda x: x if isinstance(x, str) else "-".join(x.values()))
TOKENS = [[MALE, NEUTRAL, OTHER, FEMALE, NEUTRAL, MALE, OTHER, NEUTRAL, FEMALE],
          [NEUTRAL, OTHER, MALE, NEUTRAL, FEMALE, FEMALE, NEUTRAL, OTHER, NEUTRAL]]  # fmt: skip
L, D = 2, 4
NUMBERS = {"mabel_contrast": {"temperature": 0.5}, "mabel_alignment": {"temperature": 0.5}, "adept": {"rho": 1.0}}


def made_up(name: str, seed: int = 0):
  """A batch for `name`, and statistics of an earlier step where it keeps any."""
  rng = np.random.default_rng(seed)
  if name in debiased.SENTENCES:
    return entailments(rng.normal(size=(4, 3, D))), None
  states = rng.normal(size=(L, 2, 9, D))
  aux = statistics(rng.normal(size=(2, L * D if name == "adept" else D)), [2, 3]) if LOSSES[name].init_aux else None
  return worded(TOKENS, states, ref=rng.normal(size=states.shape)), aux


def states_of(ctx) -> jax.Array:
  return ctx.captures.get("residual_out", ctx.hidden_BTD)


@EVERY
def test_the_gradient_is_the_finite_difference(name, settings):
  """With the attributes' means held, as they are of many steps: those of this one's words give no gradient."""
  ctx, aux = made_up(name)
  settings = NUMBERS.get(name, {}) | settings
  if aux:
    tokens = jnp.where(ctx.batch.tokens == NEUTRAL, NEUTRAL, OTHER)
    ctx = dataclasses.replace(ctx, batch=ctx.batch.replace(tokens=tokens))
  rng, point = np.random.default_rng(1), states_of(ctx)
  of = jax.jit(jax.value_and_grad(lambda x: value(name, debiased.with_states(ctx, x), aux, **settings)))
  direction = jnp.asarray(rng.normal(size=point.shape), jnp.float32)
  along = jnp.vdot(of(point)[1], direction)
  ahead, behind = (of(point + sign * 3e-3 * direction)[0] for sign in (1, -1))
  assert abs(along) > 1e-2
  assert_allclose((ahead - behind) / 6e-3, along, rtol=1e-2, atol=1e-4)


@EVERY
def test_packing_order_and_padding_change_nothing(name, settings):
  ctx, aux = made_up(name)
  settings = NUMBERS.get(name, {}) | settings
  plain = found(name, ctx, aux, **settings)
  assert plain.metric.weight > 0 and plain.metric.value() > 0
  for other in layouts(name, ctx):
    out = found(name, other, aux, **settings)
    jax.tree.map(lambda x, y: assert_allclose(x, y, rtol=2e-5, atol=1e-6), out, plain)
    slope = jax.grad(lambda x, c=other: value(name, debiased.with_states(c, x), aux, **settings))(states_of(other))
    assert np.isfinite(slope).all()


def layouts(name: str, ctx) -> list:
  if name in debiased.SENTENCES:
    states = np.asarray(ctx.hidden_BTD).reshape(4, 3, D)
    shuffled = np.random.default_rng(0).permutation(12)
    return [entailments(states, shuffled, rows) for rows in (1, 3)]
  x, ref = np.asarray(states_of(ctx)), np.asarray(ctx.base_captures["residual_out"])
  b = ctx.batch
  one_row = lambda x: np.concatenate([x[:, 1:], x[:, :1]], 2)
  segment = np.repeat([[1, 2]], 9, axis=1)
  pad = lambda x, fill: np.pad(x, [(0, 0), (0, 1), (0, 3), (0, 0)], constant_values=fill)
  padded = np.pad(np.ones((2, 9), int), [(0, 1), (0, 3)])
  return [worded(one_row(np.asarray(b.tokens)[None, ..., None])[0, ..., 0], one_row(x), one_row(ref), segment),
          worded(pad(np.asarray(b.tokens)[None, ..., None], NEUTRAL)[0, ..., 0], pad(x, np.nan), pad(ref, np.nan),
                 padded)]  # fmt: skip


@EVERY
def test_other_roles_are_not_read_and_nothing_to_read_costs_nothing(name, settings):
  ctx, _ = made_up(name)
  other = jnp.full_like(ctx.batch.role, ROLES.index("general"))
  ctx = dataclasses.replace(ctx, batch=ctx.batch.replace(role=other))
  of = lambda x: value(name, debiased.with_states(ctx, x), **settings)
  loss, slope = jax.value_and_grad(of)(states_of(ctx))
  assert loss == 0.0 and not slope.any() and found(name, ctx, **settings).metric.weight == 0


# MABEL


def test_what_is_as_near_as_its_counterfactual_is_aligned():
  rng = np.random.default_rng(0)
  texts = rng.normal(size=(2, 3, D))
  turned = texts @ np.linalg.qr(rng.normal(size=(D, D)))[0]  # all cosines stay
  same = entailments(np.concatenate([texts, turned]))
  assert_allclose(value("mabel_alignment", same), 0.0, atol=1e-6)
  assert value("mabel_alignment", entailments(np.concatenate([texts, -turned[:1], turned[1:]]))) > 1.0


def test_the_published_alignment_grows_with_the_batch_and_ours_does_not():
  states = np.random.default_rng(0).normal(size=(4, 3, D))
  twice = np.concatenate([states, states], axis=1)
  of = lambda x, over: value("mabel_alignment", entailments(x), over=over)
  assert_allclose(of(twice, "pairs"), of(states, "pairs"), rtol=1e-5)
  assert_allclose([of(states, "rows"), of(twice, "rows")], of(states, "pairs") * np.array([3, 6]), rtol=1e-5)


def test_sentences_that_are_all_alike_cost_the_logarithm_of_their_number():
  assert_allclose(value("mabel_contrast", entailments(np.ones((4, 3, D)))), np.log(6), rtol=1e-6)


def test_pairs_without_a_second_pair_in_their_group_are_aligned_with_each_other():
  """Counterfactual pairs as the built-in triples are: there is no hypothesis to be found, but similarities to keep."""
  states = np.random.default_rng(0).normal(size=(4, 3, D))
  ctx = entailments(states)
  pairs = ctx.batch.replace(group=jnp.asarray(np.tile(np.arange(6), 2)[None], jnp.int32))
  ctx = dataclasses.replace(ctx, batch=pairs)
  assert found("mabel_contrast", ctx).metric.weight == 0
  r = states.reshape(2, 6, D) / np.linalg.norm(states.reshape(2, 6, D), axis=-1, keepdims=True)
  near, near_twins = (x @ x.T / 0.05 for x in r)
  assert_allclose(value("mabel_alignment", ctx), ((near - near_twins) ** 2).mean(), rtol=1e-5)


def test_pairs_without_a_second_pair_are_not_what_hypotheses_are_found_among():
  states = np.random.default_rng(0).normal(size=(4, 3, D))
  ctx = entailments(states)
  parted = ctx.batch.replace(group=ctx.batch.group.at[0, jnp.array([5, 11])].set(9))  # the last text's hypotheses
  found_among_two = value("mabel_contrast", dataclasses.replace(ctx, batch=parted))
  assert_allclose(found_among_two, value("mabel_contrast", entailments(states[:, :2])), rtol=1e-5)
  assert abs(found_among_two - value("mabel_contrast", ctx)) > 1e-3


# ADEPT and ASE


def test_neutral_words_between_the_attributes_cost_nothing():
  """Male at +1, female at -1 along the first axis of every block; neutral words have no part along it."""
  axis = np.eye(D)[0]
  x = np.random.default_rng(0).normal(size=(L, 2, 9, D)) * (1 - axis)
  ctx = worded(np.full((2, 9), NEUTRAL), x)
  ends = lambda n: statistics(np.outer([1, -1], np.tile(axis, n)))
  assert_allclose(value("adept", ctx, ends(L), rho=1.0), 0.0, atol=1e-6)
  assert_allclose(value("ase_orthogonal", ctx, ends(1)), 0.0, atol=1e-6)
  leaning = worded(np.full((2, 9), NEUTRAL), x + 0.5 * axis * np.arange(9)[:, None])
  assert value("adept", leaning, ends(L), rho=1.0) > 0.01 and value("ase_orthogonal", leaning, ends(1)) > 0.1


def test_distances_that_are_far_apart_are_at_most_a_bit():
  x = np.array([[[[10.0, 0, 0, 0], [-10, 0, 0, 0]]]])
  ctx, ends = worded([[NEUTRAL, NEUTRAL]], x), statistics([[10.0, 0, 0, 0], [-10, 0, 0, 0]])
  assert_allclose(value("adept", ctx, ends, rho=1.0), np.log(2), rtol=1e-6)
  out = found("adept", ctx, ends, rho=1.0, unit="bits")
  assert_allclose([out.metric.value(), out.notes["perplexity"].value(), out.notes["neutral_words"].value()], [1, 1, 2])
  assert_allclose(found("adept", ctx, ends, rho=1e4).notes["perplexity"].value(), 2.0, rtol=1e-5)


def test_attributes_are_running_means_of_their_words_without_a_gradient():
  ctx, _ = made_up("ase_orthogonal")
  out = found("ase_orthogonal", ctx, totals="cumulative")
  x, tokens = np.asarray(ctx.hidden_BTD), np.asarray(ctx.batch.tokens)
  assert_allclose(out.aux["sums"], [x[tokens == word].sum(0) for word in (MALE, FEMALE)], rtol=1e-5)
  assert_array_equal(out.aux["counts"], [(tokens == word).sum() for word in (MALE, FEMALE)])
  g = np.subtract(*(x[tokens == word].mean(0) for word in (MALE, FEMALE)))
  along = x[tokens == NEUTRAL] @ g / np.linalg.norm(g)
  assert_allclose(out.metric.value(), np.abs(along).mean(), rtol=1e-5)
  slope = jax.grad(lambda h: value("ase_orthogonal", dataclasses.replace(ctx, hidden_BTD=h)))(ctx.hidden_BTD)
  assert slope[tokens == NEUTRAL].any() and not slope[tokens != NEUTRAL].any()
  again = found("ase_orthogonal", ctx, out.aux, totals="cumulative")
  assert_allclose(again.aux["sums"], 2 * out.aux["sums"], rtol=1e-6)
  assert int(again.aux["step"]) == 2


@pytest.mark.parametrize("name", ["adept", "ase_orthogonal"])
@pytest.mark.parametrize("tokens", [[MALE, NEUTRAL, NEUTRAL], [MALE, FEMALE, OTHER]], ids=["one side", "no neutral"])
def test_a_list_that_is_not_seen_costs_nothing(name, tokens):
  ctx = worded([tokens], np.random.default_rng(0).normal(size=(L, 1, 3, D)))
  of = lambda x: value(name, debiased.with_states(ctx, x))
  loss, slope = jax.value_and_grad(of)(states_of(ctx))
  assert loss == 0.0 and not slope.any() and found(name, ctx).metric.weight == 0


# Word lists and real batches


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
  metadata = {f"tokenizer.ggml.{key}": value for key, value in BYTE_LEVEL.items()}
  return Tokenizer(tokenizer_of_metadata(metadata, "tiny"), 1, 2, 2, len(BYTE_LEVEL["tokens"]), "")


def test_word_lists_become_tokens(tokenizer, tmp_path):
  """A word of both attributes is in neither; a neutral word that is an attribute's is not neutral."""
  (tmp_path / "a.json").write_text(json.dumps({"one": ["the", "cat"], "other": ["a", "cat"]}))
  (tmp_path / "n.txt").write_text("the\n12\nb\n")
  lists = {"attributes": str(tmp_path / "a.json"), "neutral": str(tmp_path / "n.txt"), "pieces": "first"}
  config = tiny_config(vocab_size=300, hidden_size=8, num_layers=3)
  aux = parse({"adept": lists, "ase_orthogonal": lists})[0].init_aux(config, tokenizer)
  the, a, b = (tokenizer.encode(f"b {word}")[1] for word in ("the", "a", "b"))
  assert [sorted(set(row) - {-1}) for row in aux["adept"]["attribute"].tolist()] == [[the], [a]]
  assert the not in aux["adept"]["neutral"] and b in aux["adept"]["neutral"]
  assert aux["adept"]["sums"].shape == (2, 24) and aux["ase_orthogonal"]["sums"].shape == (2, 8)
  with pytest.raises(UserError, match="n.txt` is one group of words, attributes are at least two; give a .json"):
    parse({"adept": lists | {"attributes": lists["neutral"]}})[0].init_aux(config, tokenizer)
  (tmp_path / "a.json").write_text(json.dumps({"one": ["the"], "other": ["the"]}))
  with pytest.raises(UserError, match="no word of `one` has a token of its own"):
    parse({"adept": lists})[0].init_aux(config, tokenizer)
  (tmp_path / "a.json").write_text(json.dumps({"one": ["the"], "other": ["b"]}))
  (tmp_path / "n.txt").write_text("the\nb\n")
  with pytest.raises(UserError, match="no word of `neutral` has a token of its own"):
    parse({"ase_orthogonal": lists})[0].init_aux(config, tokenizer)


def test_a_batch_of_counterfactual_pairs_feeds_all_of_them(tokenizer):
  """Through the pipeline that a run reads: paired rows, packed, with twins, groups and segments."""
  texts = ("the cat 1", "a cat 2", "12 the", "cat a the")  # a last token is predicted and never read
  rows = lambda side, start: tuple(Row(f"{side}{i}", start + text, 0) for i, text in enumerate(texts))
  losses = {name: {} for name in (*debiased.SENTENCES, *debiased.WORDS)}
  objective, coefficients = parse(losses)
  assert objective.roles == {"retain", "forget"} and not objective.scored_roles
  made = tokenise(Recipe(rows("f", "a "), rows("r", "the "), (), paired=True), objective, tokenizer, 64)
  batch, _ = Sampler(made, objective, {"retain": 4, "forget": 4}, None, 0, 1).batch(0, Shape(1, 16, 1, 1, 1))
  rng = np.random.default_rng(0)
  states = rng.normal(size=(L, *batch.tokens.shape, D)).astype(np.float32)
  ctx = dataclasses.replace(worded(batch.tokens, states, ref=0 * states), batch=jax.tree.map(jnp.asarray, batch))
  words = {name: tokenizer.encode(f"b {name}")[1] for name in ("the", "a", "cat")}
  aux = lambda width: statistics(np.zeros((2, width)), [0, 0]) | {
    "attribute": jnp.asarray([[words["the"]], [words["a"]]]), "neutral": jnp.asarray([words["cat"]])}
  out = evaluate(objective, ctx, coefficients, {}, {"adept": aux(L * D), "ase_orthogonal": aux(D)})
  assert np.isfinite(out.total)
  assert {name for name, part in out.parts.items() if part.weight > 0} == set(losses) - {"mabel_contrast"}


def test_entailments_and_their_twins_feed_mabel(tokenizer):
  """The method's own texts: swapped where a group brings no twins, whole groups a step, one without gender left out."""
  text = lambda name, words: Member(name, words, "original")
  groups = (
    Group("a", "", (text("a1", "the man 1 a"), text("a2", "he 12 a")), ()),
    Group("b", "", (text("b1", "a hat 2"), text("b2", "the cat 2")), ()),
    Group("c", "", (text("c1", "her cat 1"), text("c2", "she a 12")), (text("c3", "his cat 1"), text("c4", "he a 12"))),
  )
  split = Split((), (), groups)
  recipe = methods.recipe("mabel", {})(split, 0)
  assert recipe.paired and [row.text for row in recipe.retain] == ["the man 1 a", "he 12 a", "her cat 1", "she a 12"]
  assert [row.text for row in recipe.forget] == ["the woman 1 a", "she 12 a", "his cat 1", "he a 12"]
  objective, coefficients = parse(methods.get("mabel").losses)
  made = tokenise(recipe, objective, tokenizer, 64)
  counts = {"groups": 2, "positives": 1, "negatives": 1, "retain": 1}
  batch, ids = Sampler(made, objective, counts, None, 0, 1).batch(0, Shape(1, 16, 1, 1, 1))
  assert len(ids) == 8  # a premise without its hypothesis says nothing
  states = np.random.default_rng(0).normal(size=(*batch.tokens.shape, D)).astype(np.float32)
  ctx = LossContext(jax.tree.map(jnp.asarray, batch), None, hidden_BTD=jnp.asarray(states))
  weights = [found(name, ctx).metric.weight for name in debiased.SENTENCES]
  assert weights == [4, 4]  # two premises and their twins; each premise with each hypothesis
  with pytest.raises(UserError, match="group `a` of data.groups has 1 positives"):
    methods.recipe("mabel", {})(Split((), (), (dataclasses.replace(groups[0], positives=groups[0].positives[:1]),)), 0)
  with pytest.raises(UserError, match="no entailment .* has a gendered word"):
    methods.recipe("mabel", {})(Split((), (), groups[1:2]), 0)
  with pytest.raises(UserError, match="data.groups, which is empty"):
    methods.recipe("mabel", {})(Split((), ()), 0)
