"""BiasUnlearn on GPT-2 large with its published settings, beside the same with our data and losses.

  python -m jaxbias compare --config=configs/biasunlearn_gpt2.py --workdir=runs/biasunlearn_gpt2 \
    --config.data.source=stereoset/dev.json

`biasunlearn_published_gpt2` has the published texts, answers that start 13 characters early, and losses;
`biasunlearn` has correct answers, a stratified adversarial quarter and one sigmoid a text. Both follow the published
script's phases, rates and stopping rule; `--config.control.name=signed` is our own controller. The paper's other
model of the kind: `--config.model=hf:openai-community/gpt2-medium`. An accelerator is needed: 240 texts a step.

Known of the published code (its run.sh and train.py): rate 4e-5, AdamW with decay 0.01 and no clipping, at most 1000
steps, LoRA 8/16 on the attention with dropout 0.1, weights 0.5 / 0.3 / 0.2, float32, scores a mean over tokens, and in
each process 4 texts to forget, 28 to retain and 28 for the anchor. Inferred: four processes. Otherwise than there: q, k
and v have adapters of their own (2.9 instead of 2.2 million numbers), dropout does not end with the first look, and
terms are split, where the published run trains on one file and stops and reports on another.
Source: Liu et al. 2025, sections 3 and 4; differences in docs/losses.md. Expected figures: not measured.
"""

from jaxbias import methods
from jaxbias.config import defaults


def get_config():
  c = defaults()
  c.title = "BiasUnlearn on GPT-2 large, StereoSet"
  c.model = "hf:openai-community/gpt2-large"
  c.dtype = "float32"
  c.data.source = "stereoset/dev.json"
  c.data.tasks = ("intrasentence", "intersentence")
  c.seeds = (123,)  # the published one
  c.compare = ("biasunlearn_published_gpt2", "biasunlearn")
  c.control.name = "published"
  c.control.script = "train"
  c.control.processes = 4
  c.lora.targets = ("q", "k", "v", "o")
  c.lora.dropout = 0.1
  c.train.steps = 1000
  c.train.warmup_steps = 10
  c.train.checkpoint_every = 50
  c.train.rows = {"forget": 16, "retain": 112, "general": 112}  # of four processes
  c.train.learning_rate = 4e-5
  c.train.weight_decay = 0.01
  c.train.clip_norm = 1e9  # none
  c.eval.scoring = "token_mean"
  with c.unlocked():
    c.variants = {name: methods.variant(name) for name in c.compare}
  return c
