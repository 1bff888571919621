"""BiasUnlearn (Liu et al. 2025, arXiv 2509.25673): forget stereotypes, retain anti-stereotypes, anchor the rest.

The adversarial forget set puts a quarter of the anti-stereotypes among the texts to forget, so that the bias does
not flip. The published code takes the first quarter of a list ordered by bias type, which is all of gender and some
of profession; here it is a quarter of each type. The weights 0.5 / 0.3 / 0.2 are those of the published run script
(the paper's appendix is quoted with 0.4 / 0.4 / 0.2). Dynamic swapping is not part of this file yet.
"""

from __future__ import annotations

from jaxbias.data.rows import Split
from jaxbias.methods.recipes import Recipe, anti_stereotype_row, general_rows, stereotype_row, stratified_share
from jaxbias.methods.registry import Method, register

ADVERSARIAL_SHARE = 0.25


def recipe(split: Split, seed: int) -> Recipe:
  """forget = stereotypes + a stratified quarter of the anti-stereotypes; retain = all anti-stereotypes."""
  adversarial = stratified_share(split.triples, ADVERSARIAL_SHARE, seed)
  return Recipe(
    (*map(stereotype_row, split.triples), *map(anti_stereotype_row, adversarial)),
    tuple(map(anti_stereotype_row, split.triples)),
    general_rows(split),
    paired=False,
  )


register(Method("biasunlearn", "BiasUnlearn", recipe, {
  "npo": {"on": "forget", "weight": 0.5, "beta": 0.1},
  "sft": {"on": "retain", "weight": 0.3},
  "kl": {"on": "general", "weight": 0.2},
}))  # fmt: skip
