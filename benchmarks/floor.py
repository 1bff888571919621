"""How near the scorer and the train step come to what this machine can multiply.

  python benchmarks/floor.py [--model smollm2-135m-instruct] [--steps 6]

Prints the matrix-product ceiling (the model's own shapes), then for the scorer and for each objective of the
quickstart: seconds, tokens, the arithmetic that the work needs, the share of the ceiling, and what padding adds.
Run it on a quiet machine. The arithmetic counted is the least that the mathematics asks for: the trunk once forward
and once backward for the input gradients of every real token, the head at scored positions only, nothing recomputed.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxbias import compare, config
from jaxbias.data import sources
from jaxbias.evals import stereoset
from jaxbias.evals.scoring import encode, padding_share, score
from jaxbias.models.sources import cache_folder
from jaxbias.train import reference


def best(function, repeats: int = 5) -> float:
  """Seconds of the fastest of a few calls, after one that compiles."""
  jax.block_until_ready(function())
  times = []
  for _ in range(repeats):
    began = time.perf_counter()
    jax.block_until_ready(function())
    times.append(time.perf_counter() - began)
  return min(times)


def ceiling(model, tokens: int) -> float:
  """FLOP/s of the MLP's two products on `tokens` rows, one after the other, all layers."""
  mlp = model.params["layers"]["mlp"]
  x = jnp.ones((tokens, model.config.hidden_size), mlp["up"]["kernel"].dtype)

  @jax.jit
  def run(up, down):
    layer = lambda x, pair: (((x @ pair[0]) @ pair[1]) * 1e-3, None)
    return jax.lax.scan(layer, x, (up, down))[0]

  flops = 4 * tokens * model.config.num_layers * model.config.hidden_size * model.config.mlp_size
  return flops / best(lambda: run(mlp["up"]["kernel"], mlp["down"]["kernel"]))


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--model", default="smollm2-135m-instruct")
  parser.add_argument("--steps", type=int, default=6)
  options = parser.parse_args()
  settings, _ = config.from_command_line(["--config=configs/quickstart.py", f"--config.model={options.model}"])
  job = compare.prepare(settings, Path(tempfile.mkdtemp()) / "floor", "benchmarks/floor.py")
  model = job.trainer.model
  head = model.config.head_flops
  trunk = model.config.flops_per_token - head
  peak = ceiling(model, 512)
  print(f"{'matrix products':28s} {peak / 1e9:6.1f} GFLOP/s = 100 %")

  triples = sources.load("builtin").test.triples
  rows = encode(stereoset.rows(triples), model.tokenizer, model.config.max_positions)
  score(model, rows)
  began = time.perf_counter()
  score(model, rows)
  seconds = time.perf_counter() - began
  scored = sum(len(segment.target) for segment in rows.segments)
  report("score the test triples", seconds, rows.tokens, rows.tokens * trunk + scored * head, peak, padding_share(rows))

  ref = reference.compute(model, job.reference_segments(), cache_folder() / "reference")
  shapes = job.shapes()
  for variant in job.variants:
    sampler, shape = job.sampler(variant, settings.seeds[0], ref), shapes[variant.objective]
    step, state = job.trainer.step_for(variant.objective), job.trainer.initial_state(0)
    frozen = {"params": model.params, "lora_scale": job.trainer.scale}
    coefficients = jax.tree.map(np.float32, variant.coefficients)
    times, batches = [], [sampler.batch(i, shape)[0] for i in range(options.steps)]
    for batch in batches:
      began = time.perf_counter()
      state, metrics = step(state, frozen, batch, coefficients)
      jax.block_until_ready((state, metrics))
      times.append(time.perf_counter() - began)
    middle = int(np.argsort(times[1:])[len(times[1:]) // 2]) + 1
    tokens = int((batches[middle].segment > 0).sum())
    need = 2 * trunk * tokens + 2 * head * int((batches[middle].score_segment > 0).sum())
    if batches[middle].kl_segment is not None:
      need += 3 * head * int((batches[middle].kl_segment > 0).sum())
    padding = 1 - tokens / (shape.B * shape.T)
    report(f"step of {variant.name}", times[middle], tokens, need, peak, padding)


def report(what: str, seconds: float, tokens: int, need: float, peak: float, padding: float) -> None:
  rate = need / seconds
  print(f"{what:28s} {rate / 1e9:6.1f} GFLOP/s = {100 * rate / peak:3.0f} %   {seconds:.2f} s, {tokens} tokens, "
        f"{tokens / seconds:.0f} tokens/s, {need / 1e9:.0f} GFLOP needed, {100 * padding:.0f} % padding")


if __name__ == "__main__":
  main()
