"""How fast options are scored, beside a peer and beside one sentence at a time.

  python benchmarks/scoring.py --data FOLDER [--peer hf_baseline.py --peer-python PYTHON] [--only SET ...]

FOLDER holds stereoset/dev.json, crows_pairs/crows_pairs_dev.csv and bbq/*.jsonl; a set that is not there is left out.
PYTHON has torch and transformers, and the peer is a script that scores rows (`score --model --rows --out --limit`) and
prints one JSON line with `options_per_s`. Options a second of each, medians over repeats, taken in turn; tokenising and
packing count, compiling does not. Run it on a quiet machine.

The loop does what the published evaluators do, one text at a time with the logits of all its tokens, and no more:

  stereoset    bias-bench: each sentence without a start token; the start token once for the whole set
  crows_pairs  bias-bench: each sentence without a start token, and the start token again before each
  bbq          lm-evaluation-harness at batch size 1: context and option, but for its last token; no start token

(read in bias_bench/benchmark/{stereoset,crows}; the harness from memory of its Hugging Face class, without its cache of
one-token options). It is compiled for each length before its time is taken, and reads rows of all lengths alike.

Beside its ratio stands what the arithmetic alone gives: products with weights that the loop does over those that are
needed here, counted in tokens and in logits, padding apart. A ratio above it comes from larger products, which run
nearer to the machine's speed than those of one sentence.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxbias.data.rows import Choice
from jaxbias.data.tokens import Tokenizer
from jaxbias.evals import bbq, crows_pairs, stereoset
from jaxbias.evals.answers import Answers, answer
from jaxbias.evals.questions import SPLIT, Asked, Reading, ask
from jaxbias.evals.task import Task
from jaxbias.losses.logprobs import logits
from jaxbias.models import language_model
from jaxbias.models.config import ModelConfig
from jaxbias.models.language_model import LanguageModel
from jaxbias.models.sources import resolve
from jaxbias.models.transformer import head

ONCE, EACH, NEVER = "once", "before each", "never"  # when the loop reads the start token alone


@dataclasses.dataclass(frozen=True)
class Set:
  title: str
  task: Task
  path: str
  start: str  # ONCE, EACH or NEVER
  limit: int  # rows
  loop_rows: int  # of them that the loop reads: each new length is compiled


SETS = {
  "stereoset": Set("StereoSet triples", stereoset.TASKS[0], "stereoset/dev.json", ONCE, 300, 20),
  "crows_pairs": Set("CrowS-Pairs", crows_pairs.TASKS[0], "crows_pairs/crows_pairs_dev.csv", EACH, 300, 20),
  "bbq": Set("BBQ, 3 options", bbq.TASKS[0], "bbq", NEVER, 120, 5),
}


def rows_of(chosen: Set, data: Path, limit: int) -> list[Choice]:
  """An even sample of the set's rows."""
  rows = chosen.task.rows(chosen.task.load(str(data / chosen.path)))
  return rows[:: max(1, len(rows) // limit)][:limit]


def of_all_lengths(rows: Sequence[Choice], count: int) -> list[Choice]:
  """The middle one of each of `count` equal parts, shortest texts first."""
  by_length = sorted(rows, key=lambda row: len(row.context) * len(row.options) + sum(map(len, row.options)))
  return [by_length[(2 * i + 1) * len(rows) // (2 * count)] for i in range(min(count, len(rows)))]


# One text at a time


def inputs(tokenizer: Tokenizer, row: Choice, start: str) -> list[tuple[list[int], list[int]]]:
  """For each option what the loop reads, and the option's tokens, which end the text."""
  context, options = tokenizer.encode(row.context), [tokenizer.encode(option) for option in row.options]
  return [((context + option)[: -1 if start == NEVER else None], option) for option in options]


class Loop:
  """Summed log-probabilities of options, each text by itself; `start` says when the start token is read alone."""

  def __init__(self, model: LanguageModel, start: str):
    self.model, self.start, config = model, start, model.config

    @jax.jit
    def forward(params, tokens):
      ids = tokens[None]
      hidden, _ = model.module.apply({"params": params}, ids, jnp.ones_like(ids), jnp.arange(ids.shape[1])[None])
      return jax.nn.log_softmax(logits(hidden, head(params, config)))[0]

    self.read = lambda ids: np.asarray(forward(model.params, jnp.asarray(ids)))

  def score(self, rows: Sequence[Choice]) -> dict[str, list[float]]:
    first = self.read([self.model.tokenizer.start_id]) if self.start == ONCE else None
    return {row.id: [self._option(*texts, first) for texts in inputs(self.model.tokenizer, row, self.start)]
            for row in rows}

  def _option(self, text: list[int], option: list[int], first: np.ndarray | None) -> float:
    if self.start == NEVER:
      found = self.read(text)[-len(option) :][np.arange(len(option)), option]
      return float(found.sum(dtype=np.float64))
    first = self.read([self.model.tokenizer.start_id]) if first is None else first
    others = self.read(text)[np.arange(len(text) - 1), text[1:]]
    return float(first[0, text[0]] + others.sum(dtype=np.float64))


# The arithmetic


@dataclasses.dataclass(frozen=True)
class Work:
  """Tokens that the layers read, and positions whose logits are made."""

  tokens: int
  positions: int

  def flops(self, config: ModelConfig, layers: int) -> float:
    """Products with weights; `layers`: numbers in the layers' matrices. Attention's own products are left out: they are
    few in texts this short."""
    return 2.0 * (layers * self.tokens + config.vocab_size * config.hidden_size * self.positions)


def of_loop(tokenizer: Tokenizer, rows: Sequence[Choice], start: str) -> Work:
  texts = [text for row in rows for text, _ in inputs(tokenizer, row, start)]
  tokens = sum(map(len, texts)) + {ONCE: 1, EACH: len(texts), NEVER: 0}[start]
  return Work(tokens, tokens)


def of_ours(asked: Asked) -> Work:
  return Work(asked.tokens, sum(len(segment.target) for segment in asked.segments))


def in_layers(model: LanguageModel) -> int:
  return sum(leaf.size for leaf in jax.tree.leaves(model.params["layers"]) if leaf.ndim > 2)  # all layers are stacked


# Beside each other


def timed(function):
  began = time.perf_counter()
  out = function()
  return out, time.perf_counter() - began


def apart(ours: Mapping[str, Sequence], theirs: Mapping[str, Sequence]) -> float:
  return max(abs(a[0] - (b if isinstance(b, float) else b[0])) for i in theirs
             for a, b in zip(ours[i], theirs[i], strict=True))


def peer(python: str, script: str, model: Path, rows: Sequence[Choice]) -> tuple[float, dict]:
  """Options a second, and {id: [[summed log-probability, tokens], ...]}."""
  with tempfile.TemporaryDirectory() as folder:
    asked, out = Path(folder) / "rows.jsonl", Path(folder) / "scores.json"
    asked.write_text("".join(json.dumps({"id": row.id, "context": row.context, "options": row.options}) + "\n"
                             for row in rows))
    command = [python, script, "score", "--model", str(model), "--rows", str(asked), "--out", str(out)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])["options_per_s"], json.loads(out.read_text())


def beside_peer(model: LanguageModel, rows: Sequence[Choice], first: Answers, with_compiling: float, arguments) -> None:
  options = sum(len(row.options) for row in rows)
  ours, theirs, difference = [], [], 0.0
  for _ in range(arguments.repeats):
    found, seconds = timed(lambda: answer(model, rows))
    ours.append(options / seconds)
    if arguments.peer:
      rate, scores = peer(arguments.peer_python, arguments.peer, resolve(arguments.model).path, rows)
      theirs.append(rate)
      difference = max(difference, apart(found.by_id, scores))
  rate = statistics.median(ours)
  print(f"  {len(first.shapes)} shapes {[tuple(shape[:3]) for shape in first.shapes]}, {100 * first.padding:.1f} % "
        f"padding, {with_compiling - options / rate:.1f} s to compile")
  print(f"  jaxbias {rate:7.1f} options/s", flush=True)
  if theirs:
    middle = statistics.median(theirs)
    print(f"  peer    {middle:7.1f} options/s: {rate / middle:.2f} times; at most {difference:.1e} nats apart",
          flush=True)


def beside_loop(model: LanguageModel, rows: Sequence[Choice], few: Sequence[Choice], chosen: Set, repeats: int) -> None:
  loop, options = Loop(model, chosen.start), sum(len(row.options) for row in rows)
  loop.score(few)  # compiles
  scores, seconds = timed(lambda: loop.score(few))
  slow = sum(len(row.options) for row in few) / seconds
  split = answer(model, rows, bos=SPLIT)
  ours = options / statistics.median(timed(lambda: answer(model, rows, bos=SPLIT))[1] for _ in range(repeats))
  asked, layers = ask(rows, Reading(model.tokenizer, True, model.config.max_positions, SPLIT)), in_layers(model)
  theirs, needed = of_loop(model.tokenizer, rows, chosen.start), of_ours(asked)
  print(f"  loop    {slow:7.1f} options/s ({len(few)} rows); jaxbias by its rule {ours:.1f}: {ours / slow:.2f} times; "
        f"at most {apart(split.by_id, scores):.1e} nats apart; {100 * split.padding:.1f} % padding")
  print(f"          reads {theirs.tokens} tokens with logits at all, jaxbias {needed.tokens} with logits at "
        f"{needed.positions}: arithmetic alone gives "
        f"{theirs.flops(model.config, layers) / needed.flops(model.config, layers):.2f} times", flush=True)


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--data", type=Path, required=True)
  parser.add_argument("--only", choices=SETS, nargs="+", default=list(SETS), help="these sets; default: all")
  parser.add_argument("--model", default="smollm2-135m-instruct")
  parser.add_argument("--limit", type=int, help="rows of each set; default: its own")
  parser.add_argument("--loop-rows", type=int, help="of them that the loop reads; 0 leaves it out; default: its own")
  parser.add_argument("--repeats", type=int, default=3)
  parser.add_argument("--peer")
  parser.add_argument("--peer-python", default="python")
  arguments = parser.parse_args()
  model = language_model.load(arguments.model, "float32" if jax.default_backend() == "cpu" else None)
  for chosen in (SETS[name] for name in arguments.only if (arguments.data / SETS[name].path).exists()):
    rows = rows_of(chosen, arguments.data, arguments.limit or chosen.limit)
    few = chosen.loop_rows if arguments.loop_rows is None else arguments.loop_rows
    print(f"{chosen.title}: {len(rows)} rows, {sum(len(row.options) for row in rows)} options", flush=True)
    beside_peer(model, rows, *timed(lambda rows=rows: answer(model, rows)), arguments)
    if few:
      beside_loop(model, rows, of_all_lengths(rows, few), chosen, arguments.repeats)


if __name__ == "__main__":
  main()
