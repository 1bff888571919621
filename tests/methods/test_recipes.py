"""Which texts a method reads in which role: pairing, the adversarial share, and what depends on the seed."""

from __future__ import annotations

import collections
import copy
import dataclasses

import pytest

from jaxbias import methods
from jaxbias.data.rows import Group, Member, Split, Text, Triple
from jaxbias.errors import UserError
from jaxbias.losses.registry import LOSSES, parse
from jaxbias.methods.biasunlearn import ADVERSARIAL_SHARE
from jaxbias.methods.recipes import plain, stratified_share
from jaxbias.methods.registry import METHODS
from jaxbias.types import ROLES

COUNTS = {"gender": 8, "profession": 40, "race": 21, "religion": 2}


def triples(counts=COUNTS) -> tuple[Triple, ...]:
  """Ordered by domain, as StereoSet is, which is where a first quarter goes wrong."""
  sentences = lambda n: (f"They are s{n}.", f"They are a{n}.", "They are x.")
  make = lambda domain, n: Triple(f"{domain}-{n}", domain, f"term {n}", "They are BLANK.", sentences(n), prefix=8)
  return tuple(make(domain, n) for domain, count in counts.items() for n in range(count))


POOL = tuple(Text(f"p{i}", f"He saw {i} birds.") for i in range(1000))  # of which `cda` makes its texts
ENTAILED = tuple(Member(f"e{i}", text, "original") for i, text in enumerate(("A man sleeps.", "He sleeps.")))
SPLIT = Split(triples(), (Text("t1", "Water is wet."), Text("t2", "Stones are hard.")), pool=POOL)


def test_plain_pairs_the_two_fillings_of_each_triple():
  recipe = plain(SPLIT, seed=0)
  assert recipe.paired and len(recipe.forget) == len(recipe.retain) == len(SPLIT.triples)
  for triple, forget, retain in zip(SPLIT.triples, recipe.forget, recipe.retain, strict=True):
    assert (forget.id, retain.id) == (f"{triple.id}/stereotype", f"{triple.id}/anti-stereotype")
    assert (forget.text, retain.text) == triple.sentences[:2]
    assert forget.prefix == retain.prefix == triple.prefix and forget.text[:8] == retain.text[:8] == "They are"
  assert [(row.id, row.text, row.prefix) for row in recipe.general] == [(t.id, t.text, 0) for t in SPLIT.texts]
  other = plain(SPLIT, seed=1)
  assert [other.rows(role) for role in ROLES[:3]] == [recipe.rows(role) for role in ROLES[:3]]


def test_a_mismatched_text_has_one_texts_prefix_and_anothers_answer():
  recipe = plain(SPLIT, seed=0)
  texts = {row.id: row for row in (*recipe.forget, *recipe.retain)}
  assert len(recipe.mismatched) == len(texts)
  for row in recipe.mismatched:
    first, second = (texts[name] for name in row.id.split(" with "))
    assert first != second and row.text == first.text[: first.prefix] + second.text[second.prefix :]
  for half in (recipe.mismatched[: len(recipe.forget)], recipe.mismatched[len(recipe.forget) :]):
    assert len({row.id.split(" with ")[1] for row in half}) == len(half)  # every answer is used once
  assert plain(SPLIT, 1).mismatched != recipe.mismatched == plain(SPLIT, 0).mismatched
  alone = Split(SPLIT.triples[:1], SPLIT.texts)
  assert plain(alone, 0).mismatched == ()


def test_biasunlearn_forgets_all_stereotypes_and_a_quarter_of_each_domains_anti_stereotypes():
  recipe = methods.get("biasunlearn").recipe(SPLIT, seed=3)
  stereotypes = [row for row in recipe.forget if row.id.endswith("/stereotype")]
  adversarial = [row for row in recipe.forget if row.id.endswith("/anti-stereotype")]
  assert stereotypes == list(plain(SPLIT, 0).forget) and recipe.retain == plain(SPLIT, 0).retain
  assert len(stereotypes) + len(adversarial) == len(recipe.forget) == 71 + 2 + 10 + 5 + 0
  drawn = collections.Counter(row.id.split("-")[0] for row in adversarial)
  assert drawn == {"gender": 2, "profession": 10, "race": 5}  # of religion's two, a half rounds to none
  assert set(adversarial) < set(recipe.retain), "they are both forgotten and retained, and none is drawn twice"
  assert len(set(recipe.forget)) == len(recipe.forget)
  assert not recipe.paired and recipe.general == plain(SPLIT, 0).general


def test_the_adversarial_share_follows_the_seed_and_nothing_else():
  recipe = methods.get("biasunlearn").recipe
  assert recipe(SPLIT, 3) == recipe(SPLIT, 3)
  drawn = {tuple(row.id for row in recipe(SPLIT, seed).forget[71:]) for seed in range(8)}
  assert len(drawn) == 8
  shuffled = Split(SPLIT.triples[::-1], SPLIT.texts)
  assert len(recipe(shuffled, 3).forget) == len(recipe(SPLIT, 3).forget)


@pytest.mark.parametrize("share", [0.0, ADVERSARIAL_SHARE, 0.5, 1.0])
def test_a_stratified_share_is_that_share_of_every_domain(share):
  chosen = stratified_share(SPLIT.triples, share, seed=0)
  counts = collections.Counter(triple.domain for triple in chosen)
  for domain, count in COUNTS.items():
    assert abs(counts[domain] - share * count) <= 0.5
  assert len(set(chosen)) == len(chosen) and set(chosen) <= set(SPLIT.triples)


def test_over_seeds_every_member_of_a_domain_is_drawn_alike():
  drawn = collections.Counter(t.id for seed in range(400) for t in stratified_share(triples({"gender": 8}), 0.25, seed))
  assert len(drawn) == 8 and all(60 < count < 140 for count in drawn.values())  # 100 expected, 4.6 standard deviations


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_composes_registered_losses_and_feeds_their_roles(name):
  method = methods.get(name)
  objective, coefficients = parse(method.losses)
  assert set(coefficients) <= set(LOSSES) and method.label
  entailments = (Group("e", "", ENTAILED, ()),) if name == "mabel" else ()  # others make groups of triples
  recipe = method.recipe(dataclasses.replace(SPLIT, groups=entailments), 0)
  assert all(recipe.rows(role) for role in objective.roles)
  assert recipe.paired or "pairs" not in objective.needs
  if recipe.paired:
    assert [r.id.split("/")[0] for r in recipe.forget] == [r.id.split("/")[0] for r in recipe.retain]


def test_biasunlearn_has_the_weights_of_the_published_run_script():
  weights = {name: loss["weight"] for name, loss in methods.get("biasunlearn").losses.items()}
  assert weights == {"npo": 0.5, "sft": 0.3, "kl": 0.2}
  assert methods.get("biasunlearn").losses["npo"]["beta"] == 0.1


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_variant_may_be_changed_without_changing_the_method(name):
  before = copy.deepcopy(dict(METHODS[name].losses))
  variant = methods.variant(name)
  assert (variant["method"], variant["label"], variant["losses"]) == (name, METHODS[name].label, before)
  for loss in variant["losses"].values():
    loss["weight"] = 99.0
  variant["losses"]["other"] = {}
  assert dict(METHODS[name].losses) == before and methods.variant(name)["losses"] == before


def test_an_unknown_method_is_named_with_the_nearest():
  with pytest.raises(UserError, match="there is no method `biasunlern`; did you mean `biasunlearn`?"):
    methods.variant("biasunlern")
