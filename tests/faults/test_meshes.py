"""Saved on eight devices, continued on one, two and four: the same losses and the same weights, in one subprocess that
believes in eight devices.

  python -m tests.faults.test_meshes MODEL OUT      # what the test runs, with XLA_FLAGS set
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.train import REPOSITORY, lines, tiny_model

STEPS, SAVED = 6, 3
SAVER = {"data": 2, "fsdp": 4}
MESHES = {"1 device": {"data": 1}, "2 devices": {"data": 1, "fsdp": 2}, "4 devices": {"fsdp": 2, "tensor": 2}}


# In the subprocess


def worker(model: str, out: Path) -> None:
  import jax

  from jaxbias.mesh import make_mesh

  assert jax.device_count() == 8
  continued(model, make_mesh(SAVER), out / "saved")
  for name, sizes in MESHES.items():
    shutil.copytree(out / "saved", out / name)
    shutil.rmtree(out / name / "checkpoints" / str(STEPS))
    continued(model, make_mesh(sizes, jax.devices()[: int(name.split()[0])]), out / name)


def continued(path: str, mesh, folder: Path) -> None:
  """Train to the end in `folder`, from its checkpoint where there is one; writes the weights beside it."""
  import jax
  from flax.traverse_util import flatten_dict

  from jaxbias.config import defaults
  from jaxbias.losses.registry import parse
  from jaxbias.mesh import batch_shards
  from jaxbias.methods.recipes import Recipe, Row
  from jaxbias.models import language_model
  from jaxbias.train.batches import Sampler, plan_shape, tokenise
  from jaxbias.train.loop import Run, Trainer, train

  config = defaults()
  config.lora.rank, config.lora.targets = 2, ("q", "down")
  config.train.steps, config.train.warmup_steps, config.train.checkpoint_every = STEPS, 1, SAVED
  trainer = Trainer.of(language_model.load(path, dtype="float32", mesh=mesh), config)
  texts = tuple(Row(f"text {n}", "the cat " * n + "is a cat", 4 * n) for n in range(1, 9))
  objective, losses = parse({"sft": {"on": "retain"}})
  recipe = Recipe(texts, texts, texts, True)
  tokenised = tokenise(recipe, objective, trainer.model.tokenizer, trainer.model.config.max_positions)
  sampler = Sampler(tokenised, objective, {"retain": 8}, None, 0, batch_shards(mesh))
  coefficients = {"learning_rate": 1e-2, "losses": losses}
  folder.mkdir(exist_ok=True)
  state = train(trainer, Run(folder, {"train": {"steps": STEPS}}, objective, coefficients, sampler,
                             plan_shape([sampler], STEPS)))  # fmt: skip
  leaves = {"/".join(key): np.asarray(leaf) for key, leaf in flatten_dict(state.params).items()}
  np.savez(folder / "weights.npz", step=np.asarray(state.step), **leaves)
  (folder / "devices.json").write_text(json.dumps(len(jax.tree.leaves(state.params)[0].sharding.device_set)))


# In the test


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
  """What `worker` wrote."""
  out = tmp_path_factory.mktemp("meshes")
  environment = {
    **os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    "JAXBIAS_CACHE": str(out / "cache"), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
  }  # fmt: skip
  command = [sys.executable, "-m", "tests.faults.test_meshes", str(tiny_model(out / "model")), str(out)]
  done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=600)
  assert done.returncode == 0, done.stderr[-3000:]
  return out


@pytest.mark.parametrize("mesh", MESHES)
def test_saved_on_eight_devices_and_continued_on_fewer(folder, mesh):
  of = lambda name: [line["loss"] for line in lines(folder / name / "metrics.jsonl")]
  assert len(of(mesh)) == STEPS and of(mesh)[:SAVED] == of("saved")[:SAVED], "the first were not computed again"
  np.testing.assert_allclose(of(mesh), of("saved"), rtol=1e-5)
  assert of("saved")[-1] < of("saved")[0]
  with np.load(folder / "saved" / "weights.npz") as whole, np.load(folder / mesh / "weights.npz") as ours:
    assert ours.keys() == whole.keys() and ours["step"] == STEPS
    for name, expected in whole.items():
      assert np.linalg.norm(ours[name] - expected) <= 1e-5 * np.linalg.norm(expected), name
  devices = [json.loads((folder / name / "devices.json").read_text()) for name in ("saved", mesh)]
  assert devices == [8, int(mesh.split()[0])]


if __name__ == "__main__":
  worker(sys.argv[1], Path(sys.argv[2]))
