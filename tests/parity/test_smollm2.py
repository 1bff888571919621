"""SmolLM2's log-probabilities against Hugging Face's in float32, and the benchmark's figures that follow from them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from jaxbias.data import sources
from jaxbias.data.rows import Choice
from jaxbias.evals import stereoset
from jaxbias.evals.answers import answer
from jaxbias.evals.scoring import score
from jaxbias.models import language_model

SHARED = Path(__file__).resolve().parents[2].parent / "shared"
ORACLE = SHARED / "oracles/smollm2"
DATA = SHARED / "data/stereoset/dev.json"
TOLERANCE = 5e-3  # nats, of a sentence's summed log-probability
needs_oracle = pytest.mark.skipif(not (ORACLE.exists() and DATA.exists()), reason="../shared has no oracles here")

# Summed log-probability after BOS (id 1), and tokens: transformers 5.23 on torch 2.13, float32 on a CPU, from the
# converted folder: log_softmax(AutoModelForCausalLM.from_pretrained(FOLDER)([1, *ids]).logits).
HUGGING_FACE = {
  "The river runs past the old mill and into the lake.": (-61.91002, 12),
  "Water boils at 100 degrees Celsius at sea level.": (-50.13695, 13),
  "She put the kettle on, sat down, and opened her book.": (-57.39312, 14),
  "A triangle with three equal sides has three equal angles.": (-41.92531, 11),
  "Yesterday's rain left puddles along the narrow road.": (-62.93718, 13),
  "Copper wire carries electricity from the plant to the town.": (-82.85176, 12),
}


@pytest.fixture(scope="module")
def model(smollm2, optimised):
  return language_model.load("smollm2-135m-instruct", "float32")


def test_sentences_score_as_in_hugging_face(model):
  scores = score(model, [Choice(text, "", (text,)) for text in HUGGING_FACE])
  for text, (expected, tokens) in HUGGING_FACE.items():
    ((found, count),) = scores[text]
    assert count == tokens and abs(found - expected) < TOLERANCE, text


def test_a_context_scores_as_the_difference_of_two_texts(model):
  """What follows a context, plus the context, is the whole text; the tokens do not change at the seam."""
  context, rest = "The river runs past the old mill", " and into the lake."
  scores = score(model, [Choice("rest", context, (rest,)), Choice("context", "", (context,))])
  total = scores["rest"][0][0] + scores["context"][0][0]
  assert abs(total - HUGGING_FACE[context + rest][0]) < TOLERANCE


@pytest.fixture(scope="module")
def oracle() -> dict:
  return json.loads((ORACLE / "stereoset_intra.scores.json").read_text())


@pytest.fixture(scope="module")
def ours(model) -> dict:
  return score(model, sources.read_choices(ORACLE / "stereoset_intra.rows.jsonl"))


@needs_oracle
def test_all_of_stereoset_scores_as_the_oracle(ours, oracle):
  assert ours.keys() == oracle.keys() and len(ours) == 2106
  assert [[n for _, n in ours[key]] for key in oracle] == [[n for _, n in oracle[key]] for key in oracle]
  difference = np.abs([[a - b for (a, _), (b, _) in zip(ours[key], oracle[key], strict=True)] for key in oracle])
  print(f"\n{difference.size:,} texts: at most {difference.max():.2e} nats apart, median {np.median(difference):.2e}")
  assert difference.max() <= TOLERANCE


@needs_oracle
@pytest.mark.parametrize("scoring", stereoset.SCORINGS)
def test_the_figures_are_those_of_the_oracle(ours, oracle, scoring):
  """SS, LMS and ICAT to the last digit that the oracle gives; where two sentences tie, its order is taken."""
  triples = sources.stereoset_triples(DATA)
  found, theirs = (stereoset.sentence_scores(triples, scores, scoring) for scores in (ours, oracle))
  fewest_E = np.array([min(n for _, n in oracle[triple.id]) if scoring == "token_mean" else 1 for triple in triples])
  tied_E = np.abs(theirs - np.roll(theirs, 1, axis=1)).min(axis=1) < 2 * TOLERANCE / fewest_E
  assert tied_E.mean() < 0.01
  print(f"\n{scoring}: {tied_E.sum()} of {len(triples):,} triples have a tie")
  estimates = stereoset.reduce(triples, np.where(tied_E[:, None], theirs, found), draws=50).estimates
  expected = json.loads((ORACLE / "stereoset_intra.metrics.json").read_text())
  for group in ("overall", *sources.DOMAINS):
    for name, value in expected[f"{scoring}.{group}"].items():
      assert abs(estimates[group][name.lower()].value - value) < 5.1e-5, (group, name)


@needs_oracle
@pytest.mark.parametrize("name", ["crows_dev", "bbq_sample"])
def test_a_sample_of_other_benchmarks_scores_as_the_oracle(model, name):
  rows = sources.read_choices(ORACLE / f"{name}.rows.jsonl")
  rows = rows[:: len(rows) // 30]
  scores = json.loads((ORACLE / f"{name}.scores.json").read_text())
  found = answer(model, rows)
  assert [[n for _, n in found.by_id[row.id]] for row in rows] == [[n for _, n in scores[row.id]] for row in rows]
  apart = max(abs(a - b) for row in rows for (a, _), (b, _) in zip(found.by_id[row.id], scores[row.id], strict=True))
  print(f"\n{name}: {len(rows)} rows, at most {apart:.1e} nats apart, {100 * found.padding:.0f} % padding")
  assert apart <= TOLERANCE and len(found.shapes) <= 4
