"""`groups`: contrast groups of a config's training triples, with negatives that its own model writes.

Beside what `methods.contrastive` makes without a model (framings, the stereotype, other terms, a rude rewrite): a term
masked and filled again; of a causal model the sentence regenerated around a masked term, and endings of which it is not
sure (Korkmaz et al. 2025, section 3, there with summaries of posts).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from jaxbias.data.generators import Card, Draft, Generator, Together, low_confidence, mask_and_refill, regenerate
from jaxbias.data.groups import write_groups
from jaxbias.data.rows import Group, Split
from jaxbias.evals.refill import filler, rewriter, unsure
from jaxbias.files import replace
from jaxbias.inputs import load_data
from jaxbias.methods.contrastive import groups_of_triples
from jaxbias.models import language_model
from jaxbias.models.language_model import LanguageModel
from jaxbias.progress import Tracker

UNSURE = 0.3  # a continuation whose tokens have at most this mean probability is low in confidence


def write(config, path: Path) -> Card:
  """Groups of the training triples as `path`, which `data.groups` reads, and the card beside it as FILE.md.

  Raises UserError for data or a model that cannot be used.
  """
  chosen = config.data.copy_and_resolve_references()
  chosen.groups = chosen.corpus = ""  # groups are what is made here
  split = load_data(chosen).train
  model = language_model.load(config.model, None if config.dtype == "auto" else config.dtype)
  groups, card = written_groups(model, split, config.seeds[0])
  write_groups(path, groups)
  replace(path.with_suffix(".md"), card.markdown().encode())
  return card


def written_groups(model: LanguageModel, split: Split, seed: int) -> tuple[list[Group], Card]:
  """`groups_of_triples` with the model's own negatives. The groups are made twice: once to learn what the model is to
  be asked, so that it answers in large batches, and once with its answers."""
  fill, rewrite = Together(filler(model, seed=seed), [""]), Together(rewriter(model), "")
  sample = Together(unsure(model, samples=4, max_tokens=16, seed=seed), ())
  more = {"mask_ent": mask_and_refill(lambda texts: [*map(fill, texts)], most=1)}
  if model.config.causal:
    more |= {"regen_ent": regenerate(lambda *pair: rewrite(pair)), "low_confidence": unsure_endings(split, sample)}
  groups_of_triples(split, seed, more)
  asked = {"refill": fill, "regenerate": rewrite, "go on": sample} if model.config.causal else {"refill": fill}
  with Tracker("groups", len(asked)) as tracker:
    for name, together in asked.items():
      tracker.phase(f"{name}: {len(together.asked)} texts", 1, 1)
      together.answer()
      tracker.advance(1)
  return groups_of_triples(split, seed, more)


def unsure_endings(split: Split, sample: Callable[[str], Sequence[tuple[str, float]]]) -> Generator:
  """What the sentences of a triple begin with, and the first line of what the model makes of it."""
  ending = low_confidence(sample, UNSURE)
  beginnings = {triple.id: triple.anti_stereotype[: triple.prefix].rstrip() for triple in split.triples}

  def make(draft: Draft, rng: np.random.Generator) -> list[str]:
    beginning = beginnings[draft.id]
    endings = ending(dataclasses.replace(draft, source=beginning), rng) if beginning else []
    return [beginning + text.split("\n")[0].rstrip() for text in endings]

  return make
