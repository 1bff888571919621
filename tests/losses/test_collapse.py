"""NC3 and its published form: the shipped code's numbers, closed forms, gradients, and what thin statistics do."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from jaxbias.data.tokens import Tokenizer, tokenizer_of_metadata
from jaxbias.data.wordlists import classes, read_words
from jaxbias.errors import UserError
from jaxbias.losses.collapse import PUBLISHED, class_sums, init_statistics, nc3, occurrences, spread
from jaxbias.losses.context import LossContext
from jaxbias.losses.registry import LOSSES, evaluate, parse
from jaxbias.models.transformer import Head
from jaxbias.types import Batch
from tests.conftest import BYTE_LEVEL
from tests.models import tiny_config

pytestmark = pytest.mark.usefixtures("quick_compilation")
ORACLE = json.loads((Path(__file__).parents[1] / "oracles" / "nc_oracle.json").read_text())
FULL = ("A_three_classes_full", "A2_four_classes_full_even_triu", "A3_five_classes_full_odd_triu")
OPTIONS = {name: choices[0] for name, choices in LOSSES["nc3"].options.items()}
NUMBERS = {"decay": 0.9, "reset_every": 0.0, "min_count": 1.0}
MLM = {"shift": "0"}  # the oracle's samples are pairs of a feature and its label


def context(tokens, x, w, segment=None, role=1) -> LossContext:
  """Rows of tokens with a feature each; all of one role."""
  tokens, x = np.atleast_2d(tokens), jnp.asarray(x, jnp.float32)
  x = x if x.ndim == 3 else x[None]
  segment = np.ones_like(tokens) if segment is None else np.atleast_2d(segment)
  ints = lambda a: jnp.asarray(a, jnp.int32)
  batch = Batch(tokens=ints(tokens), segment=ints(segment), position=None, score_at=None, target=None,
                score_segment=None, role=jnp.full((len(tokens), max(segment.max(), 1)), role))  # fmt: skip
  return LossContext(batch, None, hidden_BTD=x, captures={"stack_out": x}, head=Head(jnp.asarray(w, jnp.float32)))


def empty(ids, D: int) -> dict:
  ids = jnp.asarray(ids, jnp.int32).reshape(len(ids), -1)
  return {"ids": ids, "counts": jnp.zeros(len(ids), jnp.int32), "sums": jnp.zeros((len(ids), D)), "step": jnp.int32(0)}


def found(ctx: LossContext, aux: dict, **settings):
  numbers = {k: settings.pop(k, v) for k, v in NUMBERS.items()}
  return nc3(ctx, "retain", **numbers, **{**OPTIONS, **settings}, aux=aux)


def of_weights(ctx: LossContext, aux: dict, **settings):
  """Loss and gradient by the head."""
  of = lambda w: found(dataclasses.replace(ctx, head=Head(w)), aux, **settings).metric.value()
  return jax.value_and_grad(of)(ctx.head.matrix)


# The shipped code's numbers


@pytest.mark.parametrize("case", FULL)
def test_similarity_spread_and_gradient_are_the_shipped_codes(case):
  inputs, repo = ORACLE[case]["inputs"], ORACLE[case]["repo"]
  ctx, aux = context(inputs["Y"], inputs["X"], inputs["W"]), empty(range(inputs["C"]), inputs["D"])
  out = found(ctx, aux, **PUBLISHED | MLM)
  assert_array_equal(out.aux["counts"], repo["counts"])
  assert_allclose(out.aux["sums"], repo["totals"], atol=1e-5)
  assert_allclose(out.metric.value(), repo["unc3_loss"], atol=1e-5)
  assert_allclose(out.notes["similarity"].value(), repo["similarity_mean_NC3"], atol=1e-5)
  assert_allclose(out.notes["spread"].value(), repo["similarity_std_UNC3_loss"], atol=1e-5)
  cov = found(ctx, aux, **PUBLISHED | MLM | {"form": "cov"}).metric.value()
  assert_allclose(cov, repo["similarity_cov_std_over_mean"], rtol=1e-5)
  _, slope = of_weights(ctx, aux, **PUBLISHED | MLM)
  assert_allclose(slope, repo["unc3_grad_wrt_W"], atol=1e-5)
  assert_allclose((slope * ctx.head.matrix).sum(-1), 0.0, atol=1e-6)  # the norms of the rows stay, to first order
  s, n = np.array(repo["similarity"]), inputs["C"]
  norm2 = ((s - s.mean()) ** 2 * (1 - s**2) / (np.array(inputs["W"]) ** 2).sum(-1)).sum()
  assert_allclose(jnp.linalg.norm(slope), np.sqrt(norm2) / ((n - 1) * repo["unc3_loss"]), rtol=1e-5)
  if case == FULL[0]:
    assert_allclose(jnp.linalg.norm(slope), 0.161350, atol=1e-5)


def test_three_steps_of_the_regulariser_are_the_shipped_codes():
  """A class unseen until the third step; totals of the whole run, features without gradient, plain SGD."""
  case = ORACLE["B_streaming_regulariser"]
  inputs = case["inputs"]
  w, aux = jnp.asarray(inputs["W0"], jnp.float32), empty(inputs["S"], inputs["D"])
  for step in case["steps"]:
    ctx = context(step["Y"], step["X"], w)
    loss, slope = of_weights(ctx, aux, **PUBLISHED | MLM)
    assert_allclose(w, step["W_before"], atol=1e-5)
    assert_allclose(loss, step["loss_nc3"], atol=1e-5)
    assert_allclose(inputs["lambda_"] * slope, step["grad_W"], atol=1e-5)
    aux = found(ctx, aux, **PUBLISHED | MLM).aux
    assert_array_equal(aux["counts"], np.array(step["counts"])[inputs["S"]])
    w = w - inputs["lr"] * inputs["lambda_"] * slope
    assert_allclose(w, step["W_after_sgd"], atol=1e-5)
  assert_allclose([s["loss_nc3"] for s in case["steps"]], [0.1101313, 0.3377869, 0.2205317], atol=1e-6)
  assert int(aux["step"]) == 3


def test_states_one_before_the_word_are_the_shipped_codes():
  case = ORACLE["C_shift_by_one_alignment"]
  ids, mask, x = (np.array(case["inputs"][key]) for key in ("ids", "mask", "embeds"))
  labels, features = np.array(case["repo"]["Y"]), np.array(case["repo"]["X"])
  names = np.unique(labels)
  ctx = context(ids, x, np.eye(2), segment=mask)
  pieces = jnp.asarray(names, jnp.int32)[:, None]
  keep = ctx.within("retain", ctx.batch.segment)
  hits = occurrences(ctx.batch.tokens, ctx.batch.segment, keep, pieces, shift=1)
  counts, sums = class_sums(hits, ctx.hidden_BTD, pieces, shift=1)
  assert_array_equal(counts, [(labels == c).sum() for c in names])
  assert_allclose(sums, [features[labels == c].sum(0) for c in names], atol=1e-5)


def test_a_simplex_is_aligned():
  case = ORACLE["D_simplex_etf"]
  inputs = case["inputs"]
  ctx, aux = context(inputs["Y"], inputs["X"], inputs["W"]), empty(range(4), inputs["D"])
  out = found(ctx, aux, **MLM)
  assert_allclose([out.notes["similarity"].value(), out.notes["spread"].value()], [1.0, 0.0], atol=1e-5)
  for form, choices in [(form, OPTIONS | {"form": form}) for form in LOSSES["nc3"].options["form"]]:
    assert_allclose(found(ctx, aux, **choices | MLM).metric.value(), 0.0, atol=1e-5, err_msg=form)


def test_counts_of_many_tokens_do_not_wrap():
  case = ORACLE["E_numerics"]["int8_overflow"]
  n = case["true_count"]
  out = found(context(np.zeros(n, int), np.ones((n, 2)), np.ones((3, 2))), empty(range(3), 2), **MLM)
  assert out.aux["counts"][0] == n == 200 and out.aux["counts"].dtype == jnp.int32


def test_no_spread_is_a_gradient_of_zero():
  case = ORACLE["E_numerics"]["zero_std"]
  loss, slope = jax.value_and_grad(spread)(jnp.full(2, 0.5), jnp.array([True, True]))
  assert loss == case["loss"] and not slope.any()
  ctx = context([0, 1], [[1.0, 0], [-1, 0]], [[0, 1.0], [0, 1]])
  loss, slope = of_weights(ctx, empty([0, 1], 2), **PUBLISHED | MLM)
  assert_allclose(loss, case["loss"], atol=1e-6)
  assert_array_equal(slope, case["grad"])


def test_what_leaves_the_spread_alone():
  case = ORACLE["E_numerics"]["affine_invariance_of_loss"]
  x, w, y = (np.array(case[key]) for key in ("X", "W", "Y"))
  D = x.shape[1]
  of = lambda x, w: found(context(y, x, w), empty(range(len(w)), D), **PUBLISHED | MLM).metric.value()
  rng = np.random.default_rng(0)
  turn = np.linalg.qr(rng.normal(size=(D, D)))[0]
  for other in (of(x, w), of(x + 3.0, w), of(2.5 * x, w), of(x, w * rng.uniform(0.5, 2, (len(w), 1))),
                of(x @ turn, w @ turn)):  # fmt: skip
    assert_allclose(other, case["base"], atol=1e-5)
  assert abs(of(x, w + 1.0) - case["base"]) > 0.01


def test_spread_is_lowest_where_all_are_alike_alignment_where_all_are_high():
  """Aligned, at right angles and opposite: all perfect for the published form, told apart by the default."""
  x, y = np.array([[1.0, 0, 0], [-1, 0, 0]]), [0, 1]
  weights = {"aligned": x, "orthogonal": x[:, [1, 0, 2]], "anti": -x}
  recorded = ORACLE["E_numerics"]["degenerate_minima"]
  for name, expected in (("aligned", 0.0), ("orthogonal", 1.0), ("anti", 4.0)):
    of = lambda name=name, **how: found(context(y, x, weights[name]), empty([0, 1], 3), **MLM | how)
    assert_allclose(of(**PUBLISHED | MLM).metric.value(), 0.0, atol=1e-5)
    assert_allclose(of().notes["similarity"].value(), np.mean(recorded[name]), atol=1e-5)
    assert_allclose(of().metric.value(), expected, atol=1e-5)
    assert_allclose(of(form="one_minus_mean").metric.value(), 1 - np.mean(recorded[name]), atol=1e-5)


# Gradients


def random_case(seed: int = 0, n: int = 24, C: int = 4, D: int = 6):
  rng = np.random.default_rng(seed)
  return context(rng.integers(0, C + 1, n), rng.normal(size=(n, D)), rng.normal(size=(C + 1, D))), empty(range(C), D)


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


# Words


def pooled_by_hand(tokens, x, word, shift):
  n = len(word)
  at = [t for t in range(len(tokens) - n + 1) if tuple(tokens[t : t + n]) == word and t >= shift]
  return len(at), sum((x[t - shift : t - shift + n].mean(0) for t in at), np.zeros(x.shape[1]))


@pytest.mark.parametrize("shift", [0, 1])
def test_a_word_of_several_pieces_is_their_mean_and_never_a_part(shift):
  rng = np.random.default_rng(3)
  tokens, x = rng.integers(0, 3, 60), rng.normal(size=(60, 4))
  words = [(0,), (1, 2), (2, 1, 0)]
  ids = jnp.asarray([[*word, *[-1] * (3 - len(word))] for word in words], jnp.int32)
  ctx = context(tokens, x, np.eye(3, 4))
  hits = occurrences(ctx.batch.tokens, ctx.batch.segment, jnp.ones((1, 60), bool), ids, shift)
  counts, sums = class_sums(hits, ctx.hidden_BTD, ids, shift)
  for c, word in enumerate(words):
    count, total = pooled_by_hand(tokens, x, word, shift)
    assert count > 0 and counts[c] == count
    assert_allclose(sums[c], total, atol=1e-5)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
  metadata = {f"tokenizer.ggml.{key}": value for key, value in BYTE_LEVEL.items()}
  backend = tokenizer_of_metadata(metadata, "tiny")
  return Tokenizer(backend, 1, 2, 2, len(BYTE_LEVEL["tokens"]), "")


def test_classes_of_a_word_list(tokenizer):
  """`the` and `cat` are tokens, behind a space, too; `cab` begins with `ca`."""
  assert classes(["the", "cat", "cats"], tokenizer, "single").shape == (2, 1)
  first = classes(["cat", "cats"], tokenizer, "first")
  assert first.shape == (1, 1) and tokenizer.decode(first[0]) == " cat"
  pooled = classes(["cat", "cats", "cat"], tokenizer, "pooled")
  assert pooled.shape == (2, 2) and sorted(pooled[:, 1])[0] == -1
  with pytest.raises(UserError, match="none of the 1 words is one token"):
    classes(["xyz"], tokenizer, "single")


def test_word_files(tmp_path):
  gender = read_words("gender")
  assert len(gender) == len(set(gender)) >= 75 and {"she", "he"} < set(gender)
  (tmp_path / "w.txt").write_text("# title\nb\n\na\nb\n")
  (tmp_path / "w.json").write_text(json.dumps({"female": {"she": 2016}, "male": ["he"], "other": {"x": "they"}}))
  assert read_words(str(tmp_path / "w.txt")) == ("a", "b")
  assert read_words(str(tmp_path / "w.json")) == ("he", "she", "they")
  (tmp_path / "none.txt").write_text("\n")
  for name, message in (("none.txt", "holds no words"), ("missing.txt", "there is no such file")):
    with pytest.raises(UserError, match=message):
      read_words(str(tmp_path / name))


def test_the_list_travels_as_data(tokenizer, tmp_path):
  """Two lists of one size, one program."""
  (tmp_path / "one.txt").write_text("the\ncat\n")
  config = tiny_config(vocab_size=300, hidden_size=6)
  objective, coefficients = parse({"nc3": {"words": str(tmp_path / "one.txt")}})
  aux = objective.init_aux(config, tokenizer)
  assert aux["nc3"]["ids"].shape == (2, 1) and aux["nc3"]["sums"].shape == (2, 6)
  rng, traces = np.random.default_rng(0), []
  ctx = context(rng.integers(0, 300, 50), rng.normal(size=(50, 6)), rng.normal(size=(300, 6)))

  @jax.jit
  def run(aux):
    traces.append(1)
    out = evaluate(objective, ctx, coefficients, {}, aux)
    return out.total, out.aux

  for ids in ([[7], [9]], [[1], [2]]):
    _, new = run({"nc3": aux["nc3"] | {"ids": jnp.asarray(ids, jnp.int32)}})
    assert_array_equal(new["nc3"]["ids"], ids)
  assert len(traces) == 1
  wide = tiny_config(hidden_size=6, embedding_size=4)
  with pytest.raises(UserError, match="use site = head_input"):
    init_statistics(wide, None, OPTIONS | {"site": "stack_out"})
