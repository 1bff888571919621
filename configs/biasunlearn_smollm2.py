"""BiasUnlearn with dynamic swapping on SmolLM2-135M-Instruct: StereoSet's train terms -> its test terms.

  python -m jaxbias compare --config=configs/biasunlearn_smollm2.py --workdir=runs/biasunlearn \
    --config.data.source=stereoset/dev.json

A controller looks at the validation terms every 12 steps, exchanges forget and retain texts of a bias type whose
score fell below 50, stops when all four types are within two points of 50, and the best state that it saw is
evaluated on the test terms. `controller.jsonl` in each run's folder is its log; `--config.control.name=published`
follows the published scripts instead. Source: Liu et al. 2025, sections 3 and 4; differences in docs/losses.md.
NPO is averaged over an answer's tokens, to which the published weights belong, and beta = 1 leaves alone what has lost
about two nats a token. Expected on the test terms, three seeds: SS 60.9 -> 56.3, LMS 86.6 -> 84.6, F_all +0.13
(docs/results.md); about 10 minutes a seed on two CPU cores.
"""

from jaxbias import methods
from jaxbias.config import defaults


def get_config():
  c = defaults()
  c.title = "BiasUnlearn on SmolLM2-135M-Instruct, StereoSet"
  c.data.source = "stereoset/dev.json"
  c.seeds = (0, 1, 2)
  c.compare = ("biasunlearn",)
  c.control.name = "signed"
  c.control.every = 12
  c.train.steps = 96
  c.train.warmup_steps = 4
  c.train.checkpoint_every = 12
  c.train.rows = {"forget": 4, "retain": 12, "general": 4}
  c.train.learning_rate = 3e-4
  with c.unlocked():
    c.variants = {name: methods.variant(name) for name in c.compare}
    c.variants.biasunlearn.losses.npo.update({"reduction": "seq_mean", "beta": 1.0})
  return c
