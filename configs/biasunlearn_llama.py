"""BiasUnlearn on Llama 3 8B Instruct with its published settings, beside the same with our data and losses.

  python -m jaxbias compare --config=configs/biasunlearn_llama.py --workdir=runs/biasunlearn_llama \
    --config.data.source=stereoset/dev.json

`biasunlearn_published` has the published texts and losses (answers start where they should in Llama's texts);
`biasunlearn` has a stratified adversarial quarter and one sigmoid a text. Both follow the published script's phases and
stopping rule; `--config.control.name=signed` is our own controller. The model has to be asked for at its hub; one that
fits a single chip: `--config.model=hf:meta-llama/Llama-3.2-1B-Instruct`. What a step needs on 8 devices:
`python -m jaxbias plan --config=configs/biasunlearn_llama.py --model-config=llama-3.1-8b`.

Known of the published code (its README and train_7B.py): rate 2e-5, AdamW with decay 0.01 and no clipping, at most
1000 steps, LoRA 8/16 on q, k, v and o with dropout 0.1, weights 0.5 / 0.3 / 0.2, and in each process 4 texts to forget,
28 to retain and 28 for the anchor. Inferred: four processes; the precision, as its DeepSpeed settings are not public.
Otherwise than there: dropout does not end with the first look, the start token is no part of the score, and terms are
split, where the published run trains on one file and stops and reports on another.
Source: Liu et al. 2025, sections 3 and 4; differences in docs/losses.md. Expected figures: not measured.
"""

from jaxbias import methods
from jaxbias.config import defaults


def get_config():
  c = defaults()
  c.title = "BiasUnlearn on Llama 3 8B Instruct, StereoSet"
  c.model = "hf:meta-llama/Meta-Llama-3-8B-Instruct"
  c.mesh.preset = "fsdp"
  c.data.source = "stereoset/dev.json"
  c.data.tasks = ("intrasentence", "intersentence")
  c.seeds = (123,)  # the published one
  c.compare = ("biasunlearn_published", "biasunlearn")
  c.control.name = "published"
  c.control.script = "train_7b"
  c.control.processes = 4
  c.lora.targets = ("q", "k", "v", "o")
  c.lora.dropout = 0.1
  c.train.steps = 1000
  c.train.warmup_steps = 10
  c.train.checkpoint_every = 50
  c.train.rows = {"forget": 16, "retain": 112, "general": 112}  # of four processes
  c.train.learning_rate = 2e-5
  c.train.weight_decay = 0.01
  c.train.clip_norm = 1e9  # none
  c.eval.scoring = "token_mean"
  with c.unlocked():
    c.variants = {name: methods.variant(name) for name in c.compare}
  return c
