"""Labels of states, and class statistics that do not depend on batches, their order, or how they are merged."""

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
from jaxbias.errors import UserError
from jaxbias.evals import class_labels
from jaxbias.evals.class_geometry import of_weights
from jaxbias.evals.class_labels import NONE, Classes, Finder, Text, sampled, shifted
from jaxbias.evals.class_statistics import Moments, Sum, add, deviate, merge, pooled, sites_of
from tests.conftest import BYTE_LEVEL
from tests.models import tiny_config

ORACLE = json.loads((Path(__file__).parents[1] / "oracles" / "nc_oracle.json").read_text())
C, D, N = 6, 4, 48
ADD, DEVIATE, MERGE = jax.jit(add), jax.jit(deviate), jax.jit(merge)


def samples(seed: int = 0):
  rng = np.random.default_rng(seed)
  label = rng.integers(-1, C - 1, size=N)  # -1 is none; the last class is never seen
  return (5 + rng.normal(size=(N, D)) * (1 + label[:, None])).astype(np.float32), label


def streamed(x, label, order=None, size=12) -> Moments:
  order = np.arange(len(x)) if order is None else order
  moments = Moments.zeros(C, D)
  for at in range(0, len(x), size):
    chosen = order[at : at + size]
    moments = ADD(moments, x[chosen], label[chosen])
  return moments


def assert_same(found: Moments, wanted: Moments):
  assert_array_equal(found.count, wanted.count)
  assert_allclose(found.mean(), wanted.mean(), rtol=1e-6, atol=1e-6)
  assert_allclose(found.square.value(), wanted.square.value(), rtol=1e-5, atol=1e-5)


# Sums


def test_moments_are_those_of_float64():
  x, label = samples()
  found = streamed(x, label)
  for c in range(C):
    mine = x[label == c].astype(np.float64)
    assert found.count[c] == len(mine)
    if len(mine):
      assert_allclose(found.mean()[c], mine.mean(0), rtol=1e-6)
      assert_allclose(found.square.value()[c], ((mine - mine.mean(0)) ** 2).sum(), rtol=1e-5, atol=1e-6)
  assert_array_equal(found.mean()[C - 1], np.zeros(D))  # never seen: 0, not NaN


def test_order_batches_and_merging_change_nothing_beyond_rounding():
  x, label = samples()
  whole = streamed(x, label)
  order = np.random.default_rng(1).permutation(N)
  assert_same(streamed(x, label, order), whole)
  assert_same(streamed(x, label, size=N), whole)
  first, second = streamed(x[:24], label[:24]), streamed(x[24:], label[24:])
  assert_same(MERGE(first, second), whole)
  assert_same(MERGE(second, first), whole)
  assert_same(MERGE(whole, Moments.zeros(C, D)), whole)


def test_a_second_pass_around_final_means_is_the_one_pass():
  x, label = samples()
  whole, square = streamed(x, label), Sum.zeros(C)
  for at in range(0, N, 12):
    square = DEVIATE(square, whole.mean(), x[at : at + 12], label[at : at + 12])
  assert_allclose(square.value(), whole.square.value(), rtol=1e-5, atol=1e-5)


def test_counts_do_not_wrap_where_the_shipped_code_does():
  case = ORACLE["E_numerics"]["int8_overflow"]
  assert case["repo_count"] < 0
  label = np.repeat([0, 1], [case["true_count"], 40_000])  # 40,000 is above int16, too
  moments = ADD(Moments.zeros(2, 1), np.ones((len(label), 1), np.float32), label)
  assert moments.count.dtype == jnp.int32
  assert_array_equal(moments.count, [200, 40_000])
  assert_array_equal(moments.mean(), [[1.0], [1.0]])


