"""The words of collapse statistics: lists, their groups, words of several pieces."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from jaxbias.data.tokens import Tokenizer, tokenizer_of_metadata
from jaxbias.data.wordlists import classes, groups_of_classes, read_groups, read_words
from jaxbias.errors import UserError
from jaxbias.losses.collapse import class_sums, init_statistics, occurrences
from jaxbias.losses.registry import LOSSES, evaluate, parse
from tests.conftest import BYTE_LEVEL
from tests.losses.collapsed import context
from tests.models import tiny_config

OPTIONS = {name: choices[0] for name, choices in LOSSES["nc3"].options.items()}


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


def test_groups_of_a_list_and_of_its_classes(tokenizer, tmp_path):
  """`cat` and `cats` begin alike: as a first piece that is a class of both groups, and so of none."""
  assert list(read_groups("gender")) == ["male", "female"] and list(read_groups("occupations")) == [""]
  assert not set(read_groups("gender")["male"]) & set(read_groups("gender")["female"])
  assert not set(read_words("gender")) & set(read_words("occupations"))
  groups = {"one": ("the", "cat"), "other": ("cats", "a")}
  (tmp_path / "w.json").write_text(json.dumps(groups))
  assert read_groups(str(tmp_path / "w.json")) == {"one": ("cat", "the"), "other": ("a", "cats")}
  every = [word for words in groups.values() for word in words]
  for pieces, expected in (("single", {" the": 0, " cat": 0, " a": 1}), ("first", {" the": 0, " cat": -1, " a": 1})):
    ids = classes(every, tokenizer, pieces)
    found = groups_of_classes(ids, groups, tokenizer, pieces)
    assert {tokenizer.decode(row): number for row, number in zip(ids, found, strict=True)} == expected
  objective, _ = parse({"nc3": {"words": str(tmp_path / "w.json"), "pieces": "first"}})
  assert sorted(objective.init_aux(tiny_config(vocab_size=300), tokenizer)["nc3"]["group"].tolist()) == [-1, 0, 1]


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
