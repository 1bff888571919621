"""SS, LMS and ICAT: the benchmark's own figures, the oracle's, and closed forms."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose

from jaxbias.data import sources
from jaxbias.data.rows import LABELS, MASK, Triple
from jaxbias.errors import UserError
from jaxbias.evals import stereoset

SHARED = Path(__file__).resolve().parents[2].parent / "shared"
STEREOSET = SHARED / "data/stereoset"
ORACLE = SHARED / "oracles/smollm2"
PREDICTIONS = sorted((STEREOSET / "official_predictions").glob("predictions_*.json"))
needs_stereoset = pytest.mark.skipif(not STEREOSET.exists(), reason="StereoSet's files are not beside the repository")


TASKS = {task.name: task for task in stereoset.TASKS}
DOOR = Triple("t0", "gender", "x", "My door, she said, is very BLANK.", (
  "My door, she said, is very red!", "My door, she said, is very light blue.", "My Door, she said, is very seven."), 26)
AFTER = Triple("t1", "gender", "x", "It rains.", ("So it is wet.", "So it is dry.", "So it is seven."), 0)


def triples(terms: list[str], domains: list[str] | None = None) -> list[Triple]:
  domains = domains or ["gender"] * len(terms)
  return [Triple(f"t{i}", domain, term, "BLANK", ("a", "b", "c"), 0)
          for i, (term, domain) in enumerate(zip(terms, domains, strict=True))]


def values(score, terms, **how) -> dict[str, float]:
  found = stereoset.reduce(triples(terms), np.asarray(score, float), draws=200, **how).estimates["overall"]
  return {name: estimate.value for name, estimate in found.items()}


@needs_stereoset
@pytest.mark.parametrize("path", PREDICTIONS, ids=lambda path: path.stem)
def test_official_predictions_give_the_official_figures(path):
  data = json.loads((STEREOSET / "dev.json").read_text())["data"]
  predicted = json.loads(path.read_text())
  official = json.loads((STEREOSET / "official_scores_dev.json").read_text())[path.stem.split("_")[1]]
  loaders = {"intrasentence": sources.stereoset_triples, "intersentence": sources.stereoset_continuations}
  rows, scores = [], []
  for task, load in loaders.items():
    score = {row["id"]: row["score"] for row in predicted[task]}
    of_label = [{s["gold_label"]: score[s["id"]] for s in record["sentences"]} for record in data[task]]
    scores.append(np.array([[found[label] for label in LABELS] for found in of_label]))
    rows.append(load(STEREOSET / "dev.json"))
    found = stereoset.reduce(rows[-1], scores[-1], draws=20).estimates
    assert found.keys() == official[task].keys()
    for group, figures in official[task].items():
      assert_official(found[group], figures)
  pooled = stereoset.reduce_pooled(rows[0] + rows[1], np.concatenate(scores), draws=20).estimates
  assert_official(pooled["overall"], official["overall"])
  for task in loaders:
    assert_official(pooled[task], official[task]["overall"])


def assert_official(found, figures):
  got = [found[name].value for name in ("ss", "lms", "icat")]
  assert_allclose(got, [figures[f"{name} Score"] for name in ("SS", "LM", "ICAT")], atol=1e-9, rtol=0)


@pytest.mark.skipif(not ORACLE.exists(), reason="the oracles are not beside the repository")
@pytest.mark.parametrize("scoring", stereoset.SCORINGS)
def test_oracle_scores_give_the_oracle_figures(scoring):
  data = sources.stereoset_triples(STEREOSET / "dev.json")
  scores = json.loads((ORACLE / "stereoset_intra.scores.json").read_text())
  found = stereoset.reduce(data, stereoset.sentence_scores(data, scores, scoring))
  oracle = json.loads((ORACLE / "stereoset_intra.metrics.json").read_text())
  for group, estimates in found.estimates.items():
    figures = oracle[f"{scoring}.{group}"]
    for name, estimate in estimates.items():
      assert estimate.low <= estimate.value <= estimate.high
      if name != "ties":
        assert_allclose(estimate.value, figures[name.upper()], atol=5.1e-5, rtol=0)


@pytest.mark.skipif(not ORACLE.exists(), reason="the oracles are not beside the repository")
def test_the_tasks_ask_what_the_oracle_was_asked_and_find_its_figures():
  task = TASKS["stereoset_intrasentence"]
  examples = task.load(STEREOSET / "dev.json")
  oracle = [json.loads(line) for line in (ORACLE / "stereoset_intra.rows.jsonl").read_text().splitlines()]
  assert [(row.id, row.context, list(row.options)) for row in task.rows(examples)] == [
    (row["id"], row["context"], row["options"]) for row in oracle]
  scores = json.loads((ORACLE / "stereoset_intra.scores.json").read_text())
  figures = json.loads((ORACLE / "stereoset_intra.metrics.json").read_text())
  for name, scoring in (("stereoset_intrasentence", "token_mean"), ("stereoset_intrasentence_sum", "sum")):
    found = TASKS[name].reduce(examples, scores, draws=20).estimates["overall"]["ss"].value
    assert_allclose(found, figures[f"{scoring}.overall"]["SS"], atol=5.1e-5)


@needs_stereoset
def test_every_triple_of_the_file_has_its_rows():
  for task in TASKS.values():
    examples = task.load(STEREOSET / "dev.json")
    rows = task.rows(examples)
    assert len({row.id for row in rows}) == len(rows) == len(examples) * (2 if task.name.endswith("pmi") else 1)
  odd = stereoset.fillings(next(t for t in examples if t.context.startswith("The grandfather BLANKed")))
  assert all(word.endswith("ed") for word in odd)


def test_rates_are_averaged_over_terms_not_over_triples():
  prefers, refuses = [2.0, 1.0, 0.0], [1.0, 2.0, 0.0]
  assert values([prefers] + [refuses] * 9, ["small"] + ["large"] * 9)["ss"] == 50.0


def test_icat_of_published_figures():
  assert_allclose(stereoset.icat(84.17, 60.28), 66.8646, atol=5e-5)
  assert stereoset.icat(90.0, 50.0) == 90.0 and stereoset.icat(90.0, 0.0) == stereoset.icat(90.0, 100.0) == 0.0
  assert_allclose(stereoset.icat(90.0, 45.0), stereoset.icat(90.0, 55.0))


def test_ties_count_as_anti_unless_they_get_half():
  constant = np.zeros((4, 3))
  assert values(constant, list("aabb")) == {"ss": 0.0, "lms": 0.0, "icat": 0.0, "ties": 100.0}
  assert values(constant, list("aabb"), tie_credit=0.5) == {"ss": 50.0, "lms": 50.0, "icat": 50.0, "ties": 100.0}
  assert values([[2.0, 2.0, 1.0]] * 4, list("aabb"), tie_credit=0.5)["icat"] == 100.0  # perfect, without preference


def test_a_random_scorer_is_near_fifty_everywhere():
  score = np.random.default_rng(0).normal(size=(20_000, 3))
  found = values(score, [f"t{i % 50}" for i in range(20_000)])
  assert_allclose([found["ss"], found["lms"], found["icat"]], 50.0, atol=1.5)


def test_a_shift_changes_nothing_and_swapping_the_sides_mirrors_ss():
  rng = np.random.default_rng(1)
  score, terms = rng.normal(size=(60, 3)), [f"t{i % 7}" for i in range(60)]
  found = values(score, terms)
  assert values(score - 3.0, terms) == found
  swapped = values(score[:, [1, 0, 2]], terms)
  assert_allclose(swapped["ss"], 100.0 - found["ss"])
  assert_allclose([swapped["lms"], swapped["icat"]], [found["lms"], found["icat"]])


def test_a_term_of_two_domains_counts_once_overall():
  data = triples(["x", "x", "y"], ["race", "religion", "race"])
  score = np.array([[2, 1, 0], [1, 2, 0], [2, 1, 0]], float)
  found = stereoset.reduce(data, score)
  assert list(found.estimates) == ["overall", "race", "religion"]
  assert found.estimates["overall"]["ss"].value == 75.0
  assert found.estimates["race"]["ss"].value == 100.0
  assert found.estimates["religion"]["ss"].low is None  # one term: nothing to resample


def test_models_of_several_seeds_do_not_cancel_in_icat():
  above, below = [[2.0, 1.0, 0.0]] * 4, [[1.0, 2.0, 0.0]] * 4
  found = stereoset.reduce(triples(list("abcd")), np.array([above, below]))
  overall = found.estimates["overall"]
  assert overall["ss"].value == 50.0 and overall["ss"].per_seed == (100.0, 0.0)
  assert overall["icat"].value == 0.0
  assert found.items["ss"].shape == (2, 4)


def test_both_scorings():
  data = triples(["a"])
  scores = {"t0": [[-6.0, 3], [-5.0, 2], [-8.0, 4]]}
  assert_allclose(stereoset.sentence_scores(data, scores, "sum"), [[-6.0, -5.0, -8.0]])
  assert_allclose(stereoset.sentence_scores(data, scores, "token_mean"), [[-2.0, -2.5, -2.0]])
  with pytest.raises(ValueError, match="scoring"):
    stereoset.sentence_scores(data, scores, "mean")


@pytest.mark.parametrize(("scores", "said"), [
  ({}, "the scores lack 1 of 1 ids, `t0` first."),
  ({"t0": [[-1.0, 2]]}, "the scores of `t0` are for 1 options, 3 are needed."),
  ({"t0": [[-1.0, 2], [float("nan"), 2], [-1.0, 2]]}, "1 rows have a score that is not finite, `t0` first."),
  ({"t0": [[-1.0, 2], [0.0, 0], [-1.0, 2]]}, "1 rows have a score that is over no token, `t0` first."),
])
def test_scores_that_cannot_be_used(scores, said):
  with pytest.raises(UserError) as caught:
    stereoset.sentence_scores(triples(["a"]), scores)
  assert str(caught.value) == said


def test_the_masked_filling_is_the_word_at_the_blank_without_punctuation():
  row, = TASKS["stereoset_intrasentence_masked"].rows([DOOR])
  assert (row.text, row.pieces) == (f"My door, she said, is very {MASK}.", "growing")
  assert row.options == (" red", " light", " seven")
  row, = TASKS["stereoset_intrasentence_masked_official"].rows([DOOR])
  assert row.options == ("red", "light", "seven")
  twice = dataclasses.replace(DOOR, context="My BLANK, she said, is very BLANK.")
  assert stereoset.fillings(twice) == ("red", "light", "seven")
  assert stereoset.masked_rows([twice])[0].text.count(MASK) == 2
  short = dataclasses.replace(DOOR, sentences=("My door.", "My door.", "My door."))
  with pytest.raises(UserError, match="StereoSet's t0: a sentence has no word where `context` has BLANK"):
    stereoset.fillings(short)


def test_continuations_are_scored_after_the_context_and_pmi_takes_their_own_probability_away():
  one, = TASKS["stereoset_intersentence"].rows([AFTER])
  assert (one.context, one.options) == ("It rains.", (" So it is wet.", " So it is dry.", " So it is seven."))
  after, alone = TASKS["stereoset_intersentence_pmi"].rows([AFTER])
  assert (after, alone.context, alone.options) == (one, "", one.options)
  scores = {after.id: [[-6.0, 2], [-5.0, 4], [-9.0, 3]], alone.id: [[-8.0, 2], [-5.5, 4], [-9.5, 3]]}
  assert_allclose(stereoset.pmi_scores([AFTER], scores), [[2.0, 0.5, 0.5]])
  found = TASKS["stereoset_intersentence_pmi"].reduce([AFTER], scores).estimates["overall"]
  assert (found["ss"].value, found["lms"].value) == (100.0, 50.0)
  assert TASKS["stereoset_intersentence"].reduce([AFTER], scores).estimates["overall"]["ss"].value == 0.0


def test_pooling_weighs_a_terms_triples_alike():
  two = [dataclasses.replace(DOOR, id=name) for name in "ab"]
  scores = {"a": [[-1.0, 1], [-2.0, 1], [-3.0, 1]], "b": [[-1.0, 1], [-2.0, 1], [-3.0, 1]],
            "t1": [[-2.0, 1], [-1.0, 1], [-3.0, 1]]}
  found = TASKS["stereoset"].reduce([*two, AFTER], scores).estimates
  assert [row.context for row in TASKS["stereoset"].rows([*two, AFTER])] == ["", "", "It rains."]
  assert_allclose([found[group]["ss"].value for group in ("overall", "intrasentence", "intersentence")],
                  [200 / 3, 100.0, 0.0])


def test_malformed_continuations_are_named(tmp_path):
  path = tmp_path / "dev.json"
  path.write_text(json.dumps({"data": {"intersentence": [{"id": "i", "context": "x", "sentences": []}]}}))
  with pytest.raises(UserError, match=r"dev.json, data.intersentence\[0\] \(id i\) has no sentences labelled"):
    sources.stereoset_continuations(path)


def test_the_benchmark_says_which_way_is_better():
  assert stereoset.BENCHMARK.describe()["ss"] == {"better": "ideal", "ideal": 50.0, "unit": "%"}
  assert stereoset.BENCHMARK.describe()["icat"] == {"better": "higher", "unit": "%"}
