"""What a batch costs the host: drawing, tokenising and packing it, for texts in memory and for large sources.

  python benchmarks/input_pipeline.py [--steps 60]

Milliseconds of one core's time a batch, 8 texts of each of three roles, SmolLM2's tokenizer; no model is run. A large
source's texts are read from a JSONL file and tokenised by the step that draws them. The loop makes batches while a step
runs, so a device waits only where a batch takes longer than a step.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np

from jaxbias.data import roles, sources
from jaxbias.data.tokens import load_tokenizer
from jaxbias.losses.registry import parse
from jaxbias.methods import recipe
from jaxbias.models.sources import resolve
from jaxbias.train.batches import Sampler, plan_shape, tokenise

LOSSES = {"npo": {"on": "forget"}, "sft": {"on": "retain"}, "kl": {"on": "general"}}
ROWS = {"forget": 8, "retain": 8, "general": 8}


def large(folder: Path, texts: int, words: int) -> dict[str, str]:
  """A file of texts of about so many words, for every role."""
  rng = np.random.default_rng(0)
  vocabulary = sorted({word for text in sources.load("builtin").train.texts for word in text.text.split()})
  path = folder / f"{words}.jsonl"
  rows = (" ".join(rng.choice(vocabulary, int(rng.integers(words // 2, 3 * words // 2)))) for _ in range(texts))
  path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
  return {role: str(path) for role in ROWS}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--steps", type=int, default=60)
  steps = parser.parse_args().steps
  tokenizer, (objective, _) = load_tokenizer(resolve("smollm2-135m-instruct").path), parse(LOSSES)
  builtin = sources.load("builtin")
  with tempfile.TemporaryDirectory() as folder:
    cases = {"built-in, in memory": {}, "large, 25 words": large(Path(folder), 60_000, 25),
             "large, 400 words": large(Path(folder), 60_000, 400)}  # fmt: skip
    for name, given in cases.items():
      data = roles.with_roles(builtin, given) if given else builtin
      texts = tokenise(recipe("npo", {})(data.train, 0), objective, tokenizer, 8192, 1024)
      sampler = Sampler(texts, objective, ROWS, None, 0, 1)
      shape = plan_shape([sampler], 32)
      sampler.batch(0, shape)
      began = time.thread_time()
      tokens = sum(int((sampler.batch(step, shape)[0].segment > 0).sum()) for step in range(steps))
      spent = (time.thread_time() - began) / steps
      print(f"{name:20} {1e3 * spent:6.2f} ms a batch of {tokens / steps:6.0f} tokens, packed {shape.B} x {shape.T}")


if __name__ == "__main__":
  main()
