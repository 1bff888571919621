"""Contrastive debiasing (Korkmaz et al. 2025, arXiv 2505.19327): states of what is true and civil are drawn together,
away from what is toxic, unsure or untrue, while the original text is learned.

Groups come from the config's `data.groups`; without one they are made from the triples, with no model: the
anti-stereotype and two framings of it against the stereotype, the sentence about other terms and a rude rewrite.
`python -m jaxbias groups` makes them with the model, too: it refills masked words, regenerates the sentence, and goes
on from its beginning where it is unsure. Those serve for trying the method, not for its published use, summaries of
posts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from jaxbias.data.generators import (
  Card,
  Draft,
  Generator,
  Limits,
  find_entities,
  framing,
  make_groups,
  swap_entities,
  toxic_rewrite,
)  # fmt: skip
from jaxbias.data.rows import Group, Split, Triple
from jaxbias.methods.recipes import Recipe, general_rows, grouped
from jaxbias.methods.registry import Method, register


def groups_of_triples(
  split: Split, seed: int, more: Mapping[str, Generator] = MappingProxyType({})
) -> tuple[list[Group], Card]:
  """One group a triple, and the counts of what each generator made; what could not be paired is left out.

  more: further generators of negatives, by kind.
  """
  terms: dict[str, set[str]] = {}
  for triple in split.triples:
    terms.setdefault(triple.domain, set()).add(triple.term)
  stereotypes = {triple.id: triple.stereotype for triple in split.triples}

  def draft(triple: Triple) -> Draft:
    text, others = triple.anti_stereotype, tuple(sorted(terms[triple.domain] - {triple.term}))
    fillings = tuple(sentence[triple.prefix :].strip(" .,;!?") for sentence in triple.sentences[:2])
    return Draft(triple.id, "", text, find_entities(text, [triple.term]), others, known=fillings)

  negatives = {"stereotype": lambda d, rng: [stereotypes[d.id]], "swap_ent": swap_entities, "toxic": toxic_rewrite}
  negatives |= more
  limits = Limits(jaccard={"low_confidence": 0.8})  # a stereotype differs by a word or two, and is meant to
  return make_groups(map(draft, split.triples), {"framing": framing}, negatives, seed, limits=limits)


def _groups(split: Split, seed: int) -> Sequence[Group]:
  return split.groups or groups_of_triples(split, seed)[0]


def recipe(split: Split, seed: int) -> Recipe:
  """retain = positives, forget = negatives, each after its source."""
  return grouped(_groups(split, seed), general_rows(split))


def published_recipe(split: Split, seed: int) -> Recipe:
  """The same texts with the published labels: neither an answer's first token nor its end is taught."""
  return grouped(_groups(split, seed), general_rows(split), labels="inside")


register(Method("contrastive", "contrastive", recipe, {
  "contrast": {"on": "retain", "weight": 1.0},
  "group_ce": {"on": "retain", "weight": 1.0},
}))  # fmt: skip

register(Method("contrastive_published", "contrastive, as published", published_recipe, {
  "contrast": {"on": "retain", "weight": 16.0, "temperature": 1.0, "empty": "zero", "w_mode": "none"},
  "group_ce": {"on": "retain", "weight": 1.0, "row": "last_positive", "denominator": "batch_all"},
}))  # fmt: skip

register(Method("contrastive_ce_only", "cross-entropy of the same positives", recipe, {
  "group_ce": {"on": "retain", "weight": 1.0},
}))  # fmt: skip
