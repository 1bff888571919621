"""Five objectives on SmolLM2-135M-Instruct and the built-in triples: who got fairer, who forgot what.

  python -m jaxbias compare --config=configs/quickstart.py --workdir=runs/quickstart

Two CPU cores: 9 minutes from an empty cache, 2.0 GiB. Expected on test terms (2 seeds, 95 % intervals over 24 terms):
SS 67.4 of the base model and 63.2 to 64.9 behind every objective, each give or take 7 points; LMS 99.0, and 97.7 to
98.8 behind; overall forgetting in nats a token: SFT 0.07, DPO 0.12, BiasUnlearn 0.21, NPO 0.22, gradient ascent 0.28.
"""

from jaxbias import methods
from jaxbias.config import defaults


def get_config():
  c = defaults()
  c.title = "Five objectives on SmolLM2-135M-Instruct"
  c.seeds = (0, 1)
  c.compare = ("sft", "ga", "npo", "dpo", "biasunlearn")
  c.train.steps = 12
  c.train.warmup_steps = 2
  c.train.rows = {"forget": 6, "retain": 6, "general": 3}
  c.train.learning_rate = 5e-4
  with c.unlocked():
    c.variants = {name: methods.variant(name) for name in c.compare}
  # Rate x steps was chosen on the validation terms. One rate cannot serve all: at the rate that suits negative
  # preference optimisation, learning from anti-stereotypes moves nothing but the style, and at the rate that suits
  # learning, negative preference optimisation takes the language model apart.
  c.variants.sft.learning_rate_scale = 5.0
  c.variants.dpo.learning_rate_scale = 2.5
  return c
