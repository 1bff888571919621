"""SS, LMS and ICAT: the benchmark's own figures, the oracle's, and closed forms."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose

from jaxbias.data import sources
from jaxbias.data.rows import LABELS, Triple
from jaxbias.errors import UserError
from jaxbias.evals import stereoset

SHARED = Path(__file__).resolve().parents[2].parent / "shared"
STEREOSET = SHARED / "data/stereoset"
ORACLE = SHARED / "oracles/smollm2"
PREDICTIONS = sorted((STEREOSET / "official_predictions").glob("predictions_*.json"))
needs_stereoset = pytest.mark.skipif(not STEREOSET.exists(), reason="StereoSet's files are not beside the repository")


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
  records = json.loads((STEREOSET / "dev.json").read_text())["data"]["intrasentence"]
  score = {row["id"]: row["score"] for row in json.loads(path.read_text())["intrasentence"]}
  of_label = [{s["gold_label"]: score[s["id"]] for s in record["sentences"]} for record in records]
  score_E3 = [[scores[label] for label in LABELS] for scores in of_label]
  found = stereoset.reduce(sources.stereoset_triples(STEREOSET / "dev.json"), np.array(score_E3), draws=50)
  official = json.loads((STEREOSET / "official_scores_dev.json").read_text())[path.stem.split("_")[1]]["intrasentence"]
  assert found.estimates.keys() == official.keys()
  for group, figures in official.items():
    got = [found.estimates[group][name].value for name in ("ss", "lms", "icat")]
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


def test_the_benchmark_says_which_way_is_better():
  assert stereoset.BENCHMARK.describe()["ss"] == {"better": "ideal", "ideal": 50.0, "unit": "%"}
  assert stereoset.BENCHMARK.describe()["icat"] == {"better": "higher", "unit": "%"}
