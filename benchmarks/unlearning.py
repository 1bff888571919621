"""How fast an unlearning step is, beside a peer: NPO on texts to forget, cross-entropy on texts to keep, KL on a third.

  python benchmarks/unlearning.py --rows FILE.jsonl [--peer hf_baseline.py --peer-python PYTHON] [--steps 10]
  python benchmarks/unlearning.py --model FOLDER --seq 512 --batch 16      # random tokens, for any size of model

A row is {"id", "context", "options"}: option 0 is the text to forget, option 1 the one to keep. Both sides draw `batch`
texts of each of the three roles for a step, train adapters of the same rank on every projection, and count a text's
tokens once, its start token with them, whatever the step does with it. Our reference is computed once for all texts and
is timed apart; the peer asks its second model in every step. Medians over steps, compiling apart. The peer is a script
that prints one JSON line with `tokens_per_s`, `s_per_step`, `peak_rss_mib`, `first_loss` and `last_loss`; it runs after
ours in a process of its own, and PYTHON has torch, transformers and peft. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from jaxbias import config
from jaxbias.data.pipeline import Segment, text_segment
from jaxbias.losses import registry
from jaxbias.methods.recipes import Recipe, Row
from jaxbias.models import language_model
from jaxbias.models.language_model import LanguageModel
from jaxbias.models.sources import resolve
from jaxbias.train import reference
from jaxbias.train.batches import Sampler, Texts, plan_shape, tokenise
from jaxbias.train.loop import Trainer
from jaxbias.types import ROLES

LOSSES = {
  "npo": {"on": "forget", "weight": 0.5, "beta": 0.1, "reduction": "seq_mean"},
  "sft": {"on": "retain", "weight": 0.3},
  "kl": {"on": "general", "weight": 0.2},
}


def texts_of(rows: Sequence[dict], objective: registry.Objective, model: LanguageModel) -> Texts:
  """Whole texts are scored, as the peer does; the texts to keep anchor the model, too."""
  side = lambda i: tuple(Row(f"{row['id']}/{i}", row["context"] + row["options"][i], 0) for row in rows)
  recipe = Recipe(side(0), side(1), side(1), paired=False)
  return tokenise(recipe, objective, model.tokenizer, model.config.max_positions)


def random_texts(length: int, batch: int, objective: registry.Objective, vocab_size: int) -> Texts:
  rng = np.random.default_rng(0)

  def one(role: str) -> Segment:
    tokens = rng.integers(4, vocab_size, length)
    return text_segment(tokens, 1, score=role in objective.scored_roles, kl=role in objective.kl_roles)

  segments = {role: tuple(one(role) for _ in range(batch)) for role in ROLES if role in objective.roles}
  rows = {role: tuple(Row(str(i), "", 0) for i in range(batch)) for role in segments}
  return Texts(rows, segments, paired=False)


def ours(options: argparse.Namespace, rows: Sequence[dict]) -> dict:
  settings = config.defaults()
  settings.lora.rank, settings.lora.alpha = options.rank, 2.0 * options.rank
  settings.train.learning_rate, settings.train.schedule, settings.train.warmup_steps = 4e-5, "constant", 0
  settings.train.steps = options.steps
  model = language_model.load(options.model, "float32" if jax.default_backend() == "cpu" else None)
  objective, coefficients = registry.parse(LOSSES)
  if options.seq:
    texts = random_texts(options.seq, options.batch, objective, model.config.vocab_size)
  else:
    texts = texts_of(rows, objective, model)
  with tempfile.TemporaryDirectory() as folder:
    began = time.perf_counter()
    ref = reference.compute(model, texts.all_segments(), Path(folder))
    cached = time.perf_counter() - began
  counts = dict.fromkeys(("forget", "retain", "general"), options.batch)
  sampler = Sampler(texts, objective, counts, ref, 0, 1)
  shape = plan_shape([sampler], options.steps + 2)
  trainer = Trainer.of(model, settings)
  step, state = trainer.step_for(objective), trainer.initial_state(0, objective)
  frozen = {"params": model.params, "lora_scale": trainer.scale}
  traced = jax.tree.map(np.float32, {"learning_rate": 4e-5, "losses": coefficients})
  times, tokens, losses = [], [], []
  for i in range(options.steps + 2):
    began = time.perf_counter()
    batch, _ = sampler.batch(i, shape)
    state, metrics = step(state, frozen, batch, traced)
    losses.append(float(metrics["loss"]))
    times.append(time.perf_counter() - began)
    tokens.append(int((batch.segment > 0).sum()))
  return {
    "tokens_per_s": sum(tokens[2:]) / sum(times[2:]), "s_per_step": statistics.median(times[2:]),
    "peak_rss_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    "first_loss": losses[0], "last_loss": losses[-1], "compile_s": times[0] - statistics.median(times[2:]),
    "reference_s": cached, "padding": 1 - statistics.mean(tokens) / (shape.B * shape.T), "shape": [shape.B, shape.T],
  }  # fmt: skip


def peer(options: argparse.Namespace) -> dict:
  command = [options.peer_python, options.peer, "unlearn", "--model", str(resolve(options.model).path)]
  command += ["--steps", str(options.steps), "--batch", str(options.batch), "--rank", str(options.rank)]
  command += ["--seq", str(options.seq)] if options.seq else ["--rows", str(options.rows)]
  done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
  return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--rows", type=Path)
  parser.add_argument("--model", default="smollm2-135m-instruct")
  parser.add_argument("--seq", type=int, default=0, help="random tokens of this length, instead of rows")
  parser.add_argument("--batch", type=int, default=8, help="texts of each role in a step")
  parser.add_argument("--rank", type=int, default=8)
  parser.add_argument("--steps", type=int, default=10)
  parser.add_argument("--peer")
  parser.add_argument("--peer-python", default="python")
  options = parser.parse_args()
  if bool(options.rows) == bool(options.seq):
    parser.error("give --rows FILE or --seq LENGTH, one of them")
  rows = [json.loads(line) for line in options.rows.read_text().splitlines()] if options.rows else []
  found = {"jaxbias": ours(options, rows)} | ({"peer": peer(options)} if options.peer else {})
  for name, result in found.items():
    print(f"{name}: {json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in result.items()})}")
  if options.peer:
    a, b = found["jaxbias"], found["peer"]
    print(f"{a['tokens_per_s'] / b['tokens_per_s']:.2f}x the peer's tokens a second, "
          f"{a['peak_rss_mib'] / b['peak_rss_mib']:.2f}x its peak memory")


if __name__ == "__main__":
  main()
