"""What a look reads of a model: spans, masks that never change, general text and its groups."""

from __future__ import annotations

import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from jaxbias.data.rows import Text, Triple
from jaxbias.data.tokens import Tokenizer
from jaxbias.errors import UserError
from jaxbias.evals import forgetting, probe
from jaxbias.mesh import make_mesh
from jaxbias.models.language_model import LanguageModel, layout_for
from jaxbias.models.transformer import Transformer, abstract_variables
from tests.evals.looks import UNCHANGED, whole_logits
from tests.models import tiny_config


@pytest.fixture(scope="module")
def masked() -> LanguageModel:
  words = ["[PAD]", "[MASK]", "[CLS]", "[SEP]", *"abcdefghijklmnopqrs"]
  backend = Backend(models.WordLevel({word: i for i, word in enumerate(words)}, "[PAD]"))
  backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  config = tiny_config(task="masked", num_layers=2)
  mesh = make_mesh({"data": 1})
  module = Transformer(config, mesh=mesh)
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), jnp.float32),
                        nn.unbox(abstract_variables(module)))  # fmt: skip
  tokenizer = Tokenizer(backend, None, None, 0, len(words), "words", mask_id=1, cls_id=2, sep_id=3)
  return LanguageModel("tiny", config, module, params, tokenizer, "tiny", layout_for(config, mesh))


TRIPLES = (Triple("one", "gender", "t", "a BLANK d", ("a b d", "a c d", "a e f d"), 1),
           Triple("two", "gender", "u", "BLANK", ("g h", "i h", "j h"), 0))  # fmt: skip
GENERAL = probe.general([Text("x", "a b c d e f g h i j"), Text("y", "k l m"), Text("z", "b d f h j l n p r a c e")])


def nudged(model: LanguageModel) -> dict:
  return {"params": jax.tree.map(lambda x: x + 0.05 * jnp.cos(x), model.params)}


def test_a_masked_model_is_read_under_masks_that_never_change(masked, tmp_path):
  asked = probe.make(masked, TRIPLES, GENERAL, probe.Masks(draws=5))
  start = probe.start(masked, asked, {}, tmp_path / "start.npz", "sum")
  again = probe.look(masked, asked, start, {}, "sum")
  found = forgetting.reduce(TRIPLES, start.losses, [again]).estimates["overall"]
  assert {found[name].value for name in UNCHANGED} == {0.0}
  now = probe.look(masked, asked, start, nudged(masked), "sum")

  log_p = whole_logits(masked)
  for t, text in enumerate(GENERAL.texts):
    ids = np.array([2, *masked.tokenizer.encode(text.text), 3])
    losses, divergences = [], []
    for drawn in probe.mask_positions(text.text, len(ids) - 2, probe.Masks(draws=5)):
      at = drawn + 1
      hidden = np.where(np.isin(np.arange(len(ids)), at), 1, ids)
      p, q = log_p({"params": masked.params}, hidden)[at], log_p(nudged(masked), hidden)[at]
      losses += list(-q[np.arange(len(at)), ids[at]])
      divergences += list((np.exp(p) * (p - q)).sum(-1))
    assert_allclose([now.general[t], now.kl[t]], [np.mean(losses), np.mean(divergences)], rtol=2e-4)
  ids = np.array([2, *masked.tokenizer.encode("a e f d"), 3])  # one token masked at a time
  each = [-log_p(nudged(masked), np.where(np.arange(6) == k, 1, ids))[k, ids[k]] for k in (1, 2, 3, 4)]
  assert_allclose([now.sentences[0, 2], now.spans[0, 2]], [np.mean(each), np.mean(each[1:3])], rtol=2e-4)


def test_masks_are_of_the_text_and_the_seed_alone(masked, tmp_path):
  whole, part = (probe.make(masked, TRIPLES, general) for general in (GENERAL, probe.general(GENERAL.texts[1:])))
  theirs = {segment.tokens.tobytes() for segment in part.segments[len(part.sentences.segments) :]}
  assert theirs < {segment.tokens.tobytes() for segment in whole.segments}
  other = probe.make(masked, TRIPLES, GENERAL, probe.Masks(seed=1))
  assert other.fingerprint != whole.fingerprint
  probe.start(masked, whole, {}, tmp_path / "start.npz", "sum")
  with np.load(tmp_path / "start.npz") as stored:
    assert_array_equal(stored["score_at"], np.concatenate([segment.score_at for segment in whole.segments]))
  for draw in probe.mask_positions("a text", 40, probe.Masks(draws=7, share=0.25)):
    assert len(set(draw)) == 10 and draw.max() < 40
  assert [len(draw) for draw in probe.mask_positions("b", 2, probe.Masks())] == [1] * 4


@pytest.mark.parametrize("ids, spans", [
  ([[1, 2, 3, 9], [1, 5, 9], [1, 2, 4, 4, 9]], [(1, 3), (1, 2), (1, 4)]),
  ([[1, 9], [1, 5, 9], [1, 9, 9]], [(1, 1 + 1), (1, 3), (1, 3)]),  # what is nothing but shared keeps a token
  ([[1], [2], [3]], [(0, 1)] * 3),
  ([[1, 2], [1, 2], [1, 2]], [(1, 2)] * 3),
])  # fmt: skip
def test_the_differing_span_of_three_sentences(ids, spans):
  assert [(span.start, span.stop) for span in probe.differing(ids)] == spans


# Refusals


@pytest.mark.parametrize("change, said", [
  ({"fingerprint": "another"}, "another model"),
  ({"tokenizer": "another"}, "another tokenizer"),
  ({"general": GENERAL.texts[1:]}, "another set of texts and masks"),
])  # fmt: skip
def test_answers_of_another_model_tokenizer_or_text_are_refused(masked, tmp_path, change, said):
  path = tmp_path / "start.npz"
  probe.start(masked, probe.make(masked, TRIPLES, GENERAL), {}, path, "sum")
  general = probe.general(change.pop("general", GENERAL.texts))
  if "tokenizer" in change:
    change["tokenizer"] = dataclasses.replace(masked.tokenizer, fingerprint="another")
  other = dataclasses.replace(masked, **change)
  with pytest.raises(UserError, match=f"start.npz was made with {said}; ") as error:
    probe.start(other, probe.make(other, TRIPLES, general), {}, path, "sum")
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("row, said", [
  ({"id": "a", "text": "x"}, "line 1.*`kind`"),
  ({"id": "a", "text": "x", "kind": "k", "document": 3}, "line 1.*`document`"),
])  # fmt: skip
def test_a_row_without_its_group_is_named(tmp_path, row, said):
  path = tmp_path / "general.jsonl"
  path.write_text(json.dumps(row) + "\n")
  with pytest.raises(UserError, match=said):
    probe.read_general(str(path), "kind")


def test_groups_of_ones_own_do_not_take_the_place_of_those_by_gendered_words():
  with pytest.raises(UserError, match="`gender` is the grouping by gendered words"):
    probe.read_general("general.jsonl", "gender")
