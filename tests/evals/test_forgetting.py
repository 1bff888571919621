"""Forgetting: the identities that its definitions have to obey (nats a token)."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from numpy.testing import assert_allclose

from jaxbias.data.rows import Text, Triple
from jaxbias.evals import forgetting, stereoset
from jaxbias.evals.forgetting import Losses

RNG = np.random.default_rng(5)
TRIPLES = [Triple(f"t{i}", "gender", f"term {i % 6}", "BLANK", ("a", "b", "c"), 0) for i in range(30)]
BEFORE = Losses(RNG.uniform(2, 4, 50), RNG.uniform(3, 6, (30, 3)), RNG.uniform(4, 9, (30, 3)))
DRIFT = Losses(RNG.normal(size=50), RNG.normal(size=(30, 3)), RNG.normal(size=(30, 3)))


def plus(losses: Losses, general=0.0, sentences=0.0, spans=0.0) -> Losses:
  return Losses(losses.general + general, losses.sentences + sentences, losses.spans + spans)


def values(*after: Losses, before: Losses = BEFORE, group: str = "overall") -> dict[str, float]:
  found = forgetting.reduce(TRIPLES, before, after, draws=200).estimates[group]
  assert list(found) == [name for name in forgetting.BENCHMARK.metrics if name != "kl"]
  return {name: estimate.value for name, estimate in found.items()}


def test_an_unchanged_model_forgot_nothing_to_the_last_bit():
  for group in ("overall", "span"):
    found = forgetting.reduce(TRIPLES, BEFORE, [BEFORE]).estimates[group]
    for name in found.keys() - {"perplexity_ratio", "preference"}:
      assert (found[name].value, found[name].low, found[name].high) == (0.0, 0.0, 0.0)
    assert found["perplexity_ratio"].value == 1.0


@pytest.mark.parametrize("c", [0.3, -0.05])
def test_the_same_loss_everywhere_is_no_selective_forgetting(c):
  found = values(plus(BEFORE, c, c, c))
  assert_allclose([found[name] for name in ("f_all", "f_st", "f_anti", "f_unrel")], c, rtol=1e-12)
  assert_allclose([found["f_sel"], found["preference_shift"], found["rho"], found["lms_change"]], 0.0, atol=1e-12)
  assert_allclose(found["perplexity_ratio"], np.exp(c))
  before, after = (stereoset.reduce(TRIPLES, -model.sentences) for model in (BEFORE, plus(BEFORE, c, c, c)))
  assert before.estimates == after.estimates


def test_a_perplexity_ratio():
  assert_allclose(values(plus(BEFORE, general=0.3))["perplexity_ratio"], 1.349859, atol=1e-6)


def test_loss_on_stereotypes_alone_reaches_general_text_by_their_share():
  a, share = 1.5, 0.1
  general = np.where(np.arange(50) < share * 50, a, 0.0)
  found = values(plus(BEFORE, general=general, sentences=np.array([a, 0.0, 0.0])))
  assert_allclose([found["f_st"], found["f_sel"], found["preference_shift"]], a)
  assert_allclose([found["f_anti"], found["f_unrel"]], 0.0, atol=1e-12)
  assert_allclose(found["f_all"], share * a)
  assert_allclose(found["rho"], a / (a + share * a), rtol=1e-5)


def test_a_mixture_forgets_by_the_shares_of_its_parts():
  before = dataclasses.replace(BEFORE, general=np.zeros(100))
  change = np.where(np.arange(100) < 2, 1.5, 0.05)
  assert_allclose(values(plus(before, general=change), before=before)["f_all"], 0.079)


@pytest.mark.parametrize("group", ["overall", "span"])
def test_the_preference_shift_is_a_difference_of_two_forgettings_and_flips_with_the_sides(group):
  after = plus(BEFORE, DRIFT.general, DRIFT.sentences, DRIFT.spans)
  found = values(after, group=group)
  assert found["preference_shift"] == found["f_st"] - found["f_anti"]  # exactly
  flip = [1, 0, 2]
  flipped = [Losses(m.general, m.sentences[:, flip], m.spans[:, flip]) for m in (BEFORE, after)]
  mirrored = values(flipped[1], before=flipped[0], group=group)
  assert mirrored["preference_shift"] == -found["preference_shift"]
  assert_allclose(mirrored["preference"], -found["preference"])
  span_ME3 = {"overall": (BEFORE.sentences, after.sentences), "span": (BEFORE.spans, after.spans)}[group]
  started, ended = ((x[:, 1] - x[:, 0]).mean() for x in span_ME3)
  assert_allclose([found["preference"], found["preference_shift"]], [ended, started - ended])


def test_selectivity_lies_between_minus_one_and_one():
  assert_allclose(values(plus(BEFORE, sentences=np.array([2.0, 0.0, 0.0])))["rho"], 1.0, atol=1e-6)
  assert_allclose(values(plus(BEFORE, sentences=np.array([-2.0, 0.0, 0.0])))["rho"], -1.0, atol=1e-6)
  assert_allclose(values(plus(BEFORE, 1.0, np.array([1.0, 0.0, 0.0])))["rho"], 0.5, atol=1e-6)


def test_seeds_are_averaged_metric_by_metric():
  after = [plus(BEFORE, 0.2, np.array([1.0, 0.0, 0.0])), plus(BEFORE, -0.2, np.array([3.0, 0.0, 0.0]))]
  found = forgetting.reduce(TRIPLES, BEFORE, after)
  overall = found.estimates["overall"]
  assert_allclose(overall["f_all"].per_seed, [0.2, -0.2])
  assert_allclose(overall["f_st"].value, 2.0)
  assert_allclose(overall["perplexity_ratio"].value, np.cosh(0.2))
  assert_allclose(overall["rho"].value, (1 / 1.2 + 3 / 3.2) / 2, rtol=1e-6)
  assert found.items["general"].shape == (2, 50) and found.items["sentences"].shape == (2, 30, 3)


def test_intervals_hold_their_values_and_are_drawn_by_term():
  found = forgetting.reduce(TRIPLES, BEFORE, [plus(BEFORE, DRIFT.general, DRIFT.sentences)]).estimates["overall"]
  for estimate in found.values():
    assert estimate.low < estimate.high and estimate.low <= estimate.value <= estimate.high
  by_term = np.arange(30)[:, None] % 6 * np.array([1.0, 0.0, 0.0])  # differs between terms only
  found = forgetting.reduce(TRIPLES, BEFORE, [plus(BEFORE, sentences=by_term)]).estimates["overall"]["f_st"]
  assert_allclose(found.high - found.low, 2 * 1.96 * np.sqrt(np.arange(6).var() / 6), rtol=0.1)


def test_losses_come_from_the_scorers_output():
  texts = [Text("x", "Water boils."), Text("y", "Ice floats.")]
  sentences = {triple.id: [[-6.0, 3], [-4.0, 4], [-10.0, 2]] for triple in TRIPLES}
  losses = Losses.of(texts, TRIPLES, {"y": [[-9.0, 3]], "x": [[-4.0, 2]], "other": [[0.0, 0]]}, sentences)
  assert_allclose(losses.general, [2.0, 3.0])
  assert_allclose(losses.sentences, np.tile([2.0, 1.0, 5.0], (30, 1)))
  assert losses.spans is None
  assert list(forgetting.reduce(TRIPLES, losses, [losses]).estimates) == ["overall"]


def test_kl_is_a_mean_over_texts_and_absent_where_it_was_not_measured():
  after = dataclasses.replace(plus(BEFORE), kl=np.linspace(0.0, 0.2, 50))
  found = forgetting.reduce(TRIPLES, BEFORE, [after, after]).estimates["overall"]["kl"]
  assert_allclose(found.per_seed, [0.1, 0.1])
  assert found.low < 0.1 < found.high
  assert "kl" not in forgetting.reduce(TRIPLES, BEFORE, [after, plus(BEFORE)]).estimates["overall"]


def test_the_change_of_lms_is_stereosets_by_the_score_that_is_given():
  after = plus(BEFORE, sentences=DRIFT.sentences)
  lms = lambda score_E3: stereoset.reduce(TRIPLES, score_E3).estimates["overall"]["lms"].value
  assert_allclose(values(after)["lms_change"], lms(-after.sentences) - lms(-BEFORE.sentences))
  score_E3 = RNG.normal(size=(30, 3))
  before, after = (dataclasses.replace(m, score=s) for m, s in ((BEFORE, -BEFORE.sentences), (after, score_E3)))
  assert_allclose(values(after, before=before)["lms_change"], lms(score_E3) - lms(-BEFORE.sentences))


@pytest.mark.parametrize("groups", [["a"] * 10 + ["b"] * 40, [f"g{i % 7}" for i in range(50)]])
def test_groups_of_general_text_add_up_to_all_of_it(groups):
  after = [dataclasses.replace(plus(BEFORE, RNG.normal(size=50)), kl=RNG.uniform(size=50)) for _ in range(2)]
  whole = forgetting.reduce(TRIPLES, BEFORE, after).estimates["overall"]
  parts = forgetting.by_group(groups, BEFORE, after, draws=50)
  assert list(parts) == sorted(set(groups)) and sum(share for share, _ in parts.values()) == pytest.approx(1)
  for metric in ("f_all", "kl"):
    mixed = sum(share * np.array(found[metric].per_seed) for share, found in parts.values())
    assert_allclose(mixed, whole[metric].per_seed, rtol=1e-12)


def test_a_mixture_of_two_groups_by_hand():
  before = dataclasses.replace(BEFORE, general=np.zeros(100))
  groups = ["stereotype" if i < 2 else "other" for i in range(100)]
  change = np.array([{"stereotype": 1.5, "other": 0.05}[group] for group in groups])
  parts = forgetting.by_group(groups, before, [plus(before, general=change)])
  assert_allclose([(share, found["f_all"].value) for share, found in parts.values()], [(0.98, 0.05), (0.02, 1.5)])
  assert_allclose(sum(share * found["f_all"].value for share, found in parts.values()), 0.079)


def test_the_clustered_interval_is_as_wide_as_new_documents_would_spread_the_value():
  """Data sets of 40 documents of 5 sentences that share an effect, drawn anew: f_all varies among them as
  the interval of one of them says, and a bootstrap of sentences would claim less than half of it."""
  rng = np.random.default_rng(3)
  draw = lambda: np.repeat(rng.normal(0.1, 1.0, 40), 5) + rng.normal(0, 0.3, 200)
  spread = np.std([draw().mean() for _ in range(2000)])
  before = dataclasses.replace(BEFORE, general=np.zeros(200))
  documents = [f"d{i // 5}" for i in range(200)]

  def width(documents) -> float:
    runs = (plus(before, general=draw()) for _ in range(20))
    groups = (forgetting.by_group(["all"] * 200, before, [run], documents, draws=400)["all"][1] for run in runs)
    intervals = [found["f_all"] for found in groups]
    return float(np.mean([(found.high - found.low) / (2 * 1.96) for found in intervals]))

  assert_allclose(width(documents), spread, rtol=0.12)
  assert width(None) < 0.6 * spread


def test_the_clustered_interval_is_that_of_drawing_whole_documents_by_hand():
  documents = [f"d{i % 8}" for i in range(50)]  # of 7 and of 6 texts
  after = plus(BEFORE, general=DRIFT.general)
  found = forgetting.reduce(TRIPLES, BEFORE, [after], documents, draws=4000).estimates["overall"]["f_all"]
  members = [np.flatnonzero(np.array(documents) == document) for document in sorted(set(documents))]
  rng = np.random.default_rng(9)
  means = [DRIFT.general[np.concatenate([members[c] for c in rng.integers(8, size=8)])].mean() for _ in range(4000)]
  assert_allclose([found.low, found.high], np.quantile(means, [0.025, 0.975]), atol=0.03)
