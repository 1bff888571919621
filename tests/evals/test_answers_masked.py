"""Pseudo-log-likelihoods, fillings and embeddings, against one masked copy at a time."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from jaxbias.data.rows import MASK, OTHER, Text
from jaxbias.evals import passes, task
from jaxbias.evals.answers import answer
from tests.evals.answering import (
  CHOICES,
  CLOZES,
  MASKED,
  ORACLES,
  PAIRS,
  alone,
  assert_same,
  at_masks,
  compared,
  load,
)


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("span", ["all", "shared", "different"])
def test_pseudo_log_likelihood(name, span):
  model = load(name)
  t, expected = model.tokenizer, {}
  rows = [dataclasses.replace(row, span=span) for row in (PAIRS if span != "all" else CHOICES[:5])]
  for row in rows:
    context, options = t.encode(row.context), [t.encode(option) for option in row.options]
    texts = [context + option for option in options]
    kept = [range(len(context), len(text)) for text in texts]
    if span != "all":  # metric.py compares texts with [CLS] and [SEP] and drops the first and last shared token
      whole = compared([[t.cls_id, *text, t.sep_id] for text in texts], span)
      kept = [[i - 1 for i in (places[1:-1] if span == "shared" else places) if i > len(context)] for places in whole]
    expected[row.id] = []
    for text, places in zip(texts, kept, strict=True):
      values = [at_masks(model, [*text[:i], t.mask_id, *text[i + 1 :]], {i: text[i]})[0] for i in places]
      expected[row.id].append((sum(values), len(values)))
  assert_same(answer(model, rows).by_id, expected)


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("pieces", ["one", "each", "growing"])
def test_fillings(name, pieces):
  model = load(name)
  t, expected = model.tokenizer, {}
  mask = t.backend.id_to_token(t.mask_id)
  rows = [dataclasses.replace(row, pieces=pieces) for row in CLOZES]
  for row in rows:
    kinds = re.findall(r"\[MASK\]|\[OTHER\]", row.text)
    text = t.encode(row.text.replace(MASK, mask).replace(OTHER, mask))
    places = [i for i, token in enumerate(text) if token == t.mask_id]
    asked = [i for i, kind in zip(places, kinds, strict=True) if kind == MASK]
    expected[row.id] = []
    for option in map(t.encode, row.options):

      def filled(pieces, asked=asked, text=text):
        out, begin = list(text), []
        for done, at in enumerate(asked):
          at += done * (len(pieces) - 1)
          out[at : at + 1] = pieces
          begin.append(at)
        return out, begin

      if pieces == "growing":
        steps = []
        for k in range(len(option)):
          ids, begin = filled([*option[:k], t.mask_id])
          steps.append(at_masks(model, ids, {begin[0] + k: option[k]})[0])
        expected[row.id].append((np.log(np.exp(steps).mean()), len(option)))
      else:
        wanted = option[:1] if pieces == "one" else option
        ids, begin = filled([t.mask_id] * len(wanted))
        values = at_masks(model, ids, {at + k: wanted[k] for at in begin for k in range(len(wanted))})
        expected[row.id].append((values.sum(), len(values)))
  found = answer(model, rows)
  assert not found.failed
  assert_same(found.by_id, expected)
  doctor = len(t.encode(" doctor"))
  assert doctor > 1 and found.by_id["pieces"][1][1] == (1 if pieces == "one" else doctor)


def test_the_space_before_a_filling_is_the_masks_own():
  """RoBERTa's mask eats the space before it, so an option brings its own: the benchmarks' business."""
  t = load("roberta").tokenizer
  assert t.encode("the<mask> sat") == t.encode("the <mask> sat")
  assert t.encode(" cat") != t.encode("cat")


# Embeddings


@pytest.mark.parametrize("name", ["gpt2", *MASKED])
@pytest.mark.parametrize("pooling", passes.POOLINGS)
def test_embeddings(name, pooling):
  model = load(name)
  t = model.tokenizer
  rows = [Text(text, text) for text in ("the cat", "she is a nurse.", "a", "the dog sat on the mat " * 5)]
  found = answer(model, [*rows, Text("again", "the cat")], task.EMBEDDINGS, pooling=pooling)
  for row in rows:
    ids = t.encode(row.text) if model.config.causal else [t.cls_id, *t.encode(row.text), t.sep_id]
    states = alone(model, ids)[1]
    expected = {"mean": states.mean(0), "first": states[0], "last": states[-1]}[pooling]
    assert_allclose(found.by_id[row.id], expected, atol=1e-5)
  assert_array_equal(found.by_id["again"], found.by_id["the cat"])


def test_embeddings_are_hugging_faces_last_hidden_state():
  """From the oracle's file: the mean over a whole text of `hidden_states[-1]`."""
  model = load("bert")
  with np.load(ORACLES / "bert" / "io.npz") as stored:
    ids, mask, states = stored["input_ids"], stored["mask"], stored[f"hidden_{model.config.num_layers}"]
  run = passes.program(model.module, model.mesh, "mean")
  B, T = ids.shape
  arrays = {"tokens": ids.astype(np.int32), "segment": mask.astype(np.int32),
            "position": np.tile(np.arange(T, dtype=np.int32), (B, 1)), "branch": np.zeros((B, T), np.int32)}
  found = np.asarray(run({"params": model.params}, arrays, 1))[:, 0]
  assert_allclose(found, (states * mask[..., None]).sum(1) / mask.sum(1, keepdims=True), atol=2e-5)
