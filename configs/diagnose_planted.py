"""The diagnosis on the planted language: four corpora, three sizes, seven remedies, three seeds, a tiny model.

  python -m jaxbias diagnose --config=configs/diagnose_planted.py --workdir=runs/diagnose_planted

Writes the language, fits its start model to the known optimum (log 4 nats a pronoun), trains and watches 57 runs.
Bias is `gap_size`, |log p(expected) - log p(other)| of the pronoun, since SS stays at 100 until the gap has closed;
performance is how many of 80 facts are still told from three wrong names. Expected: the gap of 1.39 ends at 0.02 for
the largest two-sided corpus and stays at 1.35 for the unswapped one (docs/results.md); under 10 minutes on two cores.
"""

from jaxbias.config import defaults
from jaxbias.methods.grid import settings


def get_config():
  c = defaults()
  c.title = "Diagnosis on the planted language"
  c.seeds = (0, 1, 2)
  c.lora.rank, c.train.base = 0, ("*",)
  c.train.steps, c.train.warmup_steps, c.train.checkpoint_every = 300, 4, 300
  c.train.rows = {"forget": 1, "retain": 32, "general": 16}
  c.train.learning_rate = 1e-3
  c.watch.steps, c.watch.split, c.watch.batches = "0,3,10,30,100,300", "test", 1
  c.eval.bootstrap_draws = 200
  with c.unlocked():
    c.diagnose = settings() | {
      "planted": True,
      "sizes": (25, 250, 2500),
      "remedies": {
        "replay": {"remedy": "replay", "strength": 0.5},
        "ewc": {"remedy": "ewc", "strength": 1.0},
        "l2sp": {"remedy": "l2sp", "strength": 0.01},
        "distill": {"remedy": "distill", "strength": 1.0},
        "mixout": {"remedy": "mixout", "strength": 0.5},
        "fusion": {"remedy": "fusion", "strength": 0.8},
        "slower": {"remedy": "learning_rate", "strength": 0.3},
      },
      "remedy_sizes": (250,),
      "columns": {"downstream": {"benchmark": "openbookqa_cloze", "data": "facts.jsonl", "metric": "acc",
                                 "group": "overall", "limit": 0}},
      "bias": "gap_size",
      "level": 0.4,
      "target": 0.2,
    }  # fmt: skip
  return c
