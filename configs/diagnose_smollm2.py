"""A small diagnosis on SmolLM2-135M-Instruct: gender in StereoSet, one corpus and a control, one remedy, two seeds.

  python -m jaxbias diagnose --config=configs/diagnose_smollm2.py --workdir=runs/diagnose_smollm2 \
    --config.data.source=stereoset/dev.json --config.data.corpus=corpus.jsonl

`corpus.jsonl` is running text of yours, {"id", "text"} a line; docs/diagnosis.md makes one of WikiText. Performance is
PIQA by likelihood, its first 100 questions.
Ten runs, about half an hour on two busy CPU cores; what they found is in docs/results.md.
"""

from jaxbias.config import defaults
from jaxbias.methods.grid import settings


def get_config():
  c = defaults()
  c.title = "Diagnosis on SmolLM2-135M-Instruct"
  c.seeds = (0, 1)
  c.data.source, c.data.corpus, c.data.domains = "stereoset/dev.json", "corpus.jsonl", ("gender",)
  c.train.steps, c.train.warmup_steps, c.train.checkpoint_every = 24, 2, 24
  c.train.rows = {"forget": 1, "retain": 8, "general": 4}
  c.train.learning_rate = 5e-4
  c.watch.steps, c.watch.split, c.watch.batches = "0,3,8,24", "test", 1
  c.eval.bootstrap_draws = 200
  end = lambda benchmark, data, metric, group, limit: {
    "benchmark": benchmark, "data": data, "metric": metric, "group": group, "limit": limit}  # fmt: skip
  with c.unlocked():
    c.diagnose = settings() | {
      "objectives": ("two_sided", "random"),
      "sizes": (50, 200),
      "remedy_sizes": (200,),
      "remedies": {"replay": {"remedy": "replay", "strength": 0.5}},
      "columns": {
        "downstream": end("piqa_cloze", "capability/piqa_validation.jsonl", "acc", "overall", 100),
      },
      "level": 8.0,
    }  # fmt: skip
  return c
