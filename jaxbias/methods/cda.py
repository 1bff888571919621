"""Counterfactual data augmentation and its controls: cross-entropy of texts made of the config's `data.corpus`.

A variant's `texts` says which: {"corpus": one of two_sided, one_sided, unswapped, random, "n": source texts}. General
text, for remedies that read some, is the data set's own. Source: classical CDA (Meade et al. 2022) as the fairness
objective of Liu et al. 2025, arXiv 2509.21456; see docs/diagnosis.md.
"""

from __future__ import annotations

from jaxbias.data.corpora import Pool, make
from jaxbias.data.rows import Split
from jaxbias.errors import UserError
from jaxbias.methods.recipes import Recipe, Row, general_rows
from jaxbias.methods.registry import Method, register


def recipe(split: Split, seed: int, corpus: str = "two_sided", n: int = 1000) -> Recipe:
  """retain = the corpus. Raises UserError where the pool is missing or too small."""
  if not split.pool and not split.overlapping:
    raise UserError("the method `cda` makes its texts of data.corpus, which is empty; give it a file of texts.")
  texts, _ = make(Pool(split.pool, split.overlapping), corpus, n, seed)
  return Recipe((), tuple(Row(text.id, text.text, 0) for text in texts), general_rows(split), paired=False)


register(Method("cda", "counterfactual data augmentation", recipe, {"sft": {"on": "retain", "weight": 1.0}}))
