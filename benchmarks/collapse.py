"""What class statistics cost: beside dense one-hot products in PyTorch, and beside the forward passes that feed them.

  python benchmarks/collapse.py [--peer-python PYTHON] [--classes 49152] [--features 576] [--samples 20000]
  python benchmarks/collapse.py --model smollm2-135m-instruct --data TEXT [--tokens 100000]

PYTHON has torch. Both get the same features, of classes as frequent as words (Zipf), in batches of the same size; ours
is one pass, the peer's are two, as published. With --data: the model reads the text, every token id of its vocabulary
is a class, and the seconds of forward passes alone, of the same with statistics, and of the statistics alone are
medians over repeats. Compiling does not count. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from jaxbias.distributed import to_devices
from jaxbias.evals import class_geometry, collapse
from jaxbias.evals.class_statistics import HEAD, Moments, add, programs, states
from jaxbias.mesh import batch_sharding
from jaxbias.models import language_model

PEER = Path(__file__).with_name("collapse_peer.py")


def timed(function) -> tuple[object, float]:
  began = time.perf_counter()
  out = jax.block_until_ready(function())
  return out, time.perf_counter() - began


def zipf(samples: int, classes: int, features: int) -> tuple[np.ndarray, np.ndarray]:
  rng = np.random.default_rng(0)
  share = 1 / np.arange(1, classes + 1)
  label = rng.permutation(classes)[rng.choice(classes, samples, p=share / share.sum())]
  return rng.normal(size=(samples, features)).astype(np.float32), label.astype(np.int32)


def ours(x_ND: np.ndarray, label_N: np.ndarray, classes: int, batch: int) -> Moments:
  moments = Moments.zeros(classes, x_ND.shape[1])
  for at in range(0, len(x_ND), batch):
    moments = adding()(moments, x_ND[at : at + batch], label_N[at : at + batch])
  return moments


@functools.cache
def adding():
  return jax.jit(add, donate_argnums=0)


def beside_peer(arguments) -> None:
  x, label = zipf(arguments.samples // arguments.batch * arguments.batch, arguments.classes, arguments.features)
  run = functools.partial(ours, x, label, arguments.classes, arguments.batch)
  run()  # compiles
  found, mine, theirs = None, [], []
  for _ in range(arguments.repeats):
    found, seconds = timed(run)
    mine.append(seconds)
    if arguments.peer_python:
      theirs.append(peer(arguments, x, label, found))
  ours_s = statistics.median(mine)
  print(f"{len(x):,} samples of {arguments.features} features, {arguments.classes:,} classes, batches of "
        f"{arguments.batch}\n  jaxbias  {ours_s:8.3f} s", flush=True)
  if theirs:
    print(f"  one-hot  {statistics.median(theirs):8.3f} s: {statistics.median(theirs) / ours_s:.1f} times")


def peer(arguments, x: np.ndarray, label: np.ndarray, found: Moments) -> float:
  """Seconds of the published way; raises AssertionError where the two do not agree."""
  with tempfile.TemporaryDirectory() as folder:
    given, out = Path(folder) / "in.npz", Path(folder) / "out.npz"
    np.savez(given, x=x, label=label, classes=arguments.classes, batch=arguments.batch)
    command = [arguments.peer_python, PEER, given, out]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    theirs = np.load(out)
    np.testing.assert_array_equal(theirs["count"], found.count)
    np.testing.assert_allclose(theirs["mean"], found.mean(), atol=1e-4)
    np.testing.assert_allclose(theirs["square"], found.square.value(), rtol=1e-3, atol=1e-2)
  return json.loads(done.stdout.splitlines()[-1])["seconds"]


def beside_forward(arguments) -> None:
  model = language_model.load(arguments.model, "float32" if jax.default_backend() == "cpu" else None)
  texts = collapse.read_texts(arguments.data)
  plan = collapse.prepare(model, texts, "vocabulary", held_out=0.0, min_count=1)
  ids, batches, tokens = plan.classes.ids[:, 0], [], 0
  for arrays in plan.fit:  # classes are all ids, seen or not
    label = np.where(arrays["label"] >= 0, ids[np.maximum(arrays["label"], 0)], -1).astype(np.int32)
    batches.append(to_devices(arrays | {"label": label}, batch_sharding(model.mesh)))
    tokens += int((label >= 0).sum())
    if tokens >= arguments.tokens:
      break
  run, V, D = programs(model.module, model.mesh, (HEAD,), 1), model.config.vocab_size, model.config.table_size
  variables = {"params": model.params}
  forward = jax.jit(lambda variables, arrays: states(model.module, (HEAD,), variables, arrays)["head"][0])
  empty = lambda: {"head": jax.tree.map(lambda x: x[None], Moments.zeros(V, D))}
  features = [np.asarray(forward(variables, arrays)).reshape(-1, D) for arrays in batches[:2]]

  def alone():
    moments = Moments.zeros(V, D)
    for i, arrays in enumerate(batches):
      moments = adding()(moments, features[i % len(features)], arrays["label"].reshape(-1))
    return moments

  def together():
    moments = empty()
    for arrays in batches:
      moments = run.add(variables, arrays, moments)
    return moments

  jobs = {"forward alone": lambda: [forward(variables, arrays) for arrays in batches], "with statistics": together,
          "statistics alone": alone}  # fmt: skip
  run.add(variables, batches[0], empty())
  adding()(Moments.zeros(V, D), features[0], batches[0]["label"].reshape(-1))
  seconds = {name: [] for name in jobs}
  for _ in range(arguments.repeats):
    for name, job in jobs.items():
      seconds[name].append(timed(job)[1])
  middle = {name: statistics.median(each) for name, each in seconds.items()}
  print(f"{model.name}: {tokens:,} tokens in {len(batches)} batches, {V:,} classes of {D} features")
  for name, each in middle.items():
    print(f"  {name:17s} {each:8.2f} s")
  print(f"  statistics: {100 * middle['statistics alone'] / middle['forward alone']:.2f} % of the forward passes")
  if arguments.metrics:
    mean, variance = np.random.default_rng(0).normal(size=(V, D)), np.ones(V)
    _, seconds = timed(lambda: class_geometry.of_means(mean, variance))
    print(f"  NC1 and NC2 over all pairs of {V:,} classes: {seconds:.1f} s")


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--peer-python")
  parser.add_argument("--classes", type=int, default=49152)
  parser.add_argument("--features", type=int, default=576)
  parser.add_argument("--samples", type=int, default=20480)
  parser.add_argument("--batch", type=int, default=1024)
  parser.add_argument("--model", default="smollm2-135m-instruct")
  parser.add_argument("--data", help="a text that the model reads; without it features are random")
  parser.add_argument("--tokens", type=int, default=100_000)
  parser.add_argument("--metrics", action="store_true", help="also time the statistics of all pairs of classes")
  parser.add_argument("--repeats", type=int, default=3)
  arguments = parser.parse_args()
  (beside_forward if arguments.data else beside_peer)(arguments)


if __name__ == "__main__":
  main()
