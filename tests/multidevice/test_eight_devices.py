"""The same numbers on every mesh: scores, loss, gradient and two train steps of a tiny model, in one subprocess that
believes in eight devices.

  python -m tests.multidevice.test_eight_devices MODEL.gguf OUT      # what the test runs, with XLA_FLAGS set
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import SIZES, llama_tensors

ROOT = Path(__file__).parents[2]
MESHES = {
  "one device": None,
  "data 8": {"data": 8},
  "data 2, fsdp 2, tensor 2": {"data": 2, "fsdp": 2, "tensor": 2},
  "fsdp 4, tensor 2": {"data": 1, "fsdp": 4, "tensor": 2},
}
RANK = 2
LOSSES = {
  "npo": {"weight": 0.5}, "dpo": {"weight": 0.4}, "sft": {"weight": 0.3}, "kl": {"weight": 0.2}, "kto": {"weight": 0.2},
  "npo:published": {"reduction": "batch_token_mean"}, "undial": {"weight": 0.1}, "rmu": {"steer": 1.0},
  "rmu_retain": {},
}  # fmt: skip


# In the subprocess


def worker(path: str, out: Path) -> None:
  import jax
  from jax.sharding import AxisType

  from jaxbias.mesh import AXES, make_mesh

  assert jax.device_count() == 8
  results = {}
  for name, sizes in MESHES.items():
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record, messages=messages: messages.append(record.getMessage())
    logging.getLogger("jaxbias").handlers = [handler]
    auto = (AxisType.Auto,) * 3
    mesh = make_mesh(sizes) if sizes else jax.make_mesh((1, 1, 1), AXES, auto, devices=jax.devices()[:1])
    found, arrays = everything(path, mesh)
    results[name] = {**found, "log": messages}
    np.savez(out / f"{name}.npz", **arrays)
  (out / "results.json").write_text(json.dumps(results))


def everything(path: str, mesh) -> tuple[dict, dict[str, np.ndarray]]:
  """What is compared, and the sizes of the shards that the first device holds."""
  import jax
  from flax.traverse_util import flatten_dict

  from jaxbias.config import defaults
  from jaxbias.data.rows import Choice
  from jaxbias.evals.scoring import score
  from jaxbias.losses.registry import parse
  from jaxbias.mesh import batch_sharding, batch_shards, replicated
  from jaxbias.methods.recipes import Recipe, Row
  from jaxbias.models import language_model
  from jaxbias.train.batches import Sampler, plan_shape, tokenise
  from jaxbias.train.loop import Trainer
  from jaxbias.train.reference import Reference, key_of

  config = defaults()
  config.lora.rank, config.lora.targets = RANK, ("q", "o", "down")  # fewer than all compile sooner
  model = language_model.load(path, dtype="float32", mesh=mesh)
  trainer = Trainer.of(model, config)
  rows = [Choice(str(n), "the cat " * n, (" the" * (n + 1), " a cat", "xyz")) for n in range(6)]
  scores = [s for pairs in score(model, rows).values() for s, _ in pairs]

  texts = lambda role, end: tuple(Row(f"{role} {n}", "the cat " * n + end, 8 * n) for n in range(1, 6))
  recipe = Recipe(texts("forget", "123 a"), texts("retain", "is a cat"), texts("general", "and the others"), True,
                  texts("mismatched", "is 123"))  # fmt: skip
  objective, coefficients = parse(LOSSES)
  tokenised = tokenise(recipe, objective, model.tokenizer, model.config.max_positions)
  rng, every = np.random.default_rng(0), {key_of(segment): segment for segment in tokenised.all_segments()}
  reference = Reference(  # any will do, and computing it would be one more program a mesh
    {key: rng.normal(-5, 1, len(segment.target)).astype(np.float32) for key, segment in every.items()},
    {key: rng.normal(0, 1, (len(segment.kl_at), SIZES["D"])).astype(np.float32) for key, segment in every.items()},
  )
  sampler = Sampler(tokenised, objective, {"forget": 3, "retain": 3, "general": 3}, reference, 0, batch_shards(mesh))
  shape = plan_shape([sampler], 2)
  state = trainer.initial_state(seed=0)
  frozen = {"params": model.params, "lora_scale": trainer.scale}
  traced = jax.device_put(jax.tree.map(np.float32, {"learning_rate": 1e-2, "losses": coefficients}), replicated(mesh))
  batches = [jax.device_put(sampler.batch(step, shape)[0], batch_sharding(mesh)) for step in range(2)]

  # away from the start, where half of the factors have no gradient
  moved = lambda x: jax.device_put(rng.normal(0, 0.1, x.shape).astype(np.float32), x.sharding)
  state = state.replace(params=jax.tree.map(moved, state.params))
  flat = lambda tree: {"/".join(key): leaf for key, leaf in flatten_dict(tree).items()}
  local = lambda tree: {key: leaf.addressable_shards[0].data.shape for key, leaf in flat(tree).items()}
  moments = lambda state: next(part for part in state.opt_state if hasattr(part, "mu")).mu
  arrays = {"scores": np.array(scores)}
  for number, batch in enumerate(batches):
    state, metrics = trainer.step_for(objective)(state, frozen, batch, traced)
    arrays |= {f"step {number} {key}": np.asarray(metrics[key]) for key in ("loss", "gradient_norm")}
    arrays |= {f"step {number} part {key}": np.asarray(part) for key, part in metrics["parts"].items()}
    if number == 0:  # Adam's first moment is then a tenth of the (clipped) gradient
      arrays |= {f"gradient/{key}": np.asarray(leaf) for key, leaf in flat(moments(state)).items()}
  arrays |= {f"trained/{key}": np.asarray(leaf) for key, leaf in flat(state.params).items()}
  shards = {"params": local(model.params), "lora": local(state.params), "moments": local(moments(state)),
            "tokens": [batches[0].tokens.shape, batches[0].tokens.addressable_shards[0].data.shape]}  # fmt: skip
  return {"shards": shards, "devices": len(state.params["layers"]["mlp"]["down"]["b"].sharding.device_set)}, arrays


# In the test


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
  return tmp_path_factory.mktemp("meshes")


@pytest.fixture
def results(make_gguf, folder) -> dict[str, dict]:
  """{mesh: what `everything` returned there, and the log}; computed once, or failed once."""
  if not (folder / "stderr").exists():
    tensors = {name: 0.2 * value + (value.ndim == 1) for name, value in llama_tensors(seed=1).items()}
    path = make_gguf(tensors=tensors)
    environment = {
      **os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
      "JAXBIAS_CACHE": str(folder / "cache"), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "tests.multidevice.test_eight_devices", str(path), str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    (folder / "stderr").write_text(done.stderr)
  assert (folder / "results.json").exists(), (folder / "stderr").read_text()[-3000:]
  out = json.loads((folder / "results.json").read_text())
  for name, found in out.items():
    with np.load(folder / f"{name}.npz") as stored:
      found["arrays"] = dict(stored)
  return out


@pytest.mark.parametrize("mesh", [name for name, sizes in MESHES.items() if sizes])
def test_every_mesh_gives_the_numbers_of_one_device(results, mesh):
  ours, alone = results[mesh]["arrays"], results["one device"]["arrays"]
  assert ours.keys() == alone.keys()
  for name, expected in alone.items():
    assert np.isfinite(expected).all() and np.abs(expected).max() > 0, name
    off = np.linalg.norm(ours[name] - expected) / np.linalg.norm(expected)
    assert off < 1e-5, f"{name} is off by {off:.1e} of its norm"
  assert alone["step 0 loss"] != alone["step 1 loss"]


@pytest.mark.parametrize("mesh", list(MESHES))
def test_arrays_are_really_cut_as_the_rules_say(results, mesh):
  sizes = {"data": 1, "fsdp": 1, "tensor": 1} | (MESHES[mesh] or {})
  D, F, H, _, C, L, V = SIZES.values()
  fsdp, tensor = sizes["fsdp"], sizes["tensor"]
  shards = results[mesh]["shards"]
  q, down = [L, D // fsdp, H * C // tensor], [L, F // tensor, D // fsdp]
  assert shards["params"]["layers/attention/q/kernel"] == q
  assert shards["params"]["layers/mlp/down/kernel"] == down
  assert shards["params"]["layers/attention_norm/scale"] == [L, D // fsdp]
  assert shards["params"]["embedding"] == [V, D // fsdp], "V is odd, so it is whole"
  for what in ("lora", "moments"):
    assert shards[what]["layers/attention/q/a"] == [L, q[1], RANK]
    assert shards[what]["layers/attention/q/b"] == [L, RANK, q[2]]
    assert shards[what]["layers/mlp/down/b"] == [L, RANK, down[2]]
  whole, local = shards["tokens"]
  assert local == [whole[0] // (sizes["data"] * fsdp), whole[1]]
  assert results[mesh]["devices"] == (8 if MESHES[mesh] else 1)


@pytest.mark.parametrize("mesh", list(MESHES))
def test_an_axis_that_does_not_divide_is_replicated_and_logged(results, mesh):
  tensor = (MESHES[mesh] or {}).get("tensor", 1)
  said = [line for line in results[mesh]["log"] if "replicated" in line]
  what = f"vocab ({SIZES['V']} over tensor={tensor}) of embedding"
  expected = f"what does not divide over the mesh is replicated: {what}."
  assert said == ([expected] if tensor > 1 else [])


if __name__ == "__main__":
  worker(sys.argv[1], Path(sys.argv[2]))
