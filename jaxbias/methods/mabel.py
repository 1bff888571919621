"""MABEL (He et al. 2022): entailments and their counterfactual twins, brought together by what they say.

Groups come from the config's `data.groups`: two positives each, a premise and the hypothesis that it entails. Their
twins are the group's two negatives, in the same order, or, where it has none, the same texts with every gendered word
exchanged (`jaxbias.data.swap`); entailments without such a word have no twin and are left out, as in the paper.
"""

from __future__ import annotations

import dataclasses

from jaxbias.data.rows import Group, Member, Split
from jaxbias.data.swap import Swapper
from jaxbias.errors import UserError
from jaxbias.methods.recipes import Recipe, general_rows, grouped
from jaxbias.methods.registry import Method, register


def with_twins(group: Group, swapper: Swapper) -> Group:
  """The group with a counterfactual of each of its two texts. Raises UserError for another number of texts."""
  if len(group.positives) != 2 or len(group.negatives) not in (0, 2):
    raise UserError(f"group `{group.id}` of data.groups has {len(group.positives)} positives and "
                    f"{len(group.negatives)} negatives; `mabel` reads a premise, a hypothesis and the twins of both, "
                    "or no twins.")
  twin = lambda member: Member(f"{member.id}/twin", swapper(member.text), "swap_ent")
  return dataclasses.replace(group, negatives=group.negatives or tuple(map(twin, group.positives)))


def recipe(split: Split, seed: int) -> Recipe:
  """retain = premises and hypotheses, forget = their twins, paired; a step reads whole groups.

  Raises UserError without groups, and where no group has a gendered word.
  """
  if not split.groups:
    raise UserError("the method `mabel` reads entailments from data.groups, which is empty; see docs/data.md.")
  swapper = Swapper()
  turned = [with_twins(group, swapper) for group in split.groups]
  differ = lambda group: any(a.text != b.text for a, b in zip(group.positives, group.negatives, strict=True))
  kept = [group for group in turned if differ(group)]
  if not kept:
    raise UserError("no entailment of data.groups has a gendered word, so that none has a counterfactual twin.")
  return dataclasses.replace(grouped(kept, general_rows(split)), paired=True)


register(Method("mabel", "MABEL", recipe, {
  "mabel_contrast": {"on": "retain", "weight": 1.0},
  "mabel_alignment": {"on": "retain", "weight": 0.05},
  "sft": {"on": "retain", "weight": 0.1},
}))  # fmt: skip
