"""`groups`: contrast groups of a config's training triples, with negatives that its own model writes.

Beside what `methods.contrastive` makes without a model (framings, the stereotype, other terms, a rude rewrite): a term
masked and filled again; of a causal model the sentence regenerated around a masked term, and endings of which it is not
sure (Korkmaz et al. 2025, section 3, there with summaries of posts).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from jaxbias.data import sources
from jaxbias.data.generators import Card, Draft, Generator, low_confidence, mask_and_refill, regenerate
from jaxbias.data.groups import write_groups
from jaxbias.data.rows import Split
from jaxbias.evals.refill import filler, rewriter, unsure
from jaxbias.files import replace
from jaxbias.methods.contrastive import groups_of_triples
from jaxbias.models import language_model
from jaxbias.models.language_model import LanguageModel
from jaxbias.progress import Tracker

UNSURE = 0.3  # a continuation whose tokens have at most this mean probability is low in confidence


def write(config, path: Path) -> Card:
  """Groups of the training triples as `path`, which `data.groups` reads, and the card beside it as FILE.md.

  Raises UserError for data or a model that cannot be used.
  """
  split = sources.load(config.data.source, config.data.split_file or None).train
  model = language_model.load(config.model, None if config.dtype == "auto" else config.dtype)
  seed = config.seeds[0]
  with Tracker("groups", len(split.triples)) as tracker:
    tracker.phase("triples", len(split.triples), len(split.triples))
    groups, card = groups_of_triples(split, seed, negatives_of(model, split, seed), tracker.advance)
  write_groups(path, groups)
  replace(path.with_suffix(".md"), card.markdown().encode())
  return card


def negatives_of(model: LanguageModel, split: Split, seed: int) -> dict[str, Generator]:
  """The generators that need the model, by kind."""
  refilled = {"mask_ent": mask_and_refill(filler(model, seed=seed), most=1)}
  if not model.config.causal:
    return refilled
  ending = low_confidence(unsure(model, samples=4, max_tokens=16, seed=seed), UNSURE)
  beginnings = {triple.id: triple.anti_stereotype[: triple.prefix].rstrip() for triple in split.triples}

  def unsure_ending(draft: Draft, rng: np.random.Generator) -> list[str]:
    """What the sentences of a triple begin with, and the first line of what the model makes of it."""
    beginning = beginnings[draft.id]
    endings = ending(dataclasses.replace(draft, source=beginning), rng) if beginning else []
    return [beginning + text.split("\n")[0].rstrip() for text in endings]

  return refilled | {"regen_ent": regenerate(rewriter(model)), "low_confidence": unsure_ending}
