"""How fast options are scored, beside a peer and beside one sentence at a time.

  python benchmarks/scoring.py --data FOLDER [--peer hf_baseline.py --peer-python PYTHON] [--limit 300] [--repeats 3]

FOLDER holds stereoset/dev.json, crows_pairs/crows_pairs_dev.csv and bbq/*.jsonl; a set that is not there is left out.
PYTHON has torch and transformers, and the peer is a script that scores rows (`score --model --rows --out --limit`) and
prints one JSON line with `options_per_s`. The loop is the published evaluators' way: two forward passes for each
sentence, of the start token alone and of the sentence without it, with all logits; it is compiled for each length
before its time is taken. Options a second of each, medians over repeats, taken in turn; tokenising and packing count,
compiling does not. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
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
from jaxbias.evals import bbq, crows_pairs, stereoset
from jaxbias.evals.answers import answer
from jaxbias.losses.logprobs import logits
from jaxbias.models import language_model
from jaxbias.models.sources import resolve
from jaxbias.models.transformer import head


def rows_of(data: Path, limit: int) -> dict[str, list[Choice]]:
  """An even sample of each benchmark's rows."""
  files = {"StereoSet triples": (stereoset.TASKS[0], data / "stereoset/dev.json"),
           "CrowS-Pairs": (crows_pairs.TASKS[0], data / "crows_pairs/crows_pairs_dev.csv"),
           "BBQ, 3 options": (bbq.TASKS[0], data / "bbq")}
  found = {}
  for name, (task, path) in files.items():
    if path.exists():
      rows = task.rows(task.load(str(path)))
      found[name] = rows[:: max(1, len(rows) // limit)][:limit]
  return found


class Loop:
  """One sentence at a time: log-probabilities of its first token after the start token, of the others without it."""

  def __init__(self, model):
    self.model, config = model, model.config

    @jax.jit
    def forward(params, tokens):
      ids = tokens[None]
      hidden, _ = model.module.apply({"params": params}, ids, jnp.ones_like(ids), jnp.arange(ids.shape[1])[None])
      return jax.nn.log_softmax(logits(hidden, head(params, config)))[0]

    self.forward = forward

  def score(self, row: Choice) -> list[float]:
    tokenizer, params = self.model.tokenizer, self.model.params
    context, out = tokenizer.encode(row.context), []
    for option in map(tokenizer.encode, row.options):
      text = [*context, *option]
      first = np.asarray(self.forward(params, jnp.asarray([tokenizer.start_id])))[0, text[0]]
      others = np.asarray(self.forward(params, jnp.asarray(text)))[np.arange(len(text) - 1), text[1:]]
      out.append(float(np.r_[first, others][len(context) :].sum(dtype=np.float64)))
    return out


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


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--data", type=Path, required=True)
  parser.add_argument("--model", default="smollm2-135m-instruct")
  parser.add_argument("--limit", type=int, default=300, help="rows of each benchmark")
  parser.add_argument("--loop-rows", type=int, default=20, help="of them that the loop scores; 0 leaves it out")
  parser.add_argument("--repeats", type=int, default=3)
  parser.add_argument("--peer")
  parser.add_argument("--peer-python", default="python")
  arguments = parser.parse_args()
  model = language_model.load(arguments.model, "float32" if jax.default_backend() == "cpu" else None)
  loop = Loop(model)
  for name, rows in rows_of(arguments.data, arguments.limit).items():
    options = sum(len(row.options) for row in rows)
    first, with_compiling = timed(lambda rows=rows: answer(model, rows))
    ours, theirs, apart_from_peer = [], [], 0.0
    for _ in range(arguments.repeats):
      found, seconds = timed(lambda rows=rows: answer(model, rows))
      ours.append(options / seconds)
      if arguments.peer:
        rate, scores = peer(arguments.peer_python, arguments.peer, resolve(arguments.model).path, rows)
        theirs.append(rate)
        apart_from_peer = max(apart_from_peer, apart(found.by_id, scores))
    rate = statistics.median(ours)
    print(f"{name}: {len(rows)} rows, {options} options; {len(first.shapes)} shapes "
          f"{[tuple(shape[:3]) for shape in first.shapes]}, {100 * first.padding:.1f} % padding, "
          f"{with_compiling - options / rate:.1f} s to compile")
    print(f"  jaxbias {rate:7.1f} options/s", flush=True)
    if theirs:
      middle = statistics.median(theirs)
      print(f"  peer    {middle:7.1f} options/s: {rate / middle:.2f} times; at most {apart_from_peer:.1e} nats apart",
            flush=True)
    if arguments.loop_rows:
      few = rows[:: max(1, len(rows) // arguments.loop_rows)][: arguments.loop_rows]
      for row in few:
        loop.score(row)
      scores, seconds = timed(lambda few=few: {row.id: loop.score(row) for row in few})
      split = answer(model, rows, bos="split_bos")
      _, ours_split = timed(lambda rows=rows: answer(model, rows, bos="split_bos"))
      slow = sum(len(row.options) for row in few) / seconds
      print(f"  loop    {slow:7.1f} options/s: {options / ours_split / slow:.2f} times by its rule; at most "
            f"{apart(split.by_id, scores):.1e} nats apart; {100 * split.padding:.1f} % padding", flush=True)


if __name__ == "__main__":
  main()
