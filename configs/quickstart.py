"""Five objectives on SmolLM2-135M-Instruct and the built-in triples: who got fairer, who forgot what.

  python -m jaxbias compare --config=configs/quickstart.py --workdir=runs/quickstart
"""

from jaxbias import methods
from jaxbias.config import defaults


def get_config():
  c = defaults()
  c.title = "Five objectives on SmolLM2-135M-Instruct"
  c.seeds = (0, 1)
  c.train.steps = 30
  c.compare = ("sft", "ga", "npo", "dpo", "biasunlearn")
  with c.unlocked():
    c.variants = {name: methods.variant(name) for name in c.compare}
  return c
