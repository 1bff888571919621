"""Contrastive debiasing of SmolLM2-135M-Instruct on the built-in triples, beside cross-entropy of the same positives.

  python -m jaxbias compare --config=configs/contrastive_smollm2.py --workdir=runs/contrastive

Groups are made from the triples without another model (jaxbias/methods/contrastive.py); for your own, with
back-translations and refilled masks, see docs/data.md and set data.groups. Source: Korkmaz et al. 2025, sections 3-4;
differences in docs/losses.md. `contrastive_ce_only` answers whether a gain is the contrast's or the texts'.
"""

from jaxbias import methods
from jaxbias.config import defaults


def get_config():
  c = defaults()
  c.title = "Contrastive debiasing of SmolLM2-135M-Instruct"
  c.seeds = (0,)
  c.compare = ("contrastive", "contrastive_ce_only")
  c.train.steps = 20
  c.train.warmup_steps = 2
  c.train.groups = {"groups": 3, "positives": 3, "negatives": 4}
  c.train.learning_rate = 3e-4
  with c.unlocked():
    c.variants = {name: methods.variant(name) for name in c.compare}
  return c
