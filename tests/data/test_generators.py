"""Generators of positives and negatives: what they make, what the filters drop, and that every text is counted."""

from __future__ import annotations

import numpy as np
import pytest

from jaxbias.data.generators import (
  Draft,
  Limits,
  back_translation,
  find_entities,
  framing,
  jaccard,
  lexicon_toxicity,
  low_confidence,
  make_groups,
  mask_and_refill,
  regenerate,
  swap_entities,
  toxic_rewrite,
  without_repeats,
)
from jaxbias.data.rows import KINDS, MASK

TEXT = "The nurse met Anna Smith in Rome on 12 May."
RNG = lambda: np.random.default_rng(0)


def draft(text: str = TEXT, source: str = "They spoke of Paris and of 40 days.", **how) -> Draft:
  return Draft("d", source, text, find_entities(text, ["nurse"]), ("doctor",), **how)


def named(text: str, *known: str) -> list[str]:
  return [text[start:end] for start, end in find_entities(text, known)]


def test_entities_are_names_numbers_and_known_words():
  assert named(TEXT, "nurse") == ["nurse", "Anna Smith", "Rome", "12", "May"]
  assert named("Nothing here.") == [] and named("Rome is old.", "Rome") == ["Rome"]
  assert named("It cost 1,234.50.") == ["1,234.50"]


def test_framings_keep_the_text_and_its_names():
  made = framing(draft(), RNG())
  assert len(made) == len(set(made)) == 4 and all(text.endswith("the nurse met Anna Smith in Rome on 12 May.") for text
                                                  in made)  # fmt: skip
  assert all("Rome fell" in text for text in framing(Draft("d", "", "Rome fell.", ((0, 4),)), RNG()))


def test_a_swap_exchanges_one_or_two_entities_for_others_of_their_type():
  for seed in range(20):
    for count, text in enumerate(swap_entities(draft(), np.random.default_rng(seed)), start=1):
      ours, theirs = TEXT.rstrip(".").split(), text.rstrip(".").split()
      new = set(theirs) - set(ours)
      assert 1 <= len(new) <= count and new <= {"doctor", "Paris", "40"}
      assert "12" in text.split() or "40" in text.split(), "a number for a number"
  assert swap_entities(Draft("d", "", "No names.", ()), RNG()) == []


def test_masks_are_refilled_by_whoever_fills():
  seen = []

  def fill(texts):
    seen.extend(texts)
    return [["X"] * text.count(MASK) for text in texts]

  made = [mask_and_refill(fill)(draft(), np.random.default_rng(seed))[0] for seed in range(30)]
  assert {text.count(MASK) for text in seen} == {1, 2, 3}
  assert [text.count("X") for text in made] == [text.count(MASK) for text in seen]
  assert not any(MASK in text for text in made)
  assert mask_and_refill(fill)(Draft("d", "", "No names.", ()), RNG()) == []
  relations = mask_and_refill(fill, spans=lambda d: ((10, 13),))
  assert relations(draft(), RNG()) == [TEXT.replace("met", "X")]


def test_the_other_generators_ask_what_they_are_given():
  assert back_translation(lambda text: [text.upper()])(draft(), RNG()) == [TEXT.upper()]
  again = regenerate(lambda source, masked: f"{source}|{masked}")(draft(), RNG())
  assert again[0].startswith("They spoke") and again[0].count(MASK) == 1
  sample = lambda source: [("sure", 0.9), ("less", 0.2), ("least", 0.1)]
  assert low_confidence(sample, most=0.21)(draft(), RNG()) == ["least", "less"]


def test_a_rude_rewrite_is_rude():
  assert lexicon_toxicity(TEXT) == 0.0
  assert all(lexicon_toxicity(toxic_rewrite(draft(), np.random.default_rng(s))[0]) >= 0.4 for s in range(8))


def test_small_helpers():
  assert jaccard("a b c", "A b d") == 0.5 and jaccard("", "") == 0.0
  assert without_repeats("One. One. Two.") == "One. Two."


def test_every_text_is_kept_or_dropped_for_a_reason():
  negatives = {
    "toxic": lambda d, rng: ["He said so, kindly."],
    "low_confidence": lambda d, rng: ["Too few.", TEXT, "Something else was going on here.", "And one more of these."],
    "mask_ent": lambda d, rng: [TEXT.replace("Rome", MASK), TEXT.replace("Rome", "Oslo"), TEXT.replace("Rome", "OSLO")],
    "stereotype": lambda d, rng: [TEXT.replace("met", "saw")],
  }
  groups, card = make_groups([draft(), Draft("e", "", "Go on now.", ())], {"framing": framing}, negatives, seed=0)
  assert [len(g.positives) for g in groups] == [3, 3] and card.groups == 2
  assert card.dropped["toxic", "not toxic"] == 2
  assert card.dropped["low_confidence", "repeats another"] == 1 and card.dropped["low_confidence", "too short"] == 2
  assert card.dropped["mask_ent", "not filled"] == 2 and card.dropped["mask_ent", "repeats another"] == 2
  assert card.dropped["stereotype", "too near a positive"] == 1
  for kind in KINDS:
    assert card.made[kind] == card.kept[kind] + sum(n for (k, _), n in card.dropped.items() if k == kind)
  assert all(member.kind in KINDS for group in groups for member in group.positives + group.negatives)
  text = card.markdown()
  assert "2 groups" in text and "| mask_ent | 6 | 2 |" in text


def test_a_source_of_one_positive_is_left_out_and_counted():
  groups, card = make_groups([draft()], {}, {"toxic": toxic_rewrite}, seed=0)
  assert groups == [] and card.without_pair == 1 and "1 more had fewer than two positives" in card.markdown()


def test_groups_follow_the_seed_and_nothing_else():
  of = lambda seed: make_groups([draft()] * 3, {"framing": framing}, {"swap_ent": swap_entities}, seed)[0]
  assert of(1) == of(1) != of(2)


@pytest.mark.parametrize("most", [0, 1, 3])
def test_at_most_so_many_of_a_kind(most):
  limits = Limits(most={"framing": most + 2, "swap_ent": most})
  groups, card = make_groups([draft()], {"framing": framing}, {"swap_ent": swap_entities}, 0, limits=limits)
  assert len(groups[0].negatives) == min(most, card.made["swap_ent"])


def test_who_may_be_near_a_positive_is_chosen_by_kind():
  negatives = {"low_confidence": lambda d, rng: [f"{TEXT} Indeed."], "stereotype": lambda d, rng: [f"{TEXT} Truly."]}
  for allowed, kinds in (({}, {"low_confidence", "stereotype"}), ({"low_confidence": 0.8}, {"stereotype"})):
    groups, card = make_groups([draft()], {"framing": framing}, negatives, 0, limits=Limits(jaccard=allowed))
    assert {member.kind for member in groups[0].negatives} == kinds
    assert card.dropped["low_confidence", "too near a positive"] == 2 - len(kinds)
