"""Tokens a second of batched decoding, with the cache and without, against what the machine could do and a peer.

  python benchmarks/generate.py [--model smollm2-135m-instruct] [--rows 8] [--tokens 64] [--peer PYTHON]

The floor of a step is the longer of: reading every parameter once from memory, and the arithmetic at the rate of a
large matrix product; both are measured here. `--peer` is a Python that has torch and transformers; it decodes the same
prompts, greedy, in float32, from --model or, where that is no folder of theirs, from --peer-model.
Everything is greedy but for the line that says so, and nothing ends a text. Times are the best of a few runs; the load
of the machine is printed with them. Run it on a quiet one.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import subprocess
import time

import jax
import jax.numpy as jnp
import numpy as np

from jaxbias.evals.generate import generate
from jaxbias.evals.sampling import Sampling
from jaxbias.losses.logprobs import logits
from jaxbias.models import language_model
from jaxbias.models.transformer import Transformer, head

TEXTS = ("The capital of France is", "Once upon a time, there was a", "def fib(n):", "The nurse said that",
         "My favourite colour is", "In 1492", "Water boils at", "The three laws of robotics are")  # fmt: skip
FEW = 4  # steps of decoding without a cache: all cost the same
PEER = """
import json, sys, time, torch
from transformers import AutoModelForCausalLM
folder, prompts, tokens, repeats = json.load(sys.stdin)
torch.set_num_threads({cores})
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
longest = max(map(len, prompts))
ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
times = []
for _ in range(repeats):
  began = time.perf_counter()
  with torch.no_grad():
    out = model.generate(ids, attention_mask=mask, do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens,
                         pad_token_id=0)
  times.append(time.perf_counter() - began)
print(json.dumps([min(times), out[:, longest:].tolist()]))
"""


def best(function, repeats: int):
  """Seconds of the fastest call after one that compiles, and its result."""
  jax.block_until_ready(function())
  times = []
  for _ in range(repeats):
    began = time.perf_counter()
    out = jax.block_until_ready(function())
    times.append(time.perf_counter() - began)
  return min(times), out


def floor(model, rows: int) -> tuple[float, float]:
  """Seconds of a step, by memory and by arithmetic."""
  size = 1 << 28
  long, x, w = jnp.ones(size // 4), jnp.ones((512, 1536)), jnp.ones((1536, 1536))
  total, multiply = jax.jit(jnp.sum), jax.jit(jnp.matmul)
  seconds, product = best(lambda: total(long), 5)[0], best(lambda: multiply(x, w), 5)[0]
  parameters = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
  bandwidth, rate = size / seconds, 2 * 512 * 1536**2 / product
  print(f"reads {bandwidth / 1e9:.1f} GB/s, multiplies {rate / 1e9:.0f} GFLOP/s; parameters {parameters / 1e6:.0f} MB")
  return parameters / bandwidth, rows * model.config.flops_per_token / rate


def uncached(model, prompts, tokens: int, room: int):
  """The whole text, with `room` for new tokens, read again for every token, in one compiled loop."""
  B, S = len(prompts), max(map(len, prompts)) + room
  text, length = np.zeros((B, S), np.int32), np.array([len(p) for p in prompts], np.int32)
  for row, prompt in enumerate(prompts):
    text[row, : len(prompt)] = prompt
  position = np.broadcast_to(np.arange(S, dtype=np.int32), (B, S))

  @jax.jit
  def run(params, text, length):
    def more(step, text):
      end = length + step
      segment = (position < end[:, None]).astype(jnp.int32)
      hidden, _ = model.module.apply({"params": params}, text, segment, position)
      last = jnp.take_along_axis(hidden, (end - 1)[:, None, None], axis=1)[:, 0]
      token = jnp.argmax(logits(last, head(params, model.config)), -1)
      return text.at[jnp.arange(B), end].set(token.astype(jnp.int32))

    return jax.lax.fori_loop(0, tokens, more, text)

  return functools.partial(run, model.params, text, length)


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--model", default="smollm2-135m-instruct")
  parser.add_argument("--rows", type=int, default=8)
  parser.add_argument("--tokens", type=int, default=64)
  parser.add_argument("--repeats", type=int, default=3)
  parser.add_argument("--peer", help="a Python with torch and transformers")
  parser.add_argument("--peer-model", help="the same model as a folder of Hugging Face's")
  options = parser.parse_args()
  model = language_model.load(options.model, dtype="float32")
  config = dataclasses.replace(model.config, eos_ids=())
  model = dataclasses.replace(model, config=config, module=Transformer(config, mesh=model.mesh))
  texts = [TEXTS[i % len(TEXTS)] for i in range(options.rows)]
  prompts = [[model.tokenizer.start_id, *model.tokenizer.encode(text)] for text in texts]
  written = options.rows * options.tokens
  memory, arithmetic = floor(model, options.rows)
  least = max(memory, arithmetic) * options.tokens

  def report(what: str, seconds: float) -> None:
    print(f"{what:36s} {seconds:7.2f} s  {written / seconds:7.0f} tokens/s  {seconds / least:5.1f} x the floor   "
          f"load {os.getloadavg()[0]:.1f}", flush=True)  # fmt: skip

  report(f"floor ({'memory' if memory > arithmetic else 'arithmetic'})", least)
  ours, found = best(lambda: generate(model, prompts, Sampling(options.tokens)), options.repeats)
  report("cached, greedy", ours)
  warm = Sampling(options.tokens, temperature=1.0, top_k=50, top_p=0.9, repetition_penalty=1.1)
  report("cached, temperature, top-k, top-p", best(lambda: generate(model, prompts, warm), options.repeats)[0])
  few = min(options.tokens, FEW)
  slow, text = best(uncached(model, prompts, few, options.tokens), 1)
  slow *= options.tokens / few
  report(f"uncached, greedy ({few} steps, scaled)", slow)
  same = [list(c.tokens[:few]) == np.asarray(text)[i, len(p) :][:few].tolist()
          for i, (c, p) in enumerate(zip(found, prompts, strict=True))]  # fmt: skip
  print(f"{sum(same)} of {len(same)} rows are the same uncached, which takes {slow / ours:.1f} times as long")
  if options.peer:
    ask = json.dumps([options.peer_model or options.model, prompts, options.tokens, options.repeats + 1])
    code = PEER.replace("{cores}", str(os.cpu_count()))
    done = subprocess.run([options.peer, "-c", code], input=ask, capture_output=True, text=True, check=True)
    seconds, theirs = json.loads(done.stdout.splitlines()[-1])
    report("transformers.generate, greedy", seconds)
    same = sum(list(c.tokens) == other for c, other in zip(found, theirs, strict=True))
    print(f"{same} of {len(theirs)} rows are the same; ours takes {ours / seconds:.2f} of its time")


if __name__ == "__main__":
  main()
