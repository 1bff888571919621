"""Contrastive debiasing of SmolLM2-135M-Instruct on the built-in triples, beside cross-entropy of the same positives.

  python -m jaxbias groups --config=configs/contrastive_smollm2.py --out=groups.jsonl
  python -m jaxbias compare --config=configs/contrastive_smollm2.py --config.data.groups=groups.jsonl \
    --workdir=runs/contrastive

The first command makes the groups with the model itself (refilled, regenerated and unsure texts); without it they are
made from the triples alone (jaxbias/methods/contrastive.py). For your own, with back-translations, see docs/data.md.
Source: Korkmaz et al. 2025, sections 3-4; differences in docs/losses.md. `contrastive_ce_only` answers whether a gain
is the contrast's or the texts'. Expected, three seeds: SS stays (67.4 -> 68.5), F_all -0.47 (docs/results.md).
"""

from jaxbias import methods
from jaxbias.config import defaults


def get_config():
  c = defaults()
  c.title = "Contrastive debiasing of SmolLM2-135M-Instruct"
  c.seeds = (0, 1, 2)
  c.compare = ("contrastive", "contrastive_ce_only")
  c.train.steps = 20
  c.train.warmup_steps = 2
  c.train.groups = {"groups": 3, "positives": 3, "negatives": 4}
  c.train.learning_rate = 3e-4
  with c.unlocked():
    c.variants = {name: methods.variant(name) for name in c.compare}
  return c