def test_sums_keep_what_float32_would_lose():
  total, plain, one = Sum(jnp.float32(1e8), jnp.float32(0)), jnp.float32(1e8), Sum(jnp.float32(1), jnp.float32(0))
  for _ in range(40):
    total, plain = total + one, plain + 1
  assert plain == 1e8
  assert np.float64(total.high) + np.float64(total.low) == 1e8 + 40
  far = ADD(Moments.zeros(1, 1), np.full((2, 1), 1e4, np.float32) + np.float32([[0], [1]]), np.zeros(2, int))
  assert_allclose(far.square.value(), [0.5])  # of squares less the square of the sum nothing would be left


def test_no_array_grows_with_samples_times_classes():
  rows, classes = 40, 1009
  shapes = Moments.zeros(classes, D), jnp.zeros((rows, D)), jnp.zeros(rows, jnp.int32)
  text = jax.jit(add).lower(*shapes).compile().as_text()
  assert f"[{classes},{D}]" in text and not {f"[{rows},{classes}", f"[{classes},{rows}"} & set(text.split())
  assert f"{rows},{classes}]" not in text and f"{classes},{rows}]" not in text


def test_streaming_is_the_shipped_codes_step_by_step():
  case = ORACLE["B_streaming_regulariser"]
  listed, inputs = case["inputs"]["S"], case["inputs"]
  moments = Moments.zeros(inputs["C"], inputs["D"])
  for step in case["steps"]:
    moments = ADD(moments, jnp.asarray(step["X"], jnp.float32), jnp.asarray(step["Y"]))
    assert_array_equal(moments.count, step["counts"])
    seen = [c for c in listed if moments.count[c]]
    assert seen == step["indices_have"]
    mean, w = np.asarray(moments.mean(), np.float64)[seen], np.array(step["W_before"])[seen]
    found = of_weights(mean, np.full(len(seen), np.nan), w)["similarity"]
    assert_allclose(found, step["similarity"], atol=1e-5)
    assert_allclose(found.std(ddof=1), step["loss_nc3"], atol=1e-5)


def test_pooling_is_the_mean_over_a_words_states():
  x = np.random.default_rng(0).normal(size=(2, 1, 5, 3)).astype(np.float32)
  span = np.array([[1, 3, 1, 2, 1]])
  found = pooled(jnp.asarray(x), jnp.asarray(span), 3)
  wanted = np.stack([x[:, :, t : t + span[0, t]].mean(2) for t in range(5)], axis=2)
  assert_allclose(found, wanted, rtol=1e-6)


# Labels


def test_pairs_of_state_and_label_are_the_shipped_codes():
  case = ORACLE["C_shift_by_one_alignment"]
  ids, mask, x = (np.array(case["inputs"][key]) for key in ("ids", "mask", "embeds"))
  find, states, labels = Finder(np.arange(103)[:, None]), [], []
  for b in range(len(ids)):
    label, _ = shifted(*find(ids[b][mask[b] > 0]), shift=1)
    states.append(x[b][: len(label)][label != NONE])
    labels.append(label[label != NONE])
  assert_array_equal(np.concatenate(labels), case["repo"]["Y"])
  assert_array_equal(np.concatenate(states), case["repo"]["X"])
  label, _ = shifted(*find(ids[2]), shift=0)  # a masked model's own way: [CLS] is no label, every other state is one
  assert_array_equal(label, [NONE, *ids[2][1:]])


def test_the_longer_of_two_words_is_meant():
  find = Finder(np.array([[4, -1, -1], [4, 5, -1], [4, 5, 6], [7, -1, -1]]))
  label, span = find(np.array([4, 5, 6, 4, 5, 7, 4, 9, 4]))
  assert_array_equal(label, [2, NONE, NONE, 1, NONE, 3, 0, NONE, 0])
  assert_array_equal(span[label != NONE], [3, 2, 1, 1, 1])


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
  metadata = {f"tokenizer.ggml.{key}": value for key, value in BYTE_LEVEL.items()}
  return Tokenizer(tokenizer_of_metadata(metadata, "here"), 1, 2, 2, len(BYTE_LEVEL["tokens"]), "tiny")


