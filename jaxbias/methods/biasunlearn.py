"""BiasUnlearn (Liu et al. 2025, arXiv 2509.25673): forget stereotypes, retain anti-stereotypes, anchor the rest.

The adversarial forget set puts a quarter of the anti-stereotypes among the texts to forget, so that the bias does
not flip. The published code takes the first quarter of a list ordered by bias type, which is all of gender and some
of profession; `biasunlearn` takes a quarter of each type. The weights 0.5 / 0.3 / 0.2 are those of the published run
script (the paper's appendix is quoted with 0.4 / 0.4 / 0.2). Dynamic swapping is in methods/controllers.py.
"""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Sequence

from jaxbias.data.rows import Split
from jaxbias.data.sources import BLANK, DOMAINS, usable_for_training
from jaxbias.methods.recipes import (
  Recipe,
  Row,
  anti_stereotype_row,
  general_rows,
  stereotype_row,
  stratified_share,
  unrelated_row,
)  # fmt: skip
from jaxbias.methods.registry import Method, register

ADVERSARIAL_SHARE = 0.25
GPT2_START = "<|endoftext|>"  # written before GPT-2's texts by the published code, and not counted in their contexts


def recipe(split: Split, seed: int) -> Recipe:
  """forget = stereotypes + a stratified quarter of the anti-stereotypes; retain = all anti-stereotypes."""
  adversarial = stratified_share(split.triples, ADVERSARIAL_SHARE, seed)
  return Recipe(
    (*map(stereotype_row, split.triples), *map(anti_stereotype_row, adversarial)),
    tuple(map(anti_stereotype_row, split.triples)),
    general_rows(split),
    paired=False,
  )


def published_recipe(split: Split, seed: int, early: int = 0) -> Recipe:
  """The published code's texts in its order (specification 2.2): by bias type, of each the intersentence texts first.

  forget = stereotypes + the first quarter of this list of anti-stereotypes; where one type trains alone, + the first
  quarter of that type's, intersentence texts as a rule. general = the unrelated sentences. `seed` shuffles each task's
  texts as Python's `random` does. Answers start `early` characters too early.
  """
  shuffled = [[t for t in split.triples if (BLANK in t.context) == intra] for intra in (False, True)]
  rng = random.Random(seed)
  for triples in shuffled:
    rng.shuffle(triples)
  inter, intra = shuffled
  triples = [*inter, *filter(usable_for_training, intra)]
  moved = lambda row: dataclasses.replace(row, prefix=max(row.prefix - early, 0))
  of_types = lambda row: [[moved(row(t)) for t in triples if t.domain == domain] for domain in DOMAINS]
  stereotypes, anti = of_types(stereotype_row), of_types(anti_stereotype_row)
  retain, general = joined(anti), tuple(map(unrelated_row, triples))
  alone = Recipe(joined(stereotypes) + joined(map(first_share, anti)), retain, general, paired=False)
  return Recipe(joined(stereotypes) + first_share(retain), retain, general, paired=False, alone=alone)


def joined(lists) -> tuple[Row, ...]:
  return tuple(row for rows in lists for row in rows)


def first_share(rows: Sequence[Row]) -> tuple[Row, ...]:
  return tuple(rows[: int(ADVERSARIAL_SHARE * len(rows))])


register(Method("biasunlearn", "BiasUnlearn", recipe, {
  "npo": {"on": "forget", "weight": 0.5, "beta": 0.1},
  "sft": {"on": "retain", "weight": 0.3},
  "kl": {"on": "general", "weight": 0.2},
}))  # fmt: skip

PUBLISHED_LOSSES = {
  "npo": {"on": "forget", "weight": 0.5, "beta": 0.1, "reduction": "batch_token_mean"},
  "sft": {"on": "retain", "weight": 0.3},
  "kl": {"on": "general", "weight": 0.2, "divergence": "cross_entropy", "over": "padded", "padded_length": 100.0},
}

register(Method("biasunlearn_published", "BiasUnlearn, as published", published_recipe, PUBLISHED_LOSSES))

register(Method("biasunlearn_published_gpt2", "BiasUnlearn, as published for GPT-2",
                functools.partial(published_recipe, early=len(GPT2_START)), PUBLISHED_LOSSES))  # fmt: skip