def words(tokenizer, *texts: str) -> Classes:
  ids = [tokenizer.encode(text) for text in texts]
  padded = np.full((len(ids), max(map(len, ids))), -1, np.int32)
  for row, key in zip(padded, ids, strict=True):
    row[: len(key)] = key
  return Classes(texts, padded)


def labelled(samples) -> list:
  return [s.label.tolist() for s in samples]


def test_windows_begin_with_the_start_token_and_lose_no_label(tokenizer):
  classes = words(tokenizer, " cat", "the")
  of = lambda **how: sampled([Text("the cat the cat")], classes, tokenizer, pieces="single",
                             **{"causal": True, "window": 9, "shift": 1} | how)  # fmt: skip
  (one,) = of()
  assert one.segment.tokens.tolist() == [tokenizer.start_id, *tokenizer.encode("the cat the cat")[:-1]]
  assert one.label[0] == 1 and list(one.label).count(0) == 2
  assert sum(labelled(of(window=3)), []).count(0) == 2  # two tokens at a time
  own = of(shift=0)[0]
  assert own.label.tolist() == [NONE, *one.label.tolist()]
  encoders = dataclasses.replace(tokenizer, cls_id=0, sep_id=2)
  masked = sampled([Text("the cat")], classes, encoders, False, 9, 0, "single")
  assert labelled(masked) == [[NONE, 1, 0, NONE]] and masked[0].segment.tokens[[0, -1]].tolist() == [0, 2]


@pytest.mark.parametrize(("pieces", "label", "span"), [
  ("first", [0, NONE, NONE], [1, 1, 1]), ("pooled", [0, NONE, NONE], [3, 1, 1]), ("single", [NONE] * 3, [1, 1, 1]),
])  # fmt: skip
def test_spans_of_ones_own(tokenizer, pieces, label, span):
  texts = [Text("cat xyz the", ((4, 7, "odd"),))]
  classes = class_labels.of_spans(texts)
  assert classes.names == ("odd",) and classes.ids is None
  (one,) = sampled(texts, classes, tokenizer, True, 32, 0, pieces)
  ids = tokenizer.encode("cat xyz the")
  offsets = tokenizer.encode_with_offsets("cat xyz the")[1]
  first = next(t for t, (a, b) in enumerate(offsets) if b > 4 and a < 7)
  count = sum(a < 7 and b > 4 for a, b in offsets)
  found = one.label[1 + first : 1 + first + 3].tolist()
  assert found == label and len(one.label) == len(ids) + 1
  assert one.span[1 + first] == (count if span[0] > 1 else 1)
  assert (one.label != NONE).sum() == sum(x != NONE for x in label)


def test_texts_are_read_with_their_labels_and_a_malformed_line_is_named(tmp_path):
  path = tmp_path / "texts.jsonl"
  path.write_text('{"text": "a cat", "labels": [[2, 5, "animal"]]}\n{"text": "b"}\n')
  assert class_labels.read_texts(str(path)) == [Text("a cat", ((2, 5, "animal"),)), Text("b")]
  path.write_text('{"text": "a cat", "labels": [[2, 9, "animal"]]}\n')
  with pytest.raises(UserError, match=r"texts.jsonl line 1: the label .* within the 5 characters"):
    class_labels.read_texts(str(path))
  with pytest.raises(UserError, match="no text has `labels`"):
    class_labels.of_spans([Text("b")])


def test_sites_have_names():
  config = tiny_config()
  assert sites_of(config, ["head_input", "stack_out", "layer_0"]) == ("layer_0", "layer_3", "head_input")
  assert sites_of(config, ["all"]) == ("layer_0", "layer_1", "layer_2", "layer_3", "head_input")
  with pytest.raises(UserError, match="no site `layer_4`; did you mean `layer_"):
    sites_of(config, ["layer_4"])
